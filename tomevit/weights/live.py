"""A model of another library that is in memory: what it is, read off its attributes, and a copy of its weights.

Names and layouts are those of `tomevit.weights.formats`, as of files; of transformers' models the config is read as its
config.json is. What none of this tells is read off the layers: heads, epsilons, and of activations what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomevit.cards import Card
from tomevit.config import Config, Preprocess
from tomevit.errors import CheckpointError
from tomevit.models import unwrap
from tomevit.weights.formats import FORMATS
from tomevit.weights.rules import enumerate_names, without_wrappers
from tomevit.weights.side_files import open_clip, timm, transformers
from tomevit.weights.side_files.names import kin_of, named_card

#: Activations by name, and of which classes they may be where a module has not the values of one of them.
_ACTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
#: timm's classes that have the parts of ours, by the format of their weights.
_OF_TIMM = {
    "timm.models.vision_transformer.VisionTransformer": "timm",
    "timm.models.deit.VisionTransformerDistilled": "timm",
    "timm.models.eva.Eva": "timm_eva",
}


class Described(NamedTuple):
    """A model of another library's.

    Attributes:
        name: of its class, with that of its library.
        tensors: copies on the CPU, by the names of its state dict, wrappers aside.
        format: in which format of weights they are; None: as recognised.
        card: what the model is, given what `recognise.infer_architecture` sees in its tensors.
        changes: what was taken as its library usually has it, as the model does not say: sentences.
    """

    name: str
    tensors: dict[str, Tensor]
    format: str | None
    card: Callable[[Mapping[str, Any]], Card]
    changes: tuple[str, ...] = ()


def describe(module: nn.Module) -> Described | None:
    """What a model of timm, transformers, torchvision or open_clip is; None: it is of none of them.

    Raises:
        CheckpointError: layers were replaced, or it computes what no model here does: the message says which.
    """
    model = unwrap(module)
    library = type(model).__module__.partition(".")[0]
    if library not in _READERS:
        return None
    name = f"{_class_name(model)} in memory"
    try:
        _check_layers(model, {"torch", library, *(("timm",) if library == "open_clip" else ())})
        tensors = {
            without_wrappers(key): x.detach().to("cpu", copy=True) for key, x in sorted(model.state_dict().items())
        }
        format, read, changes = _READERS[library](model, tensors)  # noqa: A001
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error

    def card(observed: Mapping[str, Any]) -> Card:
        try:
            return read(observed)
        except ValueError as error:  # of Config too, whose limits such a model may not keep
            raise CheckpointError(str(error)) from error

    return Described(name, tensors, format, card, changes)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_layers(model: nn.Module, libraries: set[str]) -> None:
    """Raises ValueError, naming them, if layers are none of torch's or the library's own."""
    replaced = {}
    for name, module in model.named_modules():
        kind = _class_name(module)
        if kind.partition(".")[0] not in libraries or kind.startswith(("torch.ao.", "torch.nn.utils.parametr")):
            replaced[name] = kind
    for name, parameter in model.named_parameters():
        if type(parameter) not in (nn.Parameter, Tensor):
            replaced[name] = type(parameter).__name__
        elif not parameter.is_floating_point():
            replaced[name] = str(parameter.dtype)
    if replaced:
        shown = enumerate_names([f"{name} ({kind})" for name, kind in replaced.items()])
        raise ValueError(
            f"layers were replaced, and what they compute is not read: {shown}. Of adapters (peft), give what "
            f"merge_and_unload() returns; of quantised models, the one before"
        )


def _name_act(module: nn.Module) -> str:
    """Which activation a module computes, by its values.

    Raises:
        ValueError: none of ours.
    """
    x = _arguments()
    y = module(x.clone())
    for name, act in _ACTS.items():
        if torch.allclose(y, act(x), atol=1e-6):
            return name
    raise ValueError(f"its activation {_class_name(module)} is none of {', '.join(_ACTS)}")


def _arguments() -> Tensor:
    """Where activations differ."""
    return torch.linspace(-4, 4, 65, dtype=torch.float32, device="cpu")


def _require(what: str, value: Any, wanted: tuple[Any, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"its {what} is {value!r}, and must be {' or '.join(map(repr, wanted))}")


def _config(observed: Mapping[str, Any], **read: Any) -> Config:
    """A config of what tensors show and of what was read off the model."""
    seen = {field.name: observed[field.name] for field in fields(Config) if field.name in observed}
    seen |= {"layer_scale": 1e-5 if observed["layer_scale"] else None}  # how it started, no weights depend on
    if observed["attention_pool"] is not None:
        seen |= {"pool": "map", "pool_mlp_ratio": observed["attention_pool"]}
        if seen["pool_mlp_ratio"] == seen["mlp_ratio"]:
            seen["pool_mlp_ratio"] = None
    return Config(**seen | read)


_Reading = tuple[str | None, Callable[[Mapping[str, Any]], Card], tuple[str, ...]]


def _read_timm(model: Any, tensors: Mapping[str, Tensor]) -> _Reading:
    form = _OF_TIMM.get(_class_name(model))
    if form is None:
        raise ValueError(f"of timm's models {', '.join(_OF_TIMM)} are read")
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = cfg.get("architecture") or ""
    kin, proj_dim = timm.kin_and_projection(architecture, cfg.get("tag") or "")
    weight, bias = tensors.get("head.weight"), tensors.get("head.bias")
    projects = proj_dim and weight is not None and len(weight) == proj_dim  # its head is the projection
    if projects and "blocks.0.attn.norm.weight" in tensors:
        form = "timm_eva_clip"
    elif projects and (bias is None or not bias.any()):
        form = "timm_clip"
    elif all(signature.misses(tensors) for signature in FORMATS[form].signatures):
        form = "timm"  # Perception Encoder without LayerScale has the names of a VisionTransformer

    block = model.blocks[0]
    _require("global_pool", model.global_pool, ("token", "avg", "map", ""))
    _require("pool_include_prefix", getattr(model, "pool_include_prefix", False), (False,))
    if model.global_pool == "map" and form == "timm" and model.num_prefix_tokens:
        raise ValueError("its attention pooling leaves out the class token, and here it reads every token")
    read: dict[str, Any] = {"num_heads": block.attn.num_heads, "norm_eps": block.norm1.eps}
    read |= {"img_size": tuple(model.patch_embed.img_size), "pool": model.global_pool or "token"}
    if (pool := getattr(model, "attn_pool", None)) is not None:
        read["pool_heads"] = None if pool.num_heads == block.attn.num_heads else pool.num_heads
    if (rope := getattr(model, "rope", None)) is not None:
        read["rope"] = _name_rope(rope, model.patch_embed.grid_size)

    def card(observed: Mapping[str, Any]) -> Card:
        if observed["mlp"] == "mlp":
            read["act"] = _name_act(block.mlp.act)
        elif not torch.allclose(block.mlp.act(x := _arguments()), F.silu(x), atol=1e-6):
            raise ValueError(f"the gate of its MLP is {_class_name(block.mlp.act)}, and must be a SiLU")
        config = _config(observed, **read, pos_embed_prefix=observed["positions"] != model.patch_embed.num_patches)
        return named_card(config, kin, preprocess=timm.images_of(cfg, config.in_chans))

    return form, card, ()


def _name_rope(rope: Any, grid: tuple[int, int]) -> str:
    """Which rotations timm's module computes.

    Raises:
        ValueError: none of ours.
    """
    name = _class_name(rope)
    if name.endswith(".RotaryEmbeddingDinoV3"):
        return "dinov3"
    if name.endswith(".RotaryEmbeddingCat"):
        if rope.grid_indexing == "ij" and tuple(rope.ref_feat_shape or ()) == (16, 16):
            return "eva"
        if rope.grid_indexing == "xy" and tuple(rope.ref_feat_shape or grid) == tuple(grid):
            return "pe"
    raise ValueError(f"its rotations {name} are none of EVA-02's, DINOv3's or, at its own size, Perception Encoder's")


def _read_torchvision(model: Any, _tensors: Mapping[str, Tensor]) -> _Reading:
    if _class_name(model) != "torchvision.models.vision_transformer.VisionTransformer":
        raise ValueError("of torchvision's models VisionTransformer is read")
    block = model.encoder.layers[0]
    read = {"num_heads": block.num_heads, "norm_eps": block.ln_1.eps, "img_size": (model.image_size,) * 2}
    images = Preprocess(interpolation="bilinear")  # torchvision/transforms/_presets.py, ImageClassification

    def card(observed: Mapping[str, Any]) -> Card:
        config = _config(observed, **read, act=_name_act(block.mlp[1]))
        return named_card(config, "vit_", preprocess=images.for_channels(config.in_chans))

    return "torchvision", card, (_usual("torchvision"),)


def _usual(library: str) -> str:
    return f"images prepared as {library} usually does for such models, as the model does not say"


def _read_transformers(model: Any, _tensors: Mapping[str, Tensor]) -> _Reading:
    card = transformers.card_of(model.config.to_json_string(use_diff=False), type(model).__name__)
    return None, lambda _: card, (_usual("transformers"),)


def _read_open_clip(model: Any, tensors: Mapping[str, Tensor]) -> _Reading:
    tower = getattr(model, "visual", model)
    said = getattr(tower, "preprocess_cfg", None)
    changes = () if said else (_usual("open_clip"),)
    if (trunk := getattr(tower, "trunk", None)) is not None:
        prefix = "trunk." if tower is model else "visual.trunk."
        inner = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        form, named, _ = _read_timm(trunk, inner)
    else:
        if _class_name(tower) != "open_clip.transformer.VisionTransformer":
            raise ValueError(
                f"of open_clip's towers VisionTransformer and timm's are read, and not {_class_name(tower)}"
            )
        block = tower.transformer.resblocks[0]
        _require("pool_type", tower.pool_type, ("tok",))
        _require("attn_pool", tower.attn_pool, (None,))
        form = "open_clip"

        def named(observed: Mapping[str, Any]) -> Card:
            act = _name_act(block.mlp.gelu)
            size = tuple(tower.image_size)
            heads, eps = block.attn.num_heads, block.ln_1.eps
            config = _config(observed, act=act, img_size=size, num_heads=heads, norm_eps=eps)
            return named_card(config, "clip_")

    def card(observed: Mapping[str, Any]) -> Card:
        found = named(observed)
        images = open_clip.images_of(dict(said or {}), found.config.in_chans)
        return named_card(found.config, kin_of(found.name), preprocess=images)

    return form, card, changes


_READERS: Mapping[str, Callable[[Any, Mapping[str, Tensor]], _Reading]] = {
    "timm": _read_timm,
    "torchvision": _read_torchvision,
    "transformers": _read_transformers,
    "open_clip": _read_open_clip,
}

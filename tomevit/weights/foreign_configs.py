"""The small files that lie beside a checkpoint and describe it, as timm and transformers write and read them.

timm (`timm/models/_hub.py`) has config.json: an architecture's name, arguments that differ, the images' preparation.
transformers (`models/vit`, `models/dinov2`, `models/clip` and so on) has config.json for the architecture, in numbers,
and preprocessor_config.json for the images. open_clip (`open_clip/factory.py`) has open_clip_config.json for both. The
licence is often in README.md alone, the model card.

Each library has tables of `Row`, read in both directions. What no row can say is a function beside them.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import GenericAlias
from typing import Any, NamedTuple, get_args, get_origin

from tomevit import zoo
from tomevit.config import ARCHITECTURE, CHOICES, LEAST, MOST, MOST_PIXELS, Card, Config, Preprocess
from tomevit.errors import CheckpointError, printable
from tomevit.opening import open_file
from tomevit.typed import conform, parse_json

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
OPEN_CLIP = "open_clip_config.json"
README = "README.md"
CONFIG_FILES = (CONFIG, PREPROCESSOR, OPEN_CLIP, README)

MOST_BYTES = 2**24  # the largest config.json of google's repositories, with 21843 class names, has 1.1 MB
MOST_CHARACTERS = 256  # of a name
#: By our fields, what files may say; of what is not named here, 65536.
_MOST: Mapping[str, int] = MOST | {"img_size": MOST_PIXELS, "mlp_hidden": 2**20}
_LEAST: Mapping[str, float] = LEAST | {"img_size": 1, "mlp_hidden": 1, "mean": -(2**16), "std": 1e-6}

# --------------------------------------------------------------------------------------------------------------- tables

PAIR = tuple[int, int]  # height and width: a list, one int for both, or an object with these names
PER_CHANNEL = tuple[float, ...]  # a list of as many as there are channels, or one for all


class Row(NamedTuple):
    """A field of a library's file, and the field of `Config` or `Preprocess` that it stands for.

    Attributes:
        kind: what the file has: as `tomevit.typed.conform` takes it; or its choices, each with what it is here, of
            which the first is written.
        default: what the library takes where the file is silent; None: what the caller of `_Object.read` knows.
    """

    theirs: str
    ours: str
    kind: Any
    default: Any = None


# The arguments of timm's VisionTransformer.
_TIMM = (
    *(Row(name, name, int) for name in ("in_chans", "num_classes", "patch_size", "embed_dim", "depth", "num_heads")),
    *(Row(name, name, bool) for name in ("qkv_bias", "qk_norm", "class_token", "pre_norm")),
    Row("img_size", "img_size", PAIR),
    Row("reg_tokens", "reg_tokens", int),
    Row("mlp_ratio", "mlp_ratio", float),
    Row("init_values", "layer_scale", float),
    Row("no_embed_class", "pos_embed_prefix", {False: True, True: False}),
    Row("act_layer", "act", {act: act for act in CHOICES["act"]}),
    Row("global_pool", "pool", {"token": "token", "avg": "avg", "": "token"}),
    Row("fc_norm", "pool_norm", {False: "before", True: "after"}),
)
_TIMM_IMAGES = (
    Row("interpolation", "interpolation", {"bilinear": "bilinear", "bicubic": "bicubic"}),
    Row("crop_pct", "crop_pct", float),
    Row("crop_mode", "resize", {"center": "shorter", "squash": "squash"}),
    Row("mean", "mean", PER_CHANNEL),
    Row("std", "std", PER_CHANNEL),
)
# How a model trains and starts, where it comes from, and which sizes it takes at run time: no weights depend on these.
_TIMM_IDLE = re.compile(
    r"(\w+_)?drop(_\w+)?_rate|weight_init|fix_init|dynamic_img_(size|pad)|strict_img_size|device|dtype"
    r"|pretrained|pretrained_(strict|filter_fn|custom_load)|checkpoint_path|cache_dir|scriptable|exportable|no_jit"
)
_TIMM_ONLY = {"pos_embed": "learn", "final_norm": True, "pool_include_prefix": False, "proj_bias": True}
_TIMM_ONLY |= {"scale_attn_norm": False, "scale_mlp_norm": False, "norm_layer": "layernorm", "features_only": False}
#: timm's SigLIP models that have the tanh form of GELU; all others have the exact one (vision_transformer.py).
_TIMM_TANH = re.compile(
    r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip_(gap_)?\d+|large_patch16_siglip_(gap_)?512)"
)

_ACTS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_ACTS |= {"gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_SIZES = (
    Row("hidden_size", "embed_dim", int, 768),
    Row("num_hidden_layers", "depth", int, 12),
    Row("num_attention_heads", "num_heads", int, 12),
    Row("image_size", "img_size", PAIR, 224),
    Row("num_channels", "in_chans", int, 3),
)
_TRANSFORMERS = (
    *_SIZES,
    Row("intermediate_size", "mlp_hidden", int, 3072),
    Row("hidden_act", "act", _ACTS, "gelu"),
    Row("layer_norm_eps", "norm_eps", float, 1e-12),
    Row("patch_size", "patch_size", PAIR, 16),
    Row("qkv_bias", "qkv_bias", bool, True),
)
_TOWER = (*_SIZES, Row("intermediate_size", "mlp_hidden", int, 3072))
_CLIP = (
    *_TOWER,
    Row("hidden_act", "act", _ACTS, "quick_gelu"),
    Row("layer_norm_eps", "norm_eps", float, 1e-5),
    Row("patch_size", "patch_size", PAIR, 32),
)
_SIGLIP = (
    *_TOWER,
    Row("hidden_act", "act", _ACTS, "gelu_pytorch_tanh"),
    Row("layer_norm_eps", "norm_eps", float, 1e-6),
    Row("patch_size", "patch_size", PAIR, 16),
    Row("vision_use_head", "pool", {True: "map", False: "avg"}, True),
)
_DINOV2 = (
    *_SIZES,
    Row("mlp_ratio", "mlp_ratio", float, 4),
    Row("hidden_act", "act", _ACTS, "gelu"),
    Row("layer_norm_eps", "norm_eps", float, 1e-6),
    Row("patch_size", "patch_size", PAIR, 14),
    Row("qkv_bias", "qkv_bias", bool, True),
    Row("layerscale_value", "layer_scale", float, 1.0),
    Row("use_swiglu_ffn", "mlp", {False: "mlp", True: "swiglu"}, False),
)
_DINOV3_SIZES = {"hidden_size": 384, "num_attention_heads": 6}
_DINOV3 = (
    *(row._replace(default=_DINOV3_SIZES.get(row.theirs, row.default)) for row in _SIZES),
    Row("intermediate_size", "mlp_hidden", int, 1536),
    Row("hidden_act", "act", _ACTS, "gelu"),
    Row("layer_norm_eps", "norm_eps", float, 1e-5),
    Row("patch_size", "patch_size", PAIR, 16),
    Row("layerscale_value", "layer_scale", float, 1.0),
    Row("use_gated_mlp", "mlp", {False: "mlp", True: "swiglu"}, False),
    Row("num_register_tokens", "reg_tokens", int, 0),
)
_TRANSFORMERS_IMAGES = (
    Row("resample", "interpolation", {2: "bilinear", 3: "bicubic"}),
    Row("image_mean", "mean", PER_CHANNEL),
    Row("image_std", "std", PER_CHANNEL),
)
# The gate of a gated MLP is a SiLU here; DINOv2's is one there too, whatever its config says.
_DINOV3_GATED = tuple(row._replace(kind={"silu": "gelu"}) if row.ours == "act" else row for row in _DINOV3)


# What every model of transformers' fixes of ours, but where `_FAMILIES` and `_CLASSES` have it otherwise.
_FIXED: dict[str, Any] = {
    "pool": "token",
    "pool_norm": "before",
    "class_token": True,
    "reg_tokens": 0,
    "pos_embed": "learned",
    "pos_embed_prefix": True,
    "rope": None,
    "mlp": "mlp",
    "mlp_norm": False,
    "proj_dim": 0,
}
_FIXED |= {"attn_norm": False, "proj_bias": False}
_FIXED |= {"qk_norm": False, "layer_scale": None, "pre_norm": False, "dist_token": False, "qkv_bias": True}
# transformers' classes, and what each fixes of ours.
_CLASSES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {},
    "ViTModel": {"num_classes": 0},
    "ViTForMaskedImageModeling": {"num_classes": 0},
    "DeiTForImageClassificationWithTeacher": {"dist_token": True},
    # Its one head reads the class token alone: to it, the distillation token is a register.
    "DeiTForImageClassification": {"reg_tokens": 1},
    "DeiTModel": {"dist_token": True, "num_classes": 0},
    "DeiTForMaskedImageModeling": {"dist_token": True, "num_classes": 0},
    "ViTMAEModel": {"num_classes": 0},
    "ViTMAEForPreTraining": {"num_classes": 0},
    "Dinov2ForImageClassification": {"pool": "token_avg"},
    "Dinov2Model": {"num_classes": 0},
    "Dinov2WithRegistersForImageClassification": {"pool": "token_avg"},
    "Dinov2WithRegistersModel": {"num_classes": 0},
    "DINOv3ViTModel": {"num_classes": 0},
    "CLIPModel": {"num_classes": 0},
    "CLIPVisionModelWithProjection": {"num_classes": 0},
    "CLIPVisionModel": {"num_classes": 0, "proj_dim": 0},
    "SiglipModel": {"num_classes": 0},
    "SiglipVisionModel": {"num_classes": 0},
    "SiglipForImageClassification": {"pool": "avg"},
}


class _Family(NamedTuple):
    """The models of one model_type.

    Attributes:
        kin: how the names of such models begin in the zoo.
        headed, bare: the usual classes with a classifier and without.
        rows: of its config.json.
        fixed: what such models have otherwise than `_FIXED` says.
        processor: its usual image processor.
        part: the object in config.json that has the rows; "": the whole.
        only: fields that have this value in every model that can be read.
        any_size: whether models take images of another size than that of their positions.
    """

    kin: str
    headed: str
    bare: str
    rows: tuple[Row, ...] = _TRANSFORMERS
    fixed: Mapping[str, Any] = {}
    processor: str = "ViT"
    part: str = ""
    only: Mapping[str, Any] = {}
    any_size: bool = False


_CLIP_FIXED = {"pre_norm": True}
_SIGLIP_FIXED = {"class_token": False, "pool": "map"}
_REGISTERS = Row("num_register_tokens", "reg_tokens", int, 4)
_FAMILIES = {
    "vit": _Family("vit_", "ViTForImageClassification", "ViTModel"),
    "deit": _Family("deit_distilled_", "DeiTForImageClassificationWithTeacher", "DeiTModel", processor="DeiT"),
    "vit_mae": _Family("mae_cls_", "ViTMAEModel", "ViTMAEModel"),
    "dinov2": _Family(
        "dinov2_",
        "Dinov2ForImageClassification",
        "Dinov2Model",
        _DINOV2,
        {"layer_scale": 1.0},
        "Bit",
        any_size=True,
    ),
    "dinov2_with_registers": _Family(
        "dinov2_",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersModel",
        (*(row._replace(default=16) if row.theirs == "patch_size" else row for row in _DINOV2), _REGISTERS),
        {"layer_scale": 1.0, "pos_embed_prefix": "class"},
        "Bit",
        any_size=True,
    ),
    "dinov3_vit": _Family(
        "dinov3_",
        "DINOv3ViTModel",
        "DINOv3ViTModel",
        _DINOV3,
        {"layer_scale": 1.0, "pos_embed": "none", "rope": "dinov3", "qkv_bias": False},
        "DINOv3ViT",
        only={"rope_theta": 100.0, "proj_bias": True, "mlp_bias": True, "key_bias": False},
        any_size=True,
    ),
    "clip": _Family("clip_", "CLIPModel", "CLIPModel", _CLIP, _CLIP_FIXED, "CLIP", "vision_config"),
    "clip_vision_model": _Family(
        "clip_", "CLIPVisionModelWithProjection", "CLIPVisionModel", _CLIP, _CLIP_FIXED, "CLIP"
    ),
    "siglip": _Family(
        "siglip_",
        "SiglipForImageClassification",
        "SiglipModel",
        _SIGLIP,
        _SIGLIP_FIXED,
        "Siglip",
        "vision_config",
    ),
    "siglip_vision_model": _Family(
        "siglip_", "SiglipVisionModel", "SiglipVisionModel", _SIGLIP, _SIGLIP_FIXED, "Siglip"
    ),
}
_PROJECTION = Row("projection_dim", "proj_dim", int, 512)  # beside vision_config
_PROJECTING = ("CLIPModel", "CLIPVisionModelWithProjection")
_MANY_TEXTS = 2**17  # words that SigLIP 2 tells apart at least, and most of SigLIP do not: it has 256000
# What transformers' image processors do where preprocessor_config.json is silent.
_HALF: dict[str, Any] = {"image_mean": 0.5, "image_std": 0.5}
_OPENAI: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_PROCESSORS = {
    "ViT": _HALF | {"resample": 2, "do_center_crop": False},
    "DeiT": _HALF | {"resample": 3, "do_center_crop": True},
    "Bit": _OPENAI | {"resample": 3, "do_center_crop": True},
    "CLIP": _OPENAI | {"resample": 3, "do_center_crop": True},
    "Siglip": _HALF | {"resample": 3, "do_center_crop": False},
    "DINOv3ViT": _IMAGENET | {"resample": 2, "do_center_crop": False},
}
_PROCESSOR_NAME = re.compile(rf"({'|'.join(_PROCESSORS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


# What makes another model of it, in either library's config.json, unless it is empty.
_OTHERWISE = ("quantization_config", "pruned_heads")


class _Object(dict[str, Any]):
    """A JSON object of which nothing is trusted: null counts as missing, and each value is asked for by its kind.

    All methods raise ValueError where the file is wrong.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.where = where  # before a field's name, in messages

    @classmethod
    def of(cls, path: Path) -> _Object:
        with open_file(path) as file:
            content = file.read(MOST_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, and is no description of a model")
        try:
            values = parse_json(content)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"it holds {reprlib.repr(values)}, and should hold an object")
        return cls(values)

    def refuse(self, name: str, wanted: str) -> ValueError:
        shown = f"{self.where}{name[:MOST_CHARACTERS]} is {reprlib.repr(self.get(name))}"
        return ValueError(f"{shown}, and must be {wanted}")

    def part(self, name: str) -> _Object:
        """An object within this one, empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return _Object(value, f"{self.where}{name}.")

    def take(self, name: str, kind: Any, default: Any = None, ours: str = "") -> Any:
        """One value, of a `Row.kind`, within the limits of a field of ours; None where file and default have none."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(kind, dict):
            for theirs, found in kind.items():
                if theirs == value and isinstance(value, bool) == isinstance(theirs, bool):
                    return found
            raise self.refuse(name, f"one of {', '.join(map(str, kind))}")
        where = f"{self.where}{name}"
        if kind == PAIR and isinstance(value, dict) and {"height", "width"} <= value.keys():
            value = [value["height"], value["width"]]
        elif get_origin(kind) is tuple and not isinstance(value, list):
            value = [conform(get_args(kind)[0], value, where)] * len(get_args(kind))
        value = conform(kind, value, where)
        if kind is str and len(value) > MOST_CHARACTERS:
            raise self.refuse(name, f"a text of at most {MOST_CHARACTERS} characters")
        if kind is not str and (limits := _beyond(value, ours)):
            raise self.refuse(name, limits)
        return value

    def read(self, rows: Iterable[Row], known: Mapping[str, Any], channels: int = 0) -> dict[str, Any]:
        """Our fields of a table; of those that neither the file nor a default has, what is known of them beforehand."""
        fields = dict(known)
        for row in rows:
            kind = row.kind
            if kind == PER_CHANNEL:
                # Both libraries keep the three of RGB in files of models that take other channels.
                stated = self.get(row.theirs, row.default)
                kind = GenericAlias(
                    tuple, (float,) * (3 if isinstance(stated, list) and len(stated) == 3 else channels)
                )
            value = self.take(row.theirs, kind, row.default, row.ours)
            if value is not None:
                fields[row.ours] = value
        return fields


def _beyond(value: Any, ours: str) -> str:
    """The limits of a field of ours, if a value, or one of several, is beyond them."""
    least, most = _LEAST.get(ours, 0), _MOST.get(ours, 2**16)
    within = all(least <= x <= most for x in (value if isinstance(value, tuple) else (value,)))
    return "" if within else f"from {least} to {most}"


def _write(rows: Iterable[Row], fields: Mapping[str, Any], known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The inverse of `_Object.read`: what a file says of our fields, but for those that are as known beforehand.

    Raises:
        ValueError: a value is beyond what is read.
    """
    said = {}
    for row in rows:
        value = fields[row.ours]
        if not isinstance(row.kind, dict) and value is not None and (limits := _beyond(value, row.ours)):
            raise ValueError(f"{row.theirs} is {reprlib.repr(value)}, and must be {limits} to be written")
        if row.ours in known and known[row.ours] == value:
            continue
        if isinstance(row.kind, dict):
            theirs = next((theirs for theirs, ours in row.kind.items() if ours == value), None)
            if theirs is None:
                raise ValueError(f"{row.theirs} has no word for {row.ours}={value!r}")
            value = theirs
        elif isinstance(value, tuple):
            value = value[0] if row.kind == PAIR and value[0] == value[1] else list(value)
        said[row.theirs] = value
    return said


# -------------------------------------------------------------------------------------------------------------- reading


def card_from_configs(files: Mapping[str, Path]) -> Card | None:
    """The card that a repository's JSON files describe.

    The card says what the files say, and no more: a fine-tuned model's config.json still has the tag of the weights it
    began with, so figures, sources, r and tag stay empty. Its name is the zoo's for the same architecture, where there
    is one.

    Args:
        files: paths by their names in the repository, of `CONFIG_FILES`.

    Returns:
        None: there is no open_clip_config.json, and no config.json, or it is neither timm's nor transformers'.

    Raises:
        CheckpointError: a file is malformed, or describes what tomevit cannot build; the message says where.
    """
    if CONFIG not in files:
        return _licensed(_card_of_open_clip(files[OPEN_CLIP]), files) if OPEN_CLIP in files else None
    with _naming(files[CONFIG]):
        config = _Object.of(files[CONFIG])
        _check_plain(config)
        if "architecture" in config:
            card = _read_timm(config)
        elif "model_type" in config:
            card = _read_transformers(config)
        else:
            return None
    if "architecture" not in config:
        with _naming(files.get(PREPROCESSOR, PREPROCESSOR)):
            processor = _Object.of(files[PREPROCESSOR]) if PREPROCESSOR in files else _Object({})
            family = _FAMILIES[config["model_type"]]
            card = replace(card, preprocess=_read_processor(processor, family, card.config))
    return _licensed(card, files)


def _licensed(card: Card, files: Mapping[str, Path]) -> Card:
    """The card with the licence that the README states, if it has none yet."""
    if card.licence is None and README in files:
        return replace(card, licence=_read_licence(files[README]))
    return card


@contextmanager
def _naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong in a file is told with its name."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(file)}: {printable(str(error))}") from error


_FRONT_MATTER = re.compile(r"---[ \t]*\r?$(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^(license(?:_name)?):(?=\s)(.{,512})$(?!\n[ \t]+[^\s#])", re.MULTILINE)
# What YAML takes for a text on one line: quoted without escapes, or plain. Lists, aliases, blocks, numbers are none.
_NO_TEXT = r"(?:null|true|false|yes|no|on|off|[\d.:-]+)\s*(?:\s#|$)"
_TEXT = re.compile(rf"""(?:"([^"\\]*)"|'([^']*)'|(?!(?i:{_NO_TEXT}))([^\W_](?:[^#:]|:(?=\S))*))\s*(?:(?<=\s)#.*)?""")


def _read_licence(readme: Path) -> str | None:
    """The licence in a model card's metadata, where it is stated plainly: people write it, and it may be anything."""
    with open_file(readme) as file:
        front = _FRONT_MATTER.match(file.read(MOST_BYTES).decode("utf-8-sig", "replace"))
    stated: dict[str, str] = dict(_LICENCE.findall(front[1])) if front else {}
    match = _TEXT.fullmatch(stated.get("license_name", stated.get("license", "")).strip())
    licence = (match[1] or match[2] or match[3] or "").strip() if match else ""
    return licence if 0 < len(licence) <= MOST_CHARACTERS and licence.isprintable() else None


# Architectures differ in no other field from models of one name: these have each user's own values.
_OPEN = ("img_size", "in_chans", "num_classes", "norm_eps", "pool", "pool_norm", "proj_dim")


def _is_of(card: Card, config: Config, kin: str) -> bool:
    """Whether a card of the zoo is of a config's architecture."""

    def told(config: Config) -> list[Any]:
        fields = vars(config) | {"layer_scale": config.layer_scale is not None, "maps": config.pool == "map"}
        if config.pos_embed_prefix == "class" and config.reg_tokens:
            fields["pos_embed_prefix"] = False  # as timm has it: the class token's is added to the token
        return [fields[name] for name in (*ARCHITECTURE, "maps") if name not in (*_OPEN, "act")]

    acts = {found.config.act for found in zoo.cards(card.name)}
    if kin.startswith("siglip"):
        acts |= {"gelu", "gelu_tanh"}  # timm runs them with the one, all others with the other
    return told(card.config) == told(config) and config.act in acts


def named_card(config: Config, kin: str, **rest: Any) -> Card:
    """A card with the zoo's name for the architecture; of several, one that begins as `kin` does, and pools as this."""
    same = [card for card in zoo.architectures() if _is_of(card, config, kin)]
    if same:

        def distance(card: Card) -> tuple[bool, bool, bool]:
            pooled = card.config.pool_norm == config.pool_norm
            return not card.name.startswith(kin), not pooled, card.config.img_size != config.img_size

        near = min(same, key=distance)
        config = replace(config, prop_attn=near.config.prop_attn, init=near.config.init)
    else:
        family = "deit_distilled" if config.dist_token else "vit"
        name = f"{family}_{config.embed_dim}x{config.depth}_p{config.patch_size}"
        near = Card(name=name, title="Vision Transformer")
    return Card(name=near.name, timm=near.timm, title=near.title, papers=near.papers, config=config, **rest)


def _read_timm(config: _Object) -> Card:
    # Before timm 0.8 there was one level.
    cfg = config.part("pretrained_cfg") if "pretrained_cfg" in config else config
    args = config.part("model_args")
    architecture = config.take("architecture", str)
    tag = cfg.take("tag", str, "")
    base = _timm_base(architecture, tag)
    built = _as_timm_builds(architecture, base)
    kinds = {row.theirs: row.kind for row in _TIMM}
    if built.pool == "map":
        kinds["global_pool"] = kinds["global_pool"] | {"map": "map"}
    for name, value in args.items():
        idle = len(name) <= MOST_CHARACTERS and _TIMM_IDLE.fullmatch(name)
        if name not in kinds and not idle and (name, value) not in _TIMM_ONLY.items():
            raise args.refuse(name, "left out: tomevit has nothing like it")

    if built.mlp == "swiglu" and "mlp_ratio" in args:
        raise args.refuse("mlp_ratio", "left out: which width it gives depends on the architecture's own rounding")

    fields = {field: getattr(built, field) for field in ARCHITECTURE}
    size = cfg.get("input_size", [fields["in_chans"], *fields["img_size"]])
    if not isinstance(size, list) or len(size) != 3:
        raise cfg.refuse("input_size", "channels, height and width")
    size = _Object({"in_chans": size[0], "img_size": size[1:]}, f"{cfg.where}input_size, as ")
    fields["in_chans"] = size.take("in_chans", int, fields["in_chans"], "in_chans")
    if cfg.take("fixed_input_size", bool, True):  # else the positions are the architecture's own
        fields["img_size"] = size.take("img_size", PAIR, None, "img_size")
    if built.rope == "pe" and fields["img_size"] != built.img_size:
        (height, width), (named, _) = fields["img_size"], built.img_size
        raise ValueError(
            f"the model takes {height}x{width}: timm scales its rotations to those of {named}x{named}, and they are "
            f"not scaled here"
        )
    outputs = built.num_classes or built.proj_dim
    for source in (cfg, config, args):
        outputs = source.take("num_classes", int, outputs, "num_classes")
    # The projection is a head as well, with as many outputs as the texts' vectors have.
    projects = outputs == zoo.architecture(base.name).config.proj_dim
    fields |= {"num_classes": 0 if projects else outputs, "proj_dim": outputs if projects else 0}
    # The last says how the model was built, though timm itself builds by the others.
    pooled = next((source for source in (args, cfg) if "global_pool" in source), config)
    fields["pool"] = pooled.take("global_pool", kinds["global_pool"]) or fields["pool"]
    fields["pool_norm"] = _timm_pool_norm(built, fields["pool"])
    pooled_fields = ("num_classes", "proj_dim", "pool")
    fields = args.read([row for row in _TIMM if row.ours not in pooled_fields], fields)

    kin = _timm_kin(base, architecture, tag)
    return named_card(
        Config(**fields),
        kin,
        preprocess=_read_timm_images(cfg, fields["in_chans"]),
        licence=cfg.take("license", str) or None,
        class_names=_timm_labels(config if "label_names" in config else cfg, config, fields["num_classes"]),
    )


def _timm_base(name: str, tag: str) -> Card:
    # timm has one name for vit_b16 and mae_cls_b16, and for SigLIP and SigLIP 2.
    for weights in (f"{name}.{tag}", f"timm/{name}.{tag}"):
        with suppress(ValueError):
            return zoo.card(weights)
    return zoo.card(name)


def _timm_kin(base: Card, architecture: str, tag: str) -> str:
    """How the names of a timm model's kin begin in the zoo."""
    if "_siglip_" in architecture and tag:  # timm has one name for SigLIP and SigLIP 2, and says in the tag which it is
        return "siglip2_" if tag.startswith("v2_") else "siglip_"
    return f"{base.name.partition('_')[0]}_"


def _read_timm_images(cfg: _Object, channels: int) -> Preprocess:
    images = Preprocess().for_channels(channels)  # timm's defaults too
    return Preprocess(**cfg.read(_TIMM_IMAGES, vars(images), channels))


def images_of_timm(pretrained_cfg: Mapping[str, Any], channels: int) -> Preprocess:
    """How a timm model's `pretrained_cfg` says that images are prepared.

    Raises:
        ValueError: in a way that `Preprocess` has no words for.
    """
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in pretrained_cfg.items()}
    return _read_timm_images(_Object(lists), channels)


def kin_of_timm(architecture: str, tag: str) -> tuple[str, int]:
    """How the zoo's names of a timm architecture's kin begin, and the channels of its projection: 0 without one."""
    try:
        base = _timm_base(architecture, tag)
    except ValueError:  # a model that is none of timm's own
        return "vit_", 0
    return _timm_kin(base, architecture, tag), zoo.architecture(base.name).config.proj_dim


def images_of_open_clip(preprocess_cfg: Mapping[str, Any], channels: int) -> Preprocess:
    """How an open_clip tower's `preprocess_cfg` says that images are prepared.

    Raises:
        ValueError: in a way that `Preprocess` has no words for.
    """
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in preprocess_cfg.items()}
    return Preprocess(**_Object(lists).read(_OPEN_CLIP_IMAGES, {"crop_pct": 1.0}, channels))


def card_from_transformers(config_json: str, class_name: str) -> Card:
    """The card of a model of transformers' by its config; images are prepared as usually for models of its kind.

    Raises:
        ValueError: it is none that tomevit can build; the message says where.
    """
    config = _Object(parse_json(config_json) | {"architectures": [class_name]})
    _check_plain(config)
    card = _read_transformers(config)
    # Nothing of a processor is said, and the usual one makes images of the size that the model takes.
    return replace(card, preprocess=_read_processor(_Object({}), _FAMILIES[config["model_type"]], card.config))


def _check_plain(config: _Object) -> None:
    """Raises ValueError if a config.json describes a model that was changed after it was built."""
    for name in _OTHERWISE:
        if config.get(name):
            raise config.refuse(name, "left out: tomevit has nothing like it")


def _as_timm_builds(architecture: str, card: Card) -> Config:
    """The card's config, as timm has it by that name and without arguments: it differs from training, and from ours."""
    config = card.config
    if "_siglip_" in architecture:
        config = replace(config, act="gelu_tanh" if _TIMM_TANH.fullmatch(architecture) else "gelu")
    elif "_clip_" in architecture:
        config = replace(config, act="quick_gelu" if "_clip_quickgelu_" in architecture else "gelu")
    if config.pos_embed_prefix == "class":
        config = replace(config, pos_embed_prefix=False)  # the class token's is added to the token
    if config.rope == "dinov3":
        config = replace(config, pool="avg", qkv_bias=architecture.endswith("_qkvb"))
    return config


def _timm_pool_norm(built: Config, pool: str) -> str:
    """Where timm's architectures have their last norm if they pool so."""
    normed_first = built.rope == "dinov3" or (built.pool, built.pool_norm) == ("avg", "before")
    if built.pool_norm == "none":
        return "none"
    return "after" if pool == "avg" and not normed_first else "before"


def _timm_labels(names: _Object, config: _Object, classes: int) -> tuple[str, ...]:
    labels = names.get("label_names", names.get("labels", []))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return ()  # timm's also may be a table with gaps
    described = config.part("label_descriptions")
    texts = {label: text for label, text in described.items() if isinstance(text, str)}
    found = tuple(str(texts.get(label, label)) for label in labels)
    return found if len(found) == classes else ()


def _read_transformers(config: _Object) -> Card:
    family = config.take("model_type", _FAMILIES)
    labelled = "id2label" in config or "num_labels" in config
    classes = config.get("architectures") or [family.headed if labelled else family.bare]
    # Not only the model_type's own: users' encoders of ViTMAE are called ViTModel too.
    if not isinstance(classes, list) or not isinstance(classes[0], str) or classes[0] not in _CLASSES:
        raise config.refuse("architectures", f"a list of one of {', '.join(_CLASSES)}")
    part = config.part(family.part) if family.part else config
    for name, value in family.only.items():
        if part.get(name, value) != value:
            raise part.refuse(name, f"{value}: tomevit has nothing like it")
    fixed = {**family.fixed, **_CLASSES[classes[0]]}
    labels = () if "num_classes" in fixed else _read_labels(config)
    rows = _DINOV3_GATED if family.rows is _DINOV3 and part.take("use_gated_mlp", bool, False) else family.rows
    fields = part.read(rows, {"num_classes": len(labels), **fixed})
    if "pool" in _CLASSES[classes[0]]:
        fields["pool"] = fixed["pool"]
    if classes[0] in _PROJECTING:
        fields = config.read([_PROJECTION], fields)
    height, width = fields["patch_size"]
    if height != width:
        raise part.refuse("patch_size", "the same along height and width")
    fields["patch_size"] = height
    if "mlp_hidden" not in fields:
        fields["mlp_hidden"] = _dinov2_hidden(fields["embed_dim"], fields["mlp_ratio"], fields["mlp"])
    fields["mlp_ratio"] = _mlp_ratio(fields["embed_dim"], fields.pop("mlp_hidden"))
    kin = family.kin
    if kin == "siglip_":
        # The convolution leaves out what is over: of 384 pixels, 378.
        fields["img_size"] = tuple(max(height, pixels // height * height) for pixels in fields["img_size"])
        if config.part("text_config").take("vocab_size", int, 0, "num_classes") >= _MANY_TEXTS:
            kin = "siglip2_"
    generic = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    return named_card(Config(**fields), kin, class_names=() if generic else labels)


def _dinov2_hidden(dim: int, ratio: float, mlp: str) -> int:
    """The width of DINOv2's MLP: the gated one has two thirds of it, in eights (`Dinov2SwiGLUFFN` there)."""
    hidden = int(dim * ratio)
    return hidden if mlp == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


def _read_labels(config: _Object) -> tuple[str, ...]:
    """One name per class; LABEL_0 and so on where there are none, as transformers has it."""
    if "id2label" not in config:
        return tuple(f"LABEL_{i}" for i in range(config.take("num_labels", int, 2, "num_classes")))
    labels = config.part("id2label")
    if not all(isinstance(label, str | int | float) for label in labels.values()):
        raise config.refuse("id2label", "an object of texts")
    try:
        return tuple(str(labels[str(i)]) for i in range(len(labels)))
    except KeyError as error:
        raise ValueError(f"id2label has {len(labels)} classes, and no name for number {error}") from None


def _mlp_ratio(dim: int, hidden: int) -> float:
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


_OPEN_CLIP_TOWER = (
    Row("width", "embed_dim", int, 768),
    Row("layers", "depth", int, 12),
    Row("image_size", "img_size", PAIR, 224),
    Row("patch_size", "patch_size", int, 16),
    Row("mlp_ratio", "mlp_ratio", float, 4.0),
    Row("ls_init_value", "layer_scale", float),
)
# How a tower trains, which tensors it hands out beside its vector, and how timm makes one: no weights depend on these.
_OPEN_CLIP_IDLE = re.compile(
    r"head_width|patch_dropout|output_tokens|timm_(drop|drop_path|model_name|model_pretrained|pool|proj|proj_bias)"
)
_OPEN_CLIP_ONLY = {"attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable", "pool_type": "tok"}
_OPEN_CLIP_ONLY |= {"final_ln_after_pool": False, "input_patchnorm": False, "global_average_pool": False}
_OPEN_CLIP_IMAGES = (
    Row("interpolation", "interpolation", {"bicubic": "bicubic", "bilinear": "bilinear"}, "bicubic"),
    Row("resize_mode", "resize", {"shortest": "shorter", "squash": "squash"}, "shortest"),
    Row("mean", "mean", PER_CHANNEL, _OPENAI["image_mean"]),
    Row("std", "std", PER_CHANNEL, _OPENAI["image_std"]),
)


def _card_of_open_clip(path: Path) -> Card:
    """The card of the image tower that open_clip_config.json describes.

    Raises:
        CheckpointError: as `card_from_configs`.
    """
    with _naming(path):
        config = _Object.of(path)
        return _read_open_clip(config.part("model_cfg"), config.part("preprocess_cfg"))


def _read_open_clip(model: _Object, images: _Object) -> Card:
    tower = model.part("vision_cfg")
    rows = {row.theirs for row in _OPEN_CLIP_TOWER}
    for name, value in tower.items():
        idle = len(name) <= MOST_CHARACTERS and _OPEN_CLIP_IDLE.fullmatch(name)
        if name not in rows and not idle and (name, value) not in _OPEN_CLIP_ONLY.items():
            raise tower.refuse(name, "left out: tomevit has nothing like it")
    proj_dim = model.take("embed_dim", int, 0, "proj_dim")
    if name := tower.take("timm_model_name", str):
        built = _as_timm_builds(name, zoo.card(name))
        pool = tower.take("timm_pool", {"": built.pool, "token": "token", "avg": "avg", "map": "map"}, "")
        kind = tower.take("timm_proj", {"": False, "none": False, "linear": True}, "")
        size = tower.take("image_size", PAIR, list(built.img_size), "img_size")
        # Without a projection of open_clip's, timm's own head has as many outputs as the texts' vectors.
        headed = kind or zoo.architecture(name).config.proj_dim == proj_dim
        fields = vars(built) | {"img_size": size, "pool": pool, "pool_norm": _timm_pool_norm(built, pool)}
        fields |= {"num_classes": 0, "proj_dim": proj_dim if headed else 0}
        kin = f"{zoo.card(name).name.partition('_')[0]}_"
    else:
        act = model.take("quick_gelu", {False: "gelu", True: "quick_gelu"}, False)
        fixed = {"norm_eps": 1e-5, "pre_norm": True, "num_classes": 0, "proj_dim": proj_dim, "act": act}
        fields = tower.read(_OPEN_CLIP_TOWER, fixed)
        width = tower.take("head_width", int, 64, "embed_dim")
        if fields["embed_dim"] % width:
            raise tower.refuse("head_width", f"a divisor of {fields['embed_dim']}")
        fields["num_heads"] = fields["embed_dim"] // width
        fields["mlp_ratio"] = _mlp_ratio(fields["embed_dim"], int(fields["embed_dim"] * fields["mlp_ratio"]))
        kin = "clip_"
    config = Config(**fields)
    made = images.take("size", PAIR, list(config.img_size), "img_size")
    if made != config.img_size:
        raise images.refuse("size", f"{config.img_size[0]}x{config.img_size[1]}, as the model takes them")
    found = images.read(_OPEN_CLIP_IMAGES, {"crop_pct": 1.0}, config.in_chans)
    return named_card(config, kin, preprocess=Preprocess(**found))


def _read_processor(fields: _Object, family: _Family, config: Config) -> Preprocess:
    # do_resize and do_rescale say who does it, the caller or the processor, and not that nobody does.
    image, unstated = config.img_size, f"{family.processor}ImageProcessor"
    key = "image_processor_type" if "image_processor_type" in fields else "feature_extractor_type"
    match = _PROCESSOR_NAME.fullmatch(fields.take(key, str, unstated))
    if match is None:
        raise fields.refuse(key, f"an image processor of {', '.join(_PROCESSORS)}")
    fields = _Object({**_PROCESSORS[match[1]], **fields})

    # One number as size means both edges, or the shorter.
    if isinstance(fields.get("size"), dict):
        fields = _Object(fields | {"size": fields.part("size") or None})
    size = fields.get("size")
    shorter = "shortest_edge" in size if isinstance(size, dict) else match[1] in ("Bit", "CLIP")
    before = [round(pixels * (256 / 224 if match[1] == "DeiT" else 1)) for pixels in image]
    if shorter and isinstance(size, dict):
        edges = fields.part("size").take("shortest_edge", PAIR, before, "img_size")
    else:
        edges = fields.take("size", PAIR, before, "img_size")
    crop = fields.take("do_center_crop", bool)
    made = fields.take("crop_size", PAIR, list(image), "img_size") if crop else edges
    if family.any_size:  # it resamples its positions for the images that come
        image = made
    elif family.kin == "siglip_" and [pixels // config.patch_size * config.patch_size for pixels in made] == [*image]:
        image = made  # the convolution leaves out what is over
    if made != image:
        raise ValueError(f"it makes images of {made[0]}x{made[1]}, and the model takes {image[0]}x{image[1]}")
    if shorter and image[0] != image[1]:
        raise ValueError("it resizes the shorter edge, and tomevit does so for square images alone")

    found = {"crop_pct": _share(image, edges), "resize": "shorter" if shorter else "squash"}
    if not fields.take("do_normalize", bool, True):
        fields |= {"image_mean": 0, "image_std": 1}
    return Preprocess(**fields.read(_TRANSFORMERS_IMAGES, found, config.in_chans))


def _share(image: tuple[int, int], edges: tuple[int, int]) -> float:
    """The crop's share of the resized edges: the `crop_pct` from which these edges follow."""
    share = min(1.0, *(have / edge for have, edge in zip(image, edges, strict=True)))
    for exact in (share, math.nextafter(share, 0)):  # the division may have been rounded up
        if _edges(image, exact) == edges:
            return exact
    shown = f"it resizes to {edges[0]}x{edges[1]} before it crops {image[0]}x{image[1]}"
    raise ValueError(f"{shown}, and tomevit crops the same share of both edges")


def _edges(image: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size before the crop, as `tomevit.transform` has it."""
    return math.floor(image[0] / crop_pct), math.floor(image[1] / crop_pct)


# -------------------------------------------------------------------------------------------------------------- writing


def configs_from_card(card: Card, format: str) -> dict[str, dict[str, Any]]:  # noqa: A002 - the word that users know
    """The JSON files to put beside a model.safetensors of a format, so that its library loads the directory.

    r and proportional attention have no place in them: without merging they change nothing.

    Returns:
        Contents by file name; none for formats that have no such files.

    Raises:
        ValueError: the library has no such model, or prepares images otherwise; the message says in what.
    """
    if format in ("timm", "timm_clip", "timm_eva", "timm_eva_clip"):
        return {CONFIG: _write_timm(card)}
    if (model_type := _MODEL_TYPES.get(format)) is not None:
        family = _FAMILIES[model_type]
        return {CONFIG: _write_transformers(card, model_type, family), PREPROCESSOR: _write_processor(card)}
    return {}


#: By the format: the model_type of what it writes.
_MODEL_TYPES = {"hf_vit": "vit", "hf_deit": "deit", "hf_vit_mae": "vit_mae"}
_MODEL_TYPES |= {"hf_dinov2": "dinov2", "hf_dinov2_with_registers": "dinov2_with_registers", "hf_dinov3": "dinov3_vit"}
_MODEL_TYPES |= {f"hf_dinov2{kind}_model": f"dinov2{kind}" for kind in ("", "_with_registers")}
_MODEL_TYPES |= {"hf_clip": "clip_vision_model", "hf_siglip": "siglip_vision_model"}
_MODEL_TYPES |= {"hf_clip_model": "clip_vision_model", "hf_siglip_model": "siglip_vision_model"}
_MODEL_TYPES |= {"hf_siglip_classifier": "siglip"}


def _require(config: Config, library: str, fixed: Mapping[str, Any]) -> None:
    for name, wanted in fixed.items():
        if (value := getattr(config, name)) != wanted:
            raise ValueError(f"{library} cannot hold {name}={value!r}, only {name}={wanted!r}")


#: What timm's architectures have as they are, and no argument that is read changes.
_UNSAID_BY_TIMM = ("mlp", "mlp_norm", "attn_norm", "proj_bias", "pos_embed", "rope", "pool_heads", "pool_mlp_ratio")


def _timm_architecture(card: Card) -> str:
    """The name in timm of the card's architecture, at its size or at another."""
    if card.timm and zoo.card(card.timm).config.dist_token == card.config.dist_token:
        return card.timm
    kin = f"{card.name.partition('_')[0]}_"
    same = [found.timm for found in zoo.architectures() if found.timm and found.title == card.title]
    fits = [name for name in same if _is_of(zoo.architecture(name), card.config, kin)]
    plain = "deit_base_distilled_patch16_224" if card.config.dist_token else "vit_base_patch16_224"
    return next(iter(fits), plain)


def _write_timm(card: Card) -> dict[str, Any]:
    config = card.config
    if config.dist_token and (config.reg_tokens or not config.pos_embed_prefix):
        raise ValueError("timm's distilled models have no registers, and positions for both tokens")
    if config.pos_embed_prefix == "class" and config.reg_tokens:
        raise ValueError("timm's models with registers have no position for the class token: pos_embed_prefix='class'")
    architecture = _timm_architecture(card)
    built = _as_timm_builds(architecture, zoo.architecture(architecture))
    _require(config, "timm's config.json", {"norm_eps": built.norm_eps})
    outputs = config.num_classes or config.proj_dim
    known = vars(built) | {"pool_norm": _timm_pool_norm(built, config.pool)}
    known |= {"in_chans": config.in_chans, "num_classes": outputs}  # which are said beside the arguments
    _require(config, f"timm's {architecture}", {name: known[name] for name in _UNSAID_BY_TIMM})
    args = _write(_TIMM, vars(config) | {"num_classes": outputs}, known)
    said_by_eva = {"global_pool"} if config.rope == "pe" else {"img_size", "global_pool"}
    if config.rope and (unsaid := args.keys() - said_by_eva):
        raise ValueError(f"timm's {architecture} has no arguments for {', '.join(sorted(unsaid))}")
    said: dict[str, Any] = {"architecture": architecture, "num_classes": outputs}
    said |= {"num_features": config.embed_dim, "global_pool": config.pool}
    if card.class_names:
        said["label_names"] = list(card.class_names)
    if args:
        said["model_args"] = args
    cfg = {"custom_load": False, "input_size": [config.in_chans, *config.img_size], "fixed_input_size": True}
    cfg |= _write(_TIMM_IMAGES, vars(card.preprocess)) | {"num_classes": outputs}
    cfg |= {"first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"] if config.dist_token else "head"}
    if card.licence:
        cfg["license"] = card.licence
    if config.init == "mae":
        cfg["tag"] = "mae"  # timm has one name for MAE's and for ViT's, which attend to merged tokens otherwise
    elif card.title in ("SigLIP", "SigLIP 2"):
        cfg["tag"] = "webli" if card.title == "SigLIP" else "v2_webli"
    return said | {"pretrained_cfg": cfg}


def _write_transformers(card: Card, model_type: str, family: _Family) -> dict[str, Any]:
    config = card.config
    name = family.headed if config.num_classes or config.proj_dim else family.bare
    said_by_rows = {row.ours for row in family.rows} | ({"proj_dim"} if name in _PROJECTING else set())
    fixed = _FIXED | dict(family.fixed) | _CLASSES[name]
    _require(config, f"transformers' {model_type}", {k: v for k, v in fixed.items() if k not in said_by_rows})
    if "layer_scale" in said_by_rows and config.layer_scale is None:
        raise ValueError(f"transformers' {model_type} cannot hold layer_scale=None")
    hidden = config.mlp_hidden
    values = vars(config) | {"mlp_hidden": hidden}
    if family.rows is _DINOV2 or _REGISTERS in family.rows:
        ratios = (ratio for ratio in range(1, 65) if _dinov2_hidden(config.embed_dim, ratio, config.mlp) == hidden)
        if (ratio := next(ratios, None)) is None:
            raise ValueError(f"transformers' {model_type} has no mlp_ratio for {hidden} channels within the MLP")
        values["mlp_ratio"] = ratio
    gated = family.rows is _DINOV3 and config.mlp == "swiglu"
    written = _write(_DINOV3_GATED if gated else family.rows, values)
    said: dict[str, Any] = {"architectures": [name], "model_type": model_type}
    said |= {family.part: written | {"model_type": f"{model_type}_vision_model"}} if family.part else written
    if name in _PROJECTING:
        said |= _write([_PROJECTION], values)
    if model_type == "vit_mae":
        said["mask_ratio"] = 0.0  # else three patches in four are dropped
    if config.num_classes:
        names = card.class_names or [f"LABEL_{i}" for i in range(config.num_classes)]
        said["id2label"] = {str(i): label for i, label in enumerate(names)}
        said["label2id"] = {label: i for i, label in enumerate(names)}
    return said


def _write_processor(card: Card) -> dict[str, Any]:
    image, preprocess = card.config.img_size, card.preprocess
    squash = preprocess.resize == "squash"
    if not squash and image[0] != image[1]:
        raise ValueError(
            f"transformers cannot resize the shorter edge and crop {image[0]}x{image[1]}: "
            f"it does so for square images alone, and others take resize='squash'"
        )
    height, width = _edges(image, preprocess.crop_pct)
    crop = not squash or (height, width) != image
    # Classes that did so in transformers 4 too, where each read its own fields alone.
    kind = ("DeiT" if crop else "ViT") if squash else "Bit"
    said = {"image_processor_type": f"{kind}ImageProcessor", "do_resize": True, "do_center_crop": crop}
    said["size"] = {"height": height, "width": width} if squash else {"shortest_edge": height}
    if crop:
        said["crop_size"] = {"height": image[0], "width": image[1]}
    if card.config.in_chans == 3:
        said["do_convert_rgb"] = True
    said |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    return said | _write(_TRANSFORMERS_IMAGES, vars(preprocess))

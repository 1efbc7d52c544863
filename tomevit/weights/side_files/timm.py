"""timm's config.json (`timm/models/_hub.py`), read and written, and the `pretrained_cfg` of its models in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tomevit import zoo
from tomevit.cards import Card
from tomevit.config import ARCHITECTURE, CHOICES, Config, Preprocess
from tomevit.weights.side_files.common import PAIR, PER_CHANNEL, JsonObject, Row, check_fixed, write_rows
from tomevit.weights.side_files.names import is_same_architecture, kin_of, named_card

#: The formats of weights beside which this config.json is written.
FORMATS = ("timm", "timm_clip", "timm_eva", "timm_eva_clip")

_POOLS = {"token": "token", "avg": "avg", "": "token"}
#: The arguments of timm's VisionTransformer.
_ROWS = (
    *(Row(name, name, int) for name in ("in_chans", "num_classes", "patch_size", "embed_dim", "depth", "num_heads")),
    *(Row(name, name, bool) for name in ("qkv_bias", "qk_norm", "class_token", "pre_norm")),
    Row("img_size", "img_size", PAIR),
    Row("reg_tokens", "reg_tokens", int),
    Row("mlp_ratio", "mlp_ratio", float),
    Row("init_values", "layer_scale", float),
    Row("no_embed_class", "pos_embed_prefix", {False: True, True: False}),
    Row("act_layer", "act", {act: act for act in CHOICES["act"]}),
    Row("global_pool", "pool", _POOLS),
    Row("fc_norm", "pool_norm", {False: "before", True: "after"}),
)
_IMAGES = (
    Row("interpolation", "interpolation", {"bilinear": "bilinear", "bicubic": "bicubic"}),
    Row("crop_pct", "crop_pct", float),
    Row("crop_mode", "resize", {"center": "shorter", "squash": "squash"}),
    Row("mean", "mean", PER_CHANNEL),
    Row("std", "std", PER_CHANNEL),
)
# How a model trains and starts, where it comes from, and which sizes it takes at run time: no weights depend on these.
_IDLE = re.compile(
    r"(\w+_)?drop(_\w+)?_rate|weight_init|fix_init|dynamic_img_(size|pad)|strict_img_size|device|dtype"
    r"|pretrained|pretrained_(strict|filter_fn|custom_load)|checkpoint_path|cache_dir|scriptable|exportable|no_jit"
)
#: Arguments that are read where they have this value, as all models of ours have it.
_ONLY = {
    "pos_embed": "learn",
    "final_norm": True,
    "pool_include_prefix": False,
    "proj_bias": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "norm_layer": "layernorm",
    "features_only": False,
}
#: What timm's architectures have as they are, and no argument that is read changes.
_UNSAID = [name for name in ARCHITECTURE if name not in ("norm_eps", "proj_dim", *(row.ours for row in _ROWS))]
#: timm's SigLIP models that have the tanh form of GELU; all others have the exact one (vision_transformer.py).
_TANH = re.compile(
    r"vit_((base_patch32|so400m_patch16|giantopt_patch16)_siglip_(gap_)?\d+|large_patch16_siglip_(gap_)?512)"
)


# ------------------------------------------------------------------------------------- what an architecture's name says


def as_built(architecture: str, card: Card) -> Config:
    """The card's config, as timm has it by that name and without arguments: it differs from training, and from ours."""
    config = card.config
    if "_siglip_" in architecture:
        config = replace(config, act="gelu_tanh" if _TANH.fullmatch(architecture) else "gelu")
    elif "_clip_" in architecture:
        config = replace(config, act="quick_gelu" if "_clip_quickgelu_" in architecture else "gelu")
    if config.pos_embed_prefix == "class":
        config = replace(config, pos_embed_prefix=False)  # the class token's is added to the token
    if config.rope == "dinov3":
        config = replace(config, pool="avg", qkv_bias=architecture.endswith("_qkvb"))
    return config


def pool_norm_of(built: Config, pool: str) -> str:
    """Where an architecture that timm builds as `as_built` says has its last norm if it pools so."""
    normed_first = built.rope == "dinov3" or (built.pool, built.pool_norm) == ("avg", "before")
    if built.pool_norm == "none":
        return "none"
    return "after" if pool == "avg" and not normed_first else "before"


def kin_and_projection(architecture: str, tag: str) -> tuple[str, int]:
    """How the zoo's names of an architecture's kin begin, and the channels of its projection: 0 without one."""
    try:
        base = _find_card(architecture, tag)
    except ValueError:  # a model that is none of timm's own
        return "vit_", 0
    return _find_kin(base, architecture, tag), zoo.architecture(base.name).config.proj_dim


def _find_card(architecture: str, tag: str) -> Card:
    # timm has one name for vit_b16 and mae_cls_b16, and for SigLIP and SigLIP 2.
    for weights in (f"{architecture}.{tag}", f"timm/{architecture}.{tag}"):
        with suppress(ValueError):
            return zoo.card(weights)
    return zoo.card(architecture)


def _find_kin(base: Card, architecture: str, tag: str) -> str:
    if "_siglip_" in architecture and tag:  # timm has one name for SigLIP and SigLIP 2, and says in the tag which it is
        return "siglip2_" if tag.startswith("v2_") else "siglip_"
    return kin_of(base.name)


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(config: JsonObject) -> Card:
    """The card of the model that a config.json describes.

    Raises:
        ValueError: it is malformed, or tomevit cannot build the model; the message says where.
    """
    # Before timm 0.8 there was one level.
    cfg = config.part("pretrained_cfg") if "pretrained_cfg" in config else config
    args = config.part("model_args")
    architecture, tag = config.take("architecture", str), cfg.take("tag", str, "")
    base = _find_card(architecture, tag)
    built = as_built(architecture, base)
    args.check_names([row.theirs for row in _ROWS], _IDLE, _ONLY)
    if built.mlp == "swiglu" and "mlp_ratio" in args:
        raise args.refusal("mlp_ratio", "left out: which width it gives depends on the architecture's own rounding")

    fields = {field: getattr(built, field) for field in ARCHITECTURE} | _read_size(cfg, built)
    outputs = built.num_classes or built.proj_dim
    for source in (cfg, config, args):
        outputs = source.take("num_classes", int, outputs, "num_classes")
    # The projection is a head as well, with as many outputs as the texts' vectors have.
    projects = outputs == zoo.architecture(base.name).config.proj_dim
    fields |= {"num_classes": 0 if projects else outputs, "proj_dim": outputs if projects else 0}
    # The last says how the model was built, though timm itself builds by the others.
    pooled = next((source for source in (args, cfg) if "global_pool" in source), config)
    pools = _POOLS | {"map": "map"} if built.pool == "map" else _POOLS
    fields["pool"] = pooled.take("global_pool", pools) or built.pool
    fields["pool_norm"] = pool_norm_of(built, fields["pool"])
    fields = args.read([row for row in _ROWS if row.ours not in ("num_classes", "pool")], fields)
    return named_card(
        Config(**fields),
        _find_kin(base, architecture, tag),
        preprocess=_read_images(cfg, fields["in_chans"]),
        licence=cfg.take("license", str) or None,
        class_names=_read_labels(config if "label_names" in config else cfg, config, fields["num_classes"]),
    )


def _read_size(cfg: JsonObject, built: Config) -> dict[str, Any]:
    """Our fields of input_size."""
    stated = cfg.get("input_size", [built.in_chans, *built.img_size])
    if not isinstance(stated, list) or len(stated) != 3:
        raise cfg.refusal("input_size", "channels, height and width")
    named = JsonObject({"in_chans": stated[0], "img_size": stated[1:]}, f"{cfg.where}input_size, as ")
    in_chans, img_size = named.take("in_chans", int, built.in_chans, "in_chans"), built.img_size
    if cfg.take("fixed_input_size", bool, True):  # else the positions are the architecture's own
        img_size = named.take("img_size", PAIR, None, "img_size")
    if built.rope == "pe" and img_size != built.img_size:
        (height, width), (base, _) = img_size, built.img_size
        raise ValueError(
            f"the model takes {height}x{width}: timm scales its rotations to those of {base}x{base}, and they are "
            f"not scaled here"
        )
    return {"in_chans": in_chans, "img_size": img_size}


def _read_labels(names: JsonObject, config: JsonObject, classes: int) -> tuple[str, ...]:
    labels = names.get("label_names", names.get("labels", []))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return ()  # timm's also may be a table with gaps
    described = config.part("label_descriptions")
    texts = {label: text for label, text in described.items() if isinstance(text, str)}
    found = tuple(str(texts.get(label, label)) for label in labels)
    return found if len(found) == classes else ()


def images_of(pretrained_cfg: Mapping[str, Any], channels: int) -> Preprocess:
    """How the `pretrained_cfg` of a model in memory says that images are prepared.

    Raises:
        ValueError: in a way that `Preprocess` has no words for.
    """
    return _read_images(JsonObject.of_memory(pretrained_cfg), channels)


def _read_images(cfg: JsonObject, channels: int) -> Preprocess:
    images = Preprocess().for_channels(channels)  # timm's defaults too
    return Preprocess(**cfg.read(_IMAGES, vars(images), channels))


# -------------------------------------------------------------------------------------------------------------- writing


def write_config(card: Card) -> dict[str, Any]:
    """The content of the config.json by which timm builds the card's model.

    Raises:
        ValueError: timm has no such model; the message says in what.
    """
    config = card.config
    if config.dist_token and (config.reg_tokens or not config.pos_embed_prefix):
        raise ValueError("timm's distilled models have no registers, and positions for both tokens")
    if config.pos_embed_prefix == "class" and config.reg_tokens:
        raise ValueError("timm's models with registers have no position for the class token: pos_embed_prefix='class'")
    architecture = _find_architecture(card)
    outputs = config.num_classes or config.proj_dim
    args = _write_args(config, architecture, outputs)
    said: dict[str, Any] = {"architecture": architecture, "num_classes": outputs}
    said |= {"num_features": config.embed_dim, "global_pool": config.pool}
    if card.class_names:
        said["label_names"] = list(card.class_names)
    if args:
        said["model_args"] = args
    cfg = {"custom_load": False, "input_size": [config.in_chans, *config.img_size], "fixed_input_size": True}
    cfg |= write_rows(_IMAGES, vars(card.preprocess)) | {"num_classes": outputs}
    cfg |= {"first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"] if config.dist_token else "head"}
    if card.licence:
        cfg["license"] = card.licence
    if config.init == "mae":
        cfg["tag"] = "mae"  # timm has one name for MAE's and for ViT's, which attend to merged tokens otherwise
    elif card.title in ("SigLIP", "SigLIP 2"):
        cfg["tag"] = "webli" if card.title == "SigLIP" else "v2_webli"
    return said | {"pretrained_cfg": cfg}


def _find_architecture(card: Card) -> str:
    """The name in timm of the card's architecture, at its size or at another."""
    if card.timm and zoo.card(card.timm).config.dist_token == card.config.dist_token:
        return card.timm
    same = [found.timm for found in zoo.architectures() if found.timm and found.title == card.title]
    kin = kin_of(card.name)
    fits = [name for name in same if is_same_architecture(zoo.architecture(name), card.config, kin)]
    plain = "deit_base_distilled_patch16_224" if card.config.dist_token else "vit_base_patch16_224"
    return next(iter(fits), plain)


def _write_args(config: Config, architecture: str, outputs: int) -> dict[str, Any]:
    """The arguments in which a model differs from how timm builds its architecture."""
    built = as_built(architecture, zoo.architecture(architecture))
    check_fixed(config, "timm's config.json", {"norm_eps": built.norm_eps})
    check_fixed(config, f"timm's {architecture}", {name: getattr(built, name) for name in _UNSAID})
    known = vars(built) | {"pool_norm": pool_norm_of(built, config.pool)}
    known |= {"in_chans": config.in_chans, "num_classes": outputs}  # which are said beside the arguments
    args = write_rows(_ROWS, vars(config) | {"num_classes": outputs}, known)
    if config.rope:
        said_by_eva = {"global_pool"} if config.rope == "pe" else {"img_size", "global_pool"}
        if unsaid := args.keys() - said_by_eva:
            raise ValueError(f"timm's {architecture} has no arguments for {', '.join(sorted(unsaid))}")
    return args

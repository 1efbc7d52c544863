"""The small files that lie beside a checkpoint and describe it, as timm and transformers write and read them.

timm (`timm/models/_hub.py`) has config.json: an architecture's name, arguments that differ, the images' preparation.
transformers (`models/vit`, `models/deit`, `models/vit_mae`) has config.json for the architecture, in numbers, and
preprocessor_config.json for the images. The licence is often in README.md alone, the model card.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tomevit import zoo
from tomevit.config import ARCHITECTURE, CHOICES, Card, Config, Preprocess
from tomevit.errors import CheckpointError

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
README = "README.md"
SIDECARS = (CONFIG, PREPROCESSOR, README)

MOST_BYTES = 2**24  # the largest config.json of google's repositories, with 21843 class names, has 1.1 MB
MOST_CHARACTERS = 256  # of a name
#: No file says more than this of a model that anyone could run.
MOST = {"patch_size": 2**12, "in_chans": 2**12, "embed_dim": 2**16, "depth": 2**10, "num_heads": 2**12}
MOST |= {"num_classes": 2**24, "reg_tokens": 2**12, "pixels": 2**14, "mlp_hidden": 2**20}

# -------------------------------------------------------------------------------------------------------------- reading


def read_sidecars(files: Mapping[str, Path]) -> Card | None:
    """The card that a repository's JSON files describe.

    The card says what the files say, and no more: a fine-tuned model's config.json still has the tag of the weights it
    began with, so figures, sources, r and tag stay empty. Its name is the zoo's for the same architecture, where there
    is one.

    Args:
        files: paths by their names in the repository, of `SIDECARS`.

    Returns:
        None: there is no config.json, or it is neither timm's nor transformers'.

    Raises:
        CheckpointError: a file is malformed, or describes what tomevit cannot build; the message says where.
    """
    if CONFIG not in files:
        return None
    config = _Fields.of(files[CONFIG])
    processor = _Fields.of(files[PREPROCESSOR]) if PREPROCESSOR in files else _Fields({}, PREPROCESSOR)
    card = None
    if "architecture" in config:
        card = _read_timm(config)
    elif "model_type" in config:
        card = _read_transformers(config, processor)
    if card is not None and card.licence is None and README in files:
        return replace(card, licence=_read_licence(files[README]))
    return card


def _read_licence(readme: Path) -> str | None:
    """The licence in a model card's metadata, where it states one."""
    with readme.open("rb") as file:
        found = re.match(rb"---\s*\n(.*?)\n---", file.read(MOST_BYTES), re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):  # it is written for people, and may be anything
        return None
    licence = metadata.get("license_name", metadata.get("license")) if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) else None


class _Fields(dict[str, Any]):
    """A JSON object of which nothing is trusted: null counts as missing, and each value is asked for by its type."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.where = where

    @classmethod
    def of(cls, path: Path) -> _Fields:
        where = os.fspath(path)
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{where} has {path.stat().st_size} bytes, and is no description of a model")
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} holds {reprlib.repr(values)}, and should hold an object")
        return cls(values, where)

    def refuse(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} is {reprlib.repr(self[name])}, and must be {wanted}")

    def integer(self, name: str, default: int, most: int, least: int = 1) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(name, f"an int from {least} to {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**16:
            raise self.refuse(name, "a number from 0 to 65536")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or len(value) > MOST_CHARACTERS:
            raise self.refuse(name, f"a text of at most {MOST_CHARACTERS} characters")
        return value

    def choice(self, name: str, default: Any, choices: Mapping[Any, Any]) -> Any:
        value = self.get(name, default)
        if isinstance(value, dict | list) or value not in choices:
            raise self.refuse(name, f"one of {', '.join(map(str, choices))}")
        return choices[value]

    def table(self, name: str) -> _Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return _Fields(value, f"{self.where}, {name}")

    def statistics(self, name: str, default: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
        """One number per channel; one number stands for all."""
        value = self.get(name, default)
        values = list(value) if isinstance(value, list | tuple) else [value] * channels
        if len(values) != channels or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 2**16 for x in values
        ):
            raise CheckpointError(
                f"{self.where}: {name} is {reprlib.repr(value)}, and must be numbers for {channels} channels"
            )
        return tuple(map(float, values))

    def pair(self, name: str, default: tuple[int, int], most: int) -> tuple[int, int]:
        """An int for height and width, or both: as a list, or by name."""
        value = self.get(name, default)
        if isinstance(value, dict):
            value = [value.get("height"), value.get("width")]
        height, width = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
        for pixels in (height, width):
            if not isinstance(pixels, int) or isinstance(pixels, bool) or not 1 <= pixels <= most:
                raise self.refuse(name, f"one or two ints from 1 to {most}")
        return height, width


# Architectures differ in no other field from models of one name: these have each user's own values.
_OPEN = ("img_size", "in_chans", "num_classes", "norm_eps")


def _card(where: str, fields: dict[str, Any], kin: str, preprocess: Preprocess, **rest: Any) -> Card:
    """A card with the zoo's name for the architecture; of several, one that begins as `kin` does."""
    try:
        config = Config(**fields)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    same = [
        card
        for card in map(zoo.card, zoo.list_models())
        if all(getattr(card.config, f) == getattr(config, f) for f in ARCHITECTURE if f not in _OPEN)
    ]
    if not same:
        family = "deit_distilled" if config.dist_token else "vit"
        name = f"{family}_{config.embed_dim}x{config.depth}_p{config.patch_size}"
        return Card(name=name, title="Vision Transformer", config=config, preprocess=preprocess, **rest)
    near = min(same, key=lambda card: (not card.name.startswith(kin), card.config.img_size != config.img_size))
    config = replace(config, prop_attn=near.config.prop_attn, init=near.config.init)
    return Card(
        name=near.name,
        timm=near.timm,
        title=near.title,
        papers=near.papers,
        config=config,
        preprocess=preprocess,
        **rest,
    )


def _check_crop_pct(share: float, where: str) -> float:
    if not 0 < share <= 1:
        raise CheckpointError(f"{where}: crop_pct is {share}, and must be a share above 0, up to 1")
    return share


# ----------------------------------------------------------------------------------------------------------------- timm

_TIMM_INTEGERS = ("patch_size", "embed_dim", "depth", "num_heads", "reg_tokens")
_TIMM_FLAGS = {"qkv_bias": True, "qk_norm": False, "class_token": True, "pre_norm": False}
_TIMM_READ = {
    *(*_TIMM_INTEGERS, *_TIMM_FLAGS),
    *("img_size", "in_chans", "num_classes", "mlp_ratio", "init_values", "no_embed_class", "act_layer"),
    *("global_pool", "fc_norm"),
}
# How a model trains and starts, and which sizes it takes at run time: no weights depend on these.
_TIMM_IDLE = re.compile(r"(\w+_)?drop_rate|weight_init|fix_init|dynamic_img_(size|pad)|strict_img_size|device|dtype")
_TIMM_ONLY = {"pos_embed": "learn", "final_norm": True, "pool_include_prefix": False}


def _read_timm(config: _Fields) -> Card:
    # Before timm 0.8 there was one level.
    cfg = config.table("pretrained_cfg") if "pretrained_cfg" in config else config
    args = config.table("model_args")
    base = _timm_architecture(config.text("architecture", ""), cfg.text("tag", ""), config.where)

    for name, value in args.items():
        if name in _TIMM_ONLY and value == _TIMM_ONLY[name]:
            continue
        if name not in _TIMM_READ and not _TIMM_IDLE.fullmatch(name):
            raise CheckpointError(
                f"{args.where}: tomevit has nothing like {name[:MOST_CHARACTERS]}={reprlib.repr(value)}"
            )

    fields: dict[str, Any] = {field: getattr(base.config, field) for field in ARCHITECTURE}
    channels, height, width = _timm_input(cfg, base.config)
    fields["in_chans"] = args.integer("in_chans", channels, MOST["in_chans"])
    fields["img_size"] = args.pair("img_size", (height, width), MOST["pixels"])
    classes = cfg.integer("num_classes", fields["num_classes"], MOST["num_classes"], 0)
    classes = config.integer("num_classes", classes, MOST["num_classes"], 0)
    fields["num_classes"] = args.integer("num_classes", classes, MOST["num_classes"], 0)
    for name in _TIMM_INTEGERS:
        fields[name] = args.integer(name, fields[name], MOST[name], 0 if name == "reg_tokens" else 1)
    for name in _TIMM_FLAGS:
        fields[name] = args.flag(name, fields[name])
    fields["mlp_ratio"] = args.number("mlp_ratio", fields["mlp_ratio"])
    if "init_values" in args:
        fields["layer_scale"] = args.number("init_values", 0.0)
    fields["pos_embed_prefix"] = not args.flag("no_embed_class", not fields["pos_embed_prefix"])
    fields["act"] = args.choice("act_layer", fields["act"], {act: act for act in CHOICES["act"]})
    pools = {"token": "token", "avg": "avg", "": "token"}
    # The last says how the model was built, though timm itself builds by the others.
    fields["pool"] = next(
        (source.choice("global_pool", None, pools) for source in (args, cfg, config) if "global_pool" in source),
        fields["pool"],
    )
    fields["pool_norm"] = "after" if args.flag("fc_norm", fields["pool"] == "avg") else "before"

    channels = fields["in_chans"]
    imagenet = Preprocess()  # timm's defaults too
    preprocess = Preprocess(
        mean=cfg.statistics("mean", imagenet.mean if channels == 3 else 0.5, channels),
        std=_positive(cfg, "std", imagenet.std if channels == 3 else 0.5, channels),
        interpolation=cfg.choice("interpolation", "bicubic", {"bilinear": "bilinear", "bicubic": "bicubic"}),
        crop_pct=_check_crop_pct(cfg.number("crop_pct", imagenet.crop_pct), cfg.where),
        resize=cfg.choice("crop_mode", "center", {"center": "shorter", "squash": "squash"}),
    )
    return _card(
        config.where,
        fields,
        base.name,
        preprocess,
        licence=cfg.text("license", "") or None,
        class_names=_timm_labels(config if "label_names" in config else cfg, config, fields["num_classes"]),
    )


def _timm_architecture(name: str, tag: str, where: str) -> Card:
    try:
        return zoo.card(f"{name}.{tag}")  # timm has one name for vit_b16 and mae_cls_b16
    except ValueError:
        pass
    try:
        return zoo.card(name)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _timm_input(cfg: _Fields, config: Config) -> tuple[int, int, int]:
    """Channels, height and width of the images that the positions stand for."""
    size = cfg.get("input_size", [config.in_chans, *config.img_size])
    if not isinstance(size, list) or len(size) != 3:
        raise cfg.refuse("input_size", "channels, height and width")
    three = _Fields({"channels": size[0], "pixels": size[1:]}, f"{cfg.where}, input_size")
    channels = three.integer("channels", 3, MOST["in_chans"])
    pixels = three.pair("pixels", config.img_size, MOST["pixels"])
    return channels, *(pixels if cfg.flag("fixed_input_size", True) else config.img_size)


def _timm_labels(names: _Fields, config: _Fields, classes: int) -> tuple[str, ...]:
    labels = names.get("label_names", names.get("labels", []))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return ()  # timm's also may be a table with gaps
    described = config.table("label_descriptions")
    found = tuple(str(described.get(label, label)) for label in labels)
    return found if len(found) == classes else ()


def _positive(fields: _Fields, name: str, default: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = fields.statistics(name, default, channels)
    if min(values) <= 0:
        raise fields.refuse(name, "above 0")
    return values


# --------------------------------------------------------------------------------------------------------- transformers


class _Head(NamedTuple):
    """What stands on a model of transformers, by the name of its class."""

    model_type: str
    classes: bool
    fields: Mapping[str, Any] = {}


_DISTILLED = {"dist_token": True}
_HEADS = {
    "ViTForImageClassification": _Head("vit", True),
    "ViTModel": _Head("vit", False),
    "ViTForMaskedImageModeling": _Head("vit", False),
    "DeiTForImageClassificationWithTeacher": _Head("deit", True, _DISTILLED),
    # Its one head reads the class token alone: to it, the distillation token is a register.
    "DeiTForImageClassification": _Head("deit", True, {"reg_tokens": 1}),
    "DeiTModel": _Head("deit", False, _DISTILLED),
    "DeiTForMaskedImageModeling": _Head("deit", False, _DISTILLED),
    "ViTMAEForPreTraining": _Head("vit_mae", False),
    "ViTMAEModel": _Head("vit_mae", False),
}
_KIN = {"vit": "vit_", "deit": "deit_distilled_", "vit_mae": "mae_cls_"}
_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_ACTS_OUT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}


def _read_transformers(config: _Fields, processor: _Fields) -> Card:
    model_type = config.choice("model_type", None, {name: name for name in _KIN})
    head = _read_head(config, model_type)
    dim = config.integer("hidden_size", 768, MOST["embed_dim"])
    hidden = config.integer("intermediate_size", 3072, MOST["mlp_hidden"])
    patch = config.pair("patch_size", (16, 16), MOST["patch_size"])
    if patch[0] != patch[1]:
        raise config.refuse("patch_size", "the same along height and width")
    labels = _read_labels(config) if head.classes else ()
    fields = {
        "img_size": config.pair("image_size", (224, 224), MOST["pixels"]),
        "patch_size": patch[0],
        "in_chans": config.integer("num_channels", 3, MOST["in_chans"]),
        "num_classes": len(labels),
        "embed_dim": dim,
        "depth": config.integer("num_hidden_layers", 12, MOST["depth"]),
        "num_heads": config.integer("num_attention_heads", 12, MOST["num_heads"]),
        "mlp_ratio": _mlp_ratio(dim, hidden),
        "act": config.choice("hidden_act", "gelu", _ACTS),
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "qkv_bias": config.flag("qkv_bias", True),
        **head.fields,
    }
    generic = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    preprocess = _read_processor(processor, model_type, fields["img_size"], fields["in_chans"])
    return _card(config.where, fields, _KIN[model_type], preprocess, class_names=() if generic else labels)


def _read_head(config: _Fields, model_type: str) -> _Head:
    named = config.get("architectures")
    if not named:
        heads = [head for head in _HEADS.values() if head.model_type == model_type]
        labelled = "id2label" in config or "num_labels" in config
        return next((head for head in heads if head.classes == labelled), heads[0])
    # Not only the model_type's own: users' encoders of ViTMAE are called ViTModel too.
    if not isinstance(named, list) or not isinstance(named[0], str) or named[0] not in _HEADS:
        raise config.refuse("architectures", f"one of {', '.join(_HEADS)}")
    return _HEADS[named[0]]


def _read_labels(config: _Fields) -> tuple[str, ...]:
    """One name per class; LABEL_0 and so on where there are none, as transformers has it."""
    if "id2label" not in config:
        return tuple(f"LABEL_{i}" for i in range(config.integer("num_labels", 2, MOST["num_classes"], 0)))
    labels = config.table("id2label")
    try:
        return tuple(str(labels[str(i)]) for i in range(len(labels)))
    except KeyError as error:
        raise CheckpointError(f"{labels.where}: of {len(labels)} classes number {error} has no name") from None


def _mlp_ratio(dim: int, hidden: int) -> float:
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


class _Processor(NamedTuple):
    """What a class of transformers' does where preprocessor_config.json is silent."""

    mean: tuple[float, ...] | float
    std: tuple[float, ...] | float
    resample: int
    square: bool  # one number as size means both edges, or the shorter
    crop: bool
    edge: float = 1.0  # the size after the resize, relative to the crop


_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PROCESSORS = {
    "ViT": _Processor(0.5, 0.5, 2, square=True, crop=False),
    "DeiT": _Processor(0.5, 0.5, 3, square=True, crop=True, edge=256 / 224),
    "Bit": _Processor(_CLIP_MEAN, _CLIP_STD, 3, square=False, crop=True),
    "CLIP": _Processor(_CLIP_MEAN, _CLIP_STD, 3, square=False, crop=True),
}
_PROCESSOR_NAME = re.compile(rf"({'|'.join(_PROCESSORS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


def _read_processor(fields: _Fields, model_type: str, image: tuple[int, int], channels: int) -> Preprocess:
    # do_resize and do_rescale say who does it, the caller or the processor, and not that nobody does.
    unstated = "DeiTImageProcessor" if model_type == "deit" else "ViTImageProcessor"
    key = "image_processor_type" if "image_processor_type" in fields else "feature_extractor_type"
    match = _PROCESSOR_NAME.fullmatch(fields.text(key, unstated))
    if match is None:
        raise fields.refuse(key, f"an image processor of {', '.join(_PROCESSORS)}")
    default = _PROCESSORS[match[1]]

    normalise = fields.flag("do_normalize", True)
    mean = fields.statistics("image_mean", default.mean, channels) if normalise else (0.0,) * channels
    std = _positive(fields, "image_std", default.std, channels) if normalise else (1.0,) * channels
    interpolation = fields.choice("resample", default.resample, {2: "bilinear", 3: "bicubic"})

    size = fields.get("size")
    square = "shortest_edge" not in size if isinstance(size, dict) else default.square
    if size is None:
        edges = round(default.edge * image[0]), round(default.edge * image[1])
    elif square:
        edges = fields.pair("size", image, MOST["pixels"])
    else:
        shorter = fields.table("size") if isinstance(size, dict) else _Fields({"shortest_edge": size}, fields.where)
        edges = shorter.pair("shortest_edge", image, MOST["pixels"])
    made = fields.pair("crop_size", image, MOST["pixels"]) if fields.flag("do_center_crop", default.crop) else edges
    if made != image:
        raise CheckpointError(
            f"{fields.where} makes images of {made[0]}x{made[1]}, and the model takes {image[0]}x{image[1]}"
        )
    if not square and image[0] != image[1]:
        raise CheckpointError(f"{fields.where}: tomevit resizes the shorter edge for square images alone")
    return Preprocess(
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=_share(image, edges, fields.where),
        resize="squash" if square else "shorter",
    )


def _share(image: tuple[int, int], edges: tuple[int, int], where: str) -> float:
    """The crop's share of the resized edges: the `crop_pct` from which these edges follow."""
    share = min(1.0, *(have / edge for have, edge in zip(image, edges, strict=True)))
    if _edges(image, share) != edges:
        share = math.nextafter(share, 0)  # the division was rounded up
    if _edges(image, share) != edges:
        raise CheckpointError(
            f"{where} resizes to {edges[0]}x{edges[1]} before it crops {image[0]}x{image[1]}, "
            f"and tomevit crops the same share of both edges"
        )
    return share


def _edges(image: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size before the crop, as `tomevit.transform` has it."""
    return math.floor(image[0] / crop_pct), math.floor(image[1] / crop_pct)


# -------------------------------------------------------------------------------------------------------------- writing


def write_sidecars(card: Card, format: str) -> dict[str, dict[str, Any]]:  # noqa: A002 - the word that users know
    """The JSON files to put beside a model.safetensors of a format, so that its library loads the directory.

    r and proportional attention have no place in them: without merging they change nothing.

    Returns:
        Contents by file name; none for formats that have no such files.

    Raises:
        ValueError: the library has no such model, or prepares images otherwise; the message says in what.
    """
    if format == "timm":
        return {CONFIG: _write_timm(card)}
    if format in _WRITTEN:
        return {CONFIG: _write_transformers(card, format), PREPROCESSOR: _write_processor(card)}
    return {}


def _refuse(library: str, name: str, value: object, wanted: object) -> ValueError:
    return ValueError(f"{library} cannot hold {name}={value!r}, only {name}={wanted!r}")


def _write_timm(card: Card) -> dict[str, Any]:
    config, preprocess = card.config, card.preprocess
    if config.norm_eps != 1e-6:
        raise _refuse("timm's config.json", "norm_eps", config.norm_eps, 1e-6)
    if config.dist_token and (config.reg_tokens or not config.pos_embed_prefix):
        raise ValueError("timm's distilled models have no registers, and positions for both tokens")
    architecture = card.timm or ""
    if not architecture or zoo.card(architecture).config.dist_token != config.dist_token:
        architecture = "deit_base_distilled_patch16_224" if config.dist_token else "vit_base_patch16_224"
    base = zoo.card(architecture).config

    args: dict[str, Any] = {
        name: getattr(config, name)
        for name in (*_TIMM_INTEGERS, *_TIMM_FLAGS, "mlp_ratio")
        if getattr(config, name) != getattr(base, name)
    }
    if config.img_size != base.img_size:
        args["img_size"] = list(config.img_size)
    if config.layer_scale != base.layer_scale:
        args["init_values"] = config.layer_scale
    if config.pos_embed_prefix != base.pos_embed_prefix:
        args["no_embed_class"] = not config.pos_embed_prefix
    if config.act != base.act:
        args["act_layer"] = config.act
    if config.pool != base.pool:
        args["global_pool"] = config.pool
    if (config.pool_norm == "after") != (config.pool == "avg"):
        args["fc_norm"] = config.pool_norm == "after"
    return {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.pool,
        **({"label_names": list(card.class_names)} if card.class_names else {}),
        **({"model_args": args} if args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.in_chans, *config.img_size],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": {"shorter": "center", "squash": "squash"}[preprocess.resize],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.dist_token else "head",
            **({"license": card.licence} if card.licence else {}),
        },
    }


class _Written(NamedTuple):
    """A format of transformers': its model_type, and its classes with and without a head."""

    model_type: str
    headed: str | None
    bare: str


_WRITTEN = {
    "hf_vit": _Written("vit", "ViTForImageClassification", "ViTModel"),
    "hf_deit": _Written("deit", "DeiTForImageClassificationWithTeacher", "DeiTModel"),
    "hf_vit_mae": _Written("vit_mae", None, "ViTMAEModel"),
}
_FIXED = {
    "pool": "token",
    "pool_norm": "before",
    "class_token": True,
    "reg_tokens": 0,
    "pos_embed_prefix": True,
    "qk_norm": False,
    "layer_scale": None,
    "pre_norm": False,
}


def _write_transformers(card: Card, name: str) -> dict[str, Any]:
    config, written = card.config, _WRITTEN[name]
    fixed = _FIXED | {"dist_token": written.model_type == "deit"} | ({} if written.headed else {"num_classes": 0})
    for field, wanted in fixed.items():
        if getattr(config, field) != wanted:
            raise _refuse(f"transformers' {written.model_type}", field, getattr(config, field), wanted)
    names = card.class_names or [f"LABEL_{i}" for i in range(config.num_classes)]
    height, width = config.img_size
    return {
        "architectures": [written.headed if config.num_classes else written.bare],
        "model_type": written.model_type,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "hidden_act": _ACTS_OUT[config.act],
        "layer_norm_eps": config.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        **({"mask_ratio": 0.0} if written.model_type == "vit_mae" else {}),  # else three patches in four are dropped
        **(
            {
                "id2label": {str(i): label for i, label in enumerate(names)},
                "label2id": {label: i for i, label in enumerate(names)},
            }
            if config.num_classes
            else {}
        ),
    }


def _write_processor(card: Card) -> dict[str, Any]:
    image, preprocess = card.config.img_size, card.preprocess
    if preprocess.resize == "shorter" and image[0] != image[1]:
        raise ValueError(
            f"transformers cannot resize the shorter edge and crop {image[0]}x{image[1]}: "
            f"it does so for square images alone, and others take resize='squash'"
        )
    height, width = _edges(image, preprocess.crop_pct)
    squash = preprocess.resize == "squash"
    crop = not squash or (height, width) != image
    # Classes that did so in transformers 4 too, where each read its own fields alone.
    kind = ("DeiT" if crop else "ViT") if squash else "Bit"
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_center_crop": crop,
        **({"crop_size": {"height": image[0], "width": image[1]}} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        **({"do_convert_rgb": True} if card.config.in_chans == 3 else {}),
    }

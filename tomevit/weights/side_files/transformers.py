"""transformers' config.json and preprocessor_config.json (`models/vit`, `models/dinov2`, `models/clip` and so on), read
and written, and the configs of its models in memory.

A new model_type is one more entry of `FAMILIES`, and its classes in `_CLASSES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tomevit.cards import Card
from tomevit.config import ARCHITECTURE, Config, Preprocess
from tomevit.typed import parse_json
from tomevit.weights.side_files.common import (
    OPENAI_MEAN,
    OPENAI_STD,
    PAIR,
    PER_CHANNEL,
    JsonObject,
    Row,
    check_fixed,
    check_unchanged,
    mlp_ratio_for,
    write_rows,
)
from tomevit.weights.side_files.names import named_card

# --------------------------------------------------------------------------------------------------------------- tables

_ACTS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def _rows(
    mlp: Row, *own: Row, eps: float, patch: int, act: str = "gelu", width: int = 768, heads: int = 12
) -> tuple[Row, ...]:
    """The rows that all have, with what a silent file means, and those that a model_type has of its own."""
    return (
        Row("hidden_size", "embed_dim", int, width),
        Row("num_hidden_layers", "depth", int, 12),
        Row("num_attention_heads", "num_heads", int, heads),
        Row("image_size", "img_size", PAIR, 224),
        Row("num_channels", "in_chans", int, 3),
        mlp,
        Row("hidden_act", "act", _ACTS, act),
        Row("layer_norm_eps", "norm_eps", float, eps),
        Row("patch_size", "patch_size", PAIR, patch),
        *own,
    )


_HIDDEN = Row("intermediate_size", "mlp_hidden", int, 3072)
_QKV_BIAS = Row("qkv_bias", "qkv_bias", bool, True)
_LAYER_SCALE = Row("layerscale_value", "layer_scale", float, 1.0)
_REGISTERS = Row("num_register_tokens", "reg_tokens", int, 0)
_VIT = _rows(_HIDDEN, _QKV_BIAS, eps=1e-12, patch=16)
_CLIP = _rows(_HIDDEN, eps=1e-5, patch=32, act="quick_gelu")
_MAP_OR_MEAN = Row("vision_use_head", "pool", {True: "map", False: "avg"}, True)
_SIGLIP = _rows(_HIDDEN, _MAP_OR_MEAN, eps=1e-6, patch=16, act="gelu_pytorch_tanh")
_DINOV2_OWN = (
    Row("mlp_ratio", "mlp_ratio", float, 4),
    _QKV_BIAS,
    _LAYER_SCALE,
    Row("use_swiglu_ffn", "mlp", {False: "mlp", True: "swiglu"}, False),
)
_DINOV3_OWN = (
    _HIDDEN._replace(default=1536),
    _LAYER_SCALE,
    Row("use_gated_mlp", "mlp", {False: "mlp", True: "swiglu"}, False),
    _REGISTERS,
)


class _Family(NamedTuple):
    """The models of one model_type.

    Attributes:
        kin: how the names of such models begin in the zoo.
        headed, bare: the usual classes with a classifier and without.
        processor: its usual image processor.
        rows: of its config.json.
        fixed: what such models have otherwise than `Config` has it.
        formats: of weights, beside which a config.json of this model_type is written.
        part: the object in config.json that has the rows; "": the whole.
        only: fields that have this value in every model that can be read.
        gate: what hidden_act may be of a gated MLP, where it is that of the gate: a SiLU here.
        any_size: whether models take images of another size than that of their positions.
        cuts_rest: whether models take images that do not divide into patches, and leave out what is over.
    """

    kin: str
    headed: str
    bare: str
    processor: str
    rows: tuple[Row, ...] = _VIT
    fixed: Mapping[str, Any] = {}
    formats: tuple[str, ...] = ()
    part: str = ""
    only: Mapping[str, Any] = {}
    gate: Mapping[str, str] = {}
    any_size: bool = False
    cuts_rest: bool = False


FAMILIES = {
    "vit": _Family(
        kin="vit_",
        headed="ViTForImageClassification",
        bare="ViTModel",
        processor="ViT",
        formats=("hf_vit",),
    ),
    "deit": _Family(
        kin="deit_distilled_",
        headed="DeiTForImageClassificationWithTeacher",
        bare="DeiTModel",
        processor="DeiT",
        formats=("hf_deit",),
    ),
    "vit_mae": _Family(
        kin="mae_cls_",
        headed="ViTMAEModel",
        bare="ViTMAEModel",
        processor="ViT",
        formats=("hf_vit_mae",),
    ),
    "dinov2": _Family(
        kin="dinov2_",
        headed="Dinov2ForImageClassification",
        bare="Dinov2Model",
        processor="Bit",
        rows=_rows(*_DINOV2_OWN, eps=1e-6, patch=14),
        fixed={"layer_scale": 1.0},
        formats=("hf_dinov2", "hf_dinov2_model"),
        any_size=True,
    ),
    "dinov2_with_registers": _Family(
        kin="dinov2_",
        headed="Dinov2WithRegistersForImageClassification",
        bare="Dinov2WithRegistersModel",
        processor="Bit",
        rows=_rows(*_DINOV2_OWN, _REGISTERS._replace(default=4), eps=1e-6, patch=16),
        fixed={"layer_scale": 1.0, "pos_embed_prefix": "class"},
        formats=("hf_dinov2_with_registers", "hf_dinov2_with_registers_model"),
        any_size=True,
    ),
    "dinov3_vit": _Family(
        kin="dinov3_",
        headed="DINOv3ViTModel",
        bare="DINOv3ViTModel",
        processor="DINOv3ViT",
        rows=_rows(*_DINOV3_OWN, eps=1e-5, patch=16, width=384, heads=6),
        fixed={"layer_scale": 1.0, "pos_embed": "none", "rope": "dinov3", "qkv_bias": False},
        formats=("hf_dinov3",),
        only={"rope_theta": 100.0, "proj_bias": True, "mlp_bias": True, "key_bias": False},
        gate={"silu": "gelu"},
        any_size=True,
    ),
    "clip": _Family(
        kin="clip_",
        headed="CLIPModel",
        bare="CLIPModel",
        processor="CLIP",
        rows=_CLIP,
        fixed={"pre_norm": True},
        part="vision_config",
    ),
    "clip_vision_model": _Family(
        kin="clip_",
        headed="CLIPVisionModelWithProjection",
        bare="CLIPVisionModel",
        processor="CLIP",
        rows=_CLIP,
        fixed={"pre_norm": True},
        formats=("hf_clip", "hf_clip_model"),
    ),
    "siglip": _Family(
        kin="siglip_",
        headed="SiglipForImageClassification",
        bare="SiglipModel",
        processor="Siglip",
        rows=_SIGLIP,
        fixed={"class_token": False},
        formats=("hf_siglip_classifier",),
        part="vision_config",
        cuts_rest=True,
    ),
    "siglip_vision_model": _Family(
        kin="siglip_",
        headed="SiglipVisionModel",
        bare="SiglipVisionModel",
        processor="Siglip",
        rows=_SIGLIP,
        fixed={"class_token": False},
        formats=("hf_siglip", "hf_siglip_model"),
        cuts_rest=True,
    ),
}
#: By the format of the weights beside it: the model_type of what is written.
FORMATS = {name: model_type for model_type, family in FAMILIES.items() for name in family.formats}

_HEADLESS = {"num_classes": 0}
#: transformers' classes, and what each has otherwise than its model_type.
_CLASSES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {},
    "ViTModel": _HEADLESS,
    "ViTForMaskedImageModeling": _HEADLESS,
    "DeiTForImageClassificationWithTeacher": {"dist_token": True},
    # Its one head reads the class token alone: to it, the distillation token is a register.
    "DeiTForImageClassification": {"reg_tokens": 1},
    "DeiTModel": {"dist_token": True} | _HEADLESS,
    "DeiTForMaskedImageModeling": {"dist_token": True} | _HEADLESS,
    "ViTMAEModel": _HEADLESS,
    "ViTMAEForPreTraining": _HEADLESS,
    "Dinov2ForImageClassification": {"pool": "token_avg"},
    "Dinov2Model": _HEADLESS,
    "Dinov2WithRegistersForImageClassification": {"pool": "token_avg"},
    "Dinov2WithRegistersModel": _HEADLESS,
    "DINOv3ViTModel": _HEADLESS,
    "CLIPModel": _HEADLESS,
    "CLIPVisionModelWithProjection": _HEADLESS,
    "CLIPVisionModel": _HEADLESS,
    "SiglipModel": _HEADLESS,
    "SiglipVisionModel": _HEADLESS,
    "SiglipForImageClassification": {"pool": "avg"},
}
_PROJECTING = ("CLIPModel", "CLIPVisionModelWithProjection")
_PROJECTION = Row("projection_dim", "proj_dim", int, 512)  # beside vision_config
_MANY_TEXTS = 2**17  # words that SigLIP 2 tells apart at least, and most of SigLIP do not: it has 256000

_IMAGES = (
    Row("resample", "interpolation", {2: "bilinear", 3: "bicubic"}),
    Row("image_mean", "mean", PER_CHANNEL),
    Row("image_std", "std", PER_CHANNEL),
)


class _Processor(NamedTuple):
    """An image processor.

    Attributes:
        defaults: what it does where preprocessor_config.json is silent.
        shorter: whether one number as size means the shorter edge; else it means both.
        margin: the usual size, by that of the crop.
    """

    defaults: Mapping[str, Any]
    shorter: bool = False
    margin: float = 1


_HALF = {"image_mean": 0.5, "image_std": 0.5}
_OPENAI = {"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_PROCESSORS = {
    "ViT": _Processor({**_HALF, "resample": 2, "do_center_crop": False}),
    "DeiT": _Processor({**_HALF, "resample": 3, "do_center_crop": True}, margin=256 / 224),
    "Bit": _Processor({**_OPENAI, "resample": 3, "do_center_crop": True}, shorter=True),
    "CLIP": _Processor({**_OPENAI, "resample": 3, "do_center_crop": True}, shorter=True),
    "Siglip": _Processor({**_HALF, "resample": 3, "do_center_crop": False}),
    "DINOv3ViT": _Processor({**_IMAGENET, "resample": 2, "do_center_crop": False}),
}
_PROCESSOR_NAME = re.compile(rf"({'|'.join(_PROCESSORS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


def _dinov2_hidden(dim: int, ratio: float, mlp: str) -> int:
    """The width of DINOv2's MLP: the gated one has two thirds of it, in eights (`Dinov2SwiGLUFFN` there)."""
    hidden = int(dim * ratio)
    return hidden if mlp == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8


def _rows_of(family: _Family, *, gated: bool) -> tuple[Row, ...]:
    """The rows of a model whose MLP is gated or not."""
    if not (gated and family.gate):
        return family.rows
    return tuple(row._replace(kind=family.gate) if row.ours == "act" else row for row in family.rows)


# ---------------------------------------------------------------------------------------------------------- config.json


def read_config(config: JsonObject) -> Card:
    """The card of the model that a config.json describes; it says nothing of images.

    Raises:
        ValueError: it is malformed, or tomevit cannot build the model; the message says where.
    """
    family = config.take("model_type", FAMILIES)
    labelled = "id2label" in config or "num_labels" in config
    classes = config.get("architectures") or [family.headed if labelled else family.bare]
    # Not only the model_type's own: users' encoders of ViTMAE are called ViTModel too.
    if not isinstance(classes, list) or not isinstance(classes[0], str) or classes[0] not in _CLASSES:
        raise config.refusal("architectures", f"a list of one of {', '.join(_CLASSES)}")
    part = config.part(family.part) if family.part else config
    for name, value in family.only.items():
        if part.get(name, value) != value:
            raise part.refusal(name, f"{value}: tomevit has nothing like it")
    fixed = _CLASSES[classes[0]]
    labels = () if "num_classes" in {**family.fixed, **fixed} else _read_labels(config)
    rows = _rows_of(family, gated=bool(family.gate) and part.take("use_gated_mlp", bool, False))
    fields = part.read(rows, {"num_classes": len(labels), **family.fixed}) | fixed
    if classes[0] in _PROJECTING:
        fields = config.read([_PROJECTION], fields)
    patch, width = fields["patch_size"]
    if patch != width:
        raise part.refusal("patch_size", "the same along height and width")
    fields["patch_size"] = patch
    if "mlp_hidden" not in fields:
        fields["mlp_hidden"] = _dinov2_hidden(fields["embed_dim"], fields["mlp_ratio"], fields["mlp"])
    fields["mlp_ratio"] = mlp_ratio_for(fields["embed_dim"], fields.pop("mlp_hidden"))
    if family.cuts_rest:
        fields["img_size"] = tuple(max(patch, _cut(pixels, patch)) for pixels in fields["img_size"])
    kin = family.kin
    if kin == "siglip_" and config.part("text_config").take("vocab_size", int, 0, "num_classes") >= _MANY_TEXTS:
        kin = "siglip2_"
    generic = all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    return named_card(Config(**fields), kin, class_names=() if generic else labels)


def _cut(pixels: int, patch: int) -> int:
    """What a convolution reads of an edge: of 384 pixels in patches of 14, 378."""
    return pixels // patch * patch


def _read_labels(config: JsonObject) -> tuple[str, ...]:
    """One name per class; LABEL_0 and so on where there are none, as transformers has it."""
    if "id2label" not in config:
        return tuple(f"LABEL_{i}" for i in range(config.take("num_labels", int, 2, "num_classes")))
    labels = config.part("id2label")
    if not all(isinstance(label, str | int | float) for label in labels.values()):
        raise config.refusal("id2label", "an object of texts")
    try:
        return tuple(str(labels[str(i)]) for i in range(len(labels)))
    except KeyError as error:
        raise ValueError(f"id2label has {len(labels)} classes, and no name for number {error}") from None


def card_of(config_json: str, class_name: str) -> Card:
    """The card of a model in memory by its config; images are prepared as usually for models of its kind.

    Raises:
        ValueError: it is none that tomevit can build; the message says where.
    """
    config = JsonObject(parse_json(config_json) | {"architectures": [class_name]})
    check_unchanged(config)
    card = read_config(config)
    # Nothing of a processor is said, and the usual one makes images of the size that the model takes.
    return replace(card, preprocess=read_processor(JsonObject({}), config["model_type"], card.config))


def write_config(card: Card, format: str) -> dict[str, Any]:  # noqa: A002
    """The content of the config.json by which transformers builds the card's model, with weights of a format.

    Raises:
        ValueError: transformers has no such model; the message says in what.
    """
    config, model_type = card.config, FORMATS[format]
    family = FAMILIES[model_type]
    name = family.headed if config.num_classes or config.proj_dim else family.bare
    rows = _rows_of(family, gated=config.mlp == "swiglu")
    said_by_rows = {row.ours for row in rows}
    _check_class(config, model_type, name, said_by_rows)
    if "layer_scale" in said_by_rows and config.layer_scale is None:
        raise ValueError(f"transformers' {model_type} cannot hold layer_scale=None")
    values = vars(config) | {"mlp_hidden": config.mlp_hidden}
    if "mlp_ratio" in said_by_rows:
        hidden = config.mlp_hidden
        ratios = (ratio for ratio in range(1, 65) if _dinov2_hidden(config.embed_dim, ratio, config.mlp) == hidden)
        if (ratio := next(ratios, None)) is None:
            raise ValueError(f"transformers' {model_type} has no mlp_ratio for {hidden} channels within the MLP")
        values["mlp_ratio"] = ratio
    written = write_rows(rows, values)
    said: dict[str, Any] = {"architectures": [name], "model_type": model_type}
    said |= {family.part: written | {"model_type": f"{model_type}_vision_model"}} if family.part else written
    if name in _PROJECTING:
        said |= write_rows([_PROJECTION], values)
    if model_type == "vit_mae":
        said["mask_ratio"] = 0.0  # else three patches in four are dropped
    if config.num_classes:
        names = card.class_names or [f"LABEL_{i}" for i in range(config.num_classes)]
        said["id2label"] = {str(i): label for i, label in enumerate(names)}
        said["label2id"] = {label: i for i, label in enumerate(names)}
    return said


def _check_class(config: Config, model_type: str, name: str, said_by_rows: set[str]) -> None:
    """Raises ValueError if a class has otherwise what its config.json does not say."""
    said = said_by_rows | {"mlp_ratio", "num_classes"} | ({"proj_dim"} if name in _PROJECTING else set())
    usual = vars(Config()) | dict(FAMILIES[model_type].fixed)
    # What the model answers with is told first.
    unsaid = {field: usual[field] for field in ("pool", "pool_norm", *ARCHITECTURE) if field not in said}
    check_fixed(config, f"transformers' {model_type}", unsaid | _CLASSES[name])


# --------------------------------------------------------------------------------------------- preprocessor_config.json


def read_processor(said: JsonObject, model_type: str, config: Config) -> Preprocess:
    """How the image processor of a model prepares images, by its preprocessor_config.json; an empty one is the usual.

    Raises:
        ValueError: in a way that `Preprocess` has no words for, or to another size than the model's.
    """
    # do_resize and do_rescale say who does it, the caller or the processor, and not that nobody does.
    image, family = config.img_size, FAMILIES[model_type]
    key = "image_processor_type" if "image_processor_type" in said else "feature_extractor_type"
    match = _PROCESSOR_NAME.fullmatch(said.take(key, str, f"{family.processor}ImageProcessor"))
    if match is None:
        raise said.refusal(key, f"an image processor of {', '.join(_PROCESSORS)}")
    processor = _PROCESSORS[match[1]]
    fields = JsonObject({**processor.defaults, **said})
    edges, shorter = _read_edges(fields, processor, image)
    crop = fields.take("do_center_crop", bool)
    made = fields.take("crop_size", PAIR, list(image), "img_size") if crop else edges
    read = tuple(_cut(pixels, config.patch_size) for pixels in made) if family.cuts_rest else made
    if family.any_size or read == image:
        image = made  # the model resamples its positions, or leaves out what is over
    if made != image:
        raise ValueError(f"it makes images of {made[0]}x{made[1]}, and the model takes {image[0]}x{image[1]}")
    if shorter and image[0] != image[1]:
        raise ValueError("it resizes the shorter edge, and tomevit does so for square images alone")

    found = {"crop_pct": crop_share(image, edges), "resize": "shorter" if shorter else "squash"}
    if not fields.take("do_normalize", bool, True):
        fields |= {"image_mean": 0, "image_std": 1}
    return Preprocess(**fields.read(_IMAGES, found, config.in_chans))


def _read_edges(fields: JsonObject, processor: _Processor, image: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """The size before the crop, and whether it is that of the shorter edge."""
    size = fields.get("size")
    if isinstance(size, dict):
        size = fields.part("size") or None
        if size and "shortest_edge" in size:
            return size.take("shortest_edge", PAIR, None, "img_size"), True
    usual = [round(pixels * processor.margin) for pixels in image]
    edges = JsonObject({"size": size}).take("size", PAIR, usual, "img_size")
    return edges, processor.shorter and not isinstance(size, dict)


def crop_share(image: tuple[int, int], edges: tuple[int, int]) -> float:
    """The crop's share of the resized edges: the `crop_pct` from which these edges follow.

    Raises:
        ValueError: it is not the same along both.
    """
    share = min(1.0, *(have / edge for have, edge in zip(image, edges, strict=True)))
    for exact in (share, math.nextafter(share, 0)):  # the division may have been rounded up
        if edges_before_crop(image, exact) == edges:
            return exact
    shown = f"it resizes to {edges[0]}x{edges[1]} before it crops {image[0]}x{image[1]}"
    raise ValueError(f"{shown}, and tomevit crops the same share of both edges")


def edges_before_crop(image: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """The size before the crop, as `tomevit.transform` has it."""
    return math.floor(image[0] / crop_pct), math.floor(image[1] / crop_pct)


def write_processor(card: Card) -> dict[str, Any]:
    """The content of the preprocessor_config.json by which transformers prepares images as the card says.

    Raises:
        ValueError: it cannot.
    """
    image, preprocess = card.config.img_size, card.preprocess
    squash = preprocess.resize == "squash"
    if not squash and image[0] != image[1]:
        raise ValueError(
            f"transformers cannot resize the shorter edge and crop {image[0]}x{image[1]}: "
            f"it does so for square images alone, and others take resize='squash'"
        )
    height, width = edges_before_crop(image, preprocess.crop_pct)
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
    return said | write_rows(_IMAGES, vars(preprocess))

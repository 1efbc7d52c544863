"""open_clip_config.json (`open_clip/factory.py`), read, and the `preprocess_cfg` of its towers in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tomevit import zoo
from tomevit.cards import Card
from tomevit.config import Config, Preprocess
from tomevit.weights.side_files import timm
from tomevit.weights.side_files.common import (
    OPENAI_MEAN,
    OPENAI_STD,
    PAIR,
    PER_CHANNEL,
    JsonObject,
    Row,
    mlp_ratio_for,
)
from tomevit.weights.side_files.names import kin_of, named_card

_TOWER = (
    Row("width", "embed_dim", int, 768),
    Row("layers", "depth", int, 12),
    Row("image_size", "img_size", PAIR, 224),
    Row("patch_size", "patch_size", int, 16),
    Row("mlp_ratio", "mlp_ratio", float, 4.0),
    Row("ls_init_value", "layer_scale", float),
)
# How a tower trains, which tensors it hands out beside its vector, and how timm makes one: no weights depend on these.
_IDLE = re.compile(
    r"head_width|patch_dropout|output_tokens|timm_(drop|drop_path|model_name|model_pretrained|pool|proj|proj_bias)"
)
#: What is read where it has this value, as all towers of ours have it.
_ONLY = {
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "input_patchnorm": False,
    "global_average_pool": False,
}
_IMAGES = (
    Row("interpolation", "interpolation", {"bicubic": "bicubic", "bilinear": "bilinear"}, "bicubic"),
    Row("resize_mode", "resize", {"shortest": "shorter", "squash": "squash"}, "shortest"),
    Row("mean", "mean", PER_CHANNEL, OPENAI_MEAN),
    Row("std", "std", PER_CHANNEL, OPENAI_STD),
)


def read_config(config: JsonObject) -> Card:
    """The card of the image tower that an open_clip_config.json describes.

    Raises:
        ValueError: it is malformed, or tomevit cannot build the tower; the message says where.
    """
    model, images = config.part("model_cfg"), config.part("preprocess_cfg")
    tower = model.part("vision_cfg")
    tower.check_names([row.theirs for row in _TOWER], _IDLE, _ONLY)
    proj_dim = model.take("embed_dim", int, 0, "proj_dim")
    if name := tower.take("timm_model_name", str):
        found, kin = _read_timm_tower(tower, name, proj_dim), kin_of(zoo.card(name).name)
    else:
        act = model.take("quick_gelu", {False: "gelu", True: "quick_gelu"}, False)
        found, kin = _read_own_tower(tower, {"act": act, "proj_dim": proj_dim}), "clip_"
    made = images.take("size", PAIR, list(found.img_size), "img_size")
    if made != found.img_size:
        raise images.refusal("size", f"{found.img_size[0]}x{found.img_size[1]}, as the model takes them")
    return named_card(found, kin, preprocess=_read_images(images, found.in_chans))


def _read_timm_tower(tower: JsonObject, name: str, proj_dim: int) -> Config:
    built = timm.as_built(name, zoo.card(name))
    pool = tower.take("timm_pool", {"": built.pool, "token": "token", "avg": "avg", "map": "map"}, "")
    kind = tower.take("timm_proj", {"": False, "none": False, "linear": True}, "")
    size = tower.take("image_size", PAIR, list(built.img_size), "img_size")
    # Without a projection of open_clip's, timm's own head has as many outputs as the texts' vectors.
    headed = kind or zoo.architecture(name).config.proj_dim == proj_dim
    fields = vars(built) | {"img_size": size, "pool": pool, "pool_norm": timm.pool_norm_of(built, pool)}
    return Config(**fields | {"num_classes": 0, "proj_dim": proj_dim if headed else 0})


def _read_own_tower(tower: JsonObject, known: Mapping[str, Any]) -> Config:
    fields = tower.read(_TOWER, {"norm_eps": 1e-5, "pre_norm": True, "num_classes": 0, **known})
    dim, width = fields["embed_dim"], tower.take("head_width", int, 64, "embed_dim")
    if dim % width:
        raise tower.refusal("head_width", f"a divisor of {dim}")
    fields |= {"num_heads": dim // width, "mlp_ratio": mlp_ratio_for(dim, int(dim * fields["mlp_ratio"]))}
    return Config(**fields)


def images_of(preprocess_cfg: Mapping[str, Any], channels: int) -> Preprocess:
    """How the `preprocess_cfg` of a tower in memory says that images are prepared.

    Raises:
        ValueError: in a way that `Preprocess` has no words for.
    """
    return _read_images(JsonObject.of_memory(preprocess_cfg), channels)


def _read_images(images: JsonObject, channels: int) -> Preprocess:
    return Preprocess(**images.read(_IMAGES, {"crop_pct": 1.0}, channels))

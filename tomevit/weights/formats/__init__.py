"""Checkpoint formats: one table each, read in both directions by `tomevit.weights.rules`.

A new format is one more table here. `#` is a block's number, `*` is weight or bias; where the source lays values out in
another way, an einops pattern says how.
"""

from __future__ import annotations

from tomevit.weights.formats import transformers
from tomevit.weights.formats.common import BICUBIC, NO_BIAS
from tomevit.weights.formats.flax import BIG_VISION, VIT_JAX
from tomevit.weights.formats.originals import (
    DEIT,
    DEIT3,
    DINOV2,
    DINOV2_REG,
    DINOV3,
    EVA02,
    EVA02_CLIP,
    EVA02_SMALL,
    MAE,
    OPEN_CLIP,
    SWAG,
    TORCHVISION,
    TORCHVISION_LINEAR,
)
from tomevit.weights.formats.timm import TIMM, TIMM_CLIP, TIMM_EVA, TIMM_EVA_CLIP

__all__ = ["BICUBIC", "FORMATS", "NO_BIAS", "TIMM"]

FORMATS = {
    table.name: table
    for table in (
        *(TIMM, TIMM_CLIP, TIMM_EVA, TIMM_EVA_CLIP, DEIT, DEIT3, MAE, SWAG, TORCHVISION, TORCHVISION_LINEAR),
        *(VIT_JAX, BIG_VISION, DINOV2, DINOV2_REG, DINOV3, EVA02, EVA02_SMALL, EVA02_CLIP, OPEN_CLIP),
        *transformers.FORMATS,
    )
}

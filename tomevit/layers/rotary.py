"""Positions as rotations of queries and keys (RoFormer, arXiv:2104.09864), in two axes, as today's backbones have them.

The rotations of a token are a row of a table, which travels with the token and merges by the same weighted mean. For
a group of tokens the mean of cosines and of sines gives exactly the mean score of its members, were their queries and
keys equal: mean over i, j of qᵀ R(i)ᵀ R(j) k = (mean R(i) q)ᵀ (mean R(j) k). What a group has lost of a frequency by
lying far apart then fades from the score. Tokens are matched by their keys before the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tomevit.config import Config
from tomevit.layers import backends


class Rotation(NamedTuple):
    """One family's rule."""

    # Where patches 0 … n - 1 lie on an axis of n: called with these, with n, and with whether there is a class token.
    coordinate: Callable[[Tensor, int, bool], Tensor]
    frequency: float  # of the first of a quarter of the head's channels
    base: float  # the last frequency would be the first, divided by this
    x_first: bool  # whether columns have the first half of the frequencies
    adjacent: bool  # channels 2m and 2m + 1 turn together; else m and m + d / 2


ROTATIONS = {
    # facebookresearch/dinov3@6876159, layers/rope_position_encoding.py
    "dinov3": Rotation(lambda i, n, _: (2 * i + 1) / n - 1, 2 * math.pi, 100.0, x_first=False, adjacent=False),
    # baaivision/EVA, EVA-02/asuka/rope.py: any grid is scaled to the 16 patches of pre-training
    "eva": Rotation(lambda i, n, _: i * 16 / n, 1.0, 10000.0, x_first=False, adjacent=True),
    # facebookresearch/perception_models@3e352cc, core/vision_encoder/rope.py: the class token lies at (0, 0)
    "pe": Rotation(lambda i, _, cls: i + cls, 1.0, 10000.0, x_first=True, adjacent=True),
}


class RotaryEmbedding(nn.Module):
    """The table of all tokens of a whole image, in float32 at least, whatever the dtype of the weights.

    Attributes:
        table: (1, N, d), cosines and then sines of d / 2 angles; a prefix token has angles of 0, which turn nothing.
    """

    table: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("table", rotary_table(config).to(torch.float32), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Made anew, on the device and in the dtype that it was moved to: half precision would blur the positions.
        self.table = rotary_table(self.config).to(self.table.device, backends.at_least_float32(self.table.dtype))
        return self


def rotary_table(config: Config) -> Tensor:
    """(1, N, d) float64: what `RotaryEmbedding` holds, for d channels per head."""
    assert config.rope is not None
    rule, count = ROTATIONS[config.rope], config.embed_dim // config.num_heads // 4
    frequency = rule.frequency * rule.base ** -(torch.arange(count, dtype=torch.float64, device="cpu") / count)
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") for n in config.grid]
    places = [rule.coordinate(axis, len(axis), config.class_token) for axis in axes]
    row, column = (place.flatten()[:, None] * frequency for place in torch.meshgrid(*places, indexing="ij"))
    patches = torch.cat([column, row] if rule.x_first else [row, column], 1)  # (patches, d / 2)
    angles = torch.cat([patches.new_zeros(config.num_prefix, patches.shape[1]), patches])
    return torch.cat([angles.cos(), angles.sin()], 1)[None]


def rotate(x: Tensor, table: Tensor, kind: str) -> Tensor:
    """Turn each token's channels, two by two, as `ROTATIONS[kind]` says.

    Args:
        x: (B, H, N, d).
        table: (B or 1, N, d) float32 or float64, cosines and then sines.
        kind: a name in ROTATIONS.

    Returns:
        (B, H, N, d) in the dtype of x; computed in that of the table.
    """
    cos, sin = table[:, None].chunk(2, -1)
    pairs = "b h n (m two) -> two b h n m" if ROTATIONS[kind].adjacent else "b h n (two m) -> two b h n m"
    a, b = rearrange(x.to(table.dtype), pairs, two=2).unbind()
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin])
    return rearrange(turned, " -> ".join(reversed(pairs.split(" -> ")))).to(x.dtype)

"""Tokens, and what a merge does to them.

A merge is data: which tokens stay, which join another, and whom. It is found by a function in matching.py and applied,
undone and composed by the functions here, all of them pure.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The state of a forward pass: B images, N tokens of D channels, N0 tokens at the start."""

    x: Tensor  # (B, N, D)
    size: Tensor | None = None  # (B, N, 1) float32: initial tokens per token; None while all are 1
    slots: Tensor | None = None  # (B, N0) int64: where each initial token is now; only when traced


class Merge(NamedTuple):
    """N tokens become M: each token that comes out starts from one that went in, and N - M join one of them."""

    keep: Tensor  # (B, M) int64: the token in that each token out starts from
    src: Tensor  # (B, N - M) int64: the tokens in that join another
    dst: Tensor  # (B, N - M) int64: the token out that each of them joins


def merge_tokens(tokens: Tokens, merge: Merge) -> Tokens:
    """Average the tokens that a merge joins, weighted by size, and keep sizes and slots in step (ToMe, section 3)."""
    x, size, slots = tokens
    if size is None:
        size = x.new_ones((x.shape[0], x.shape[1], 1), dtype=torch.float32)
    x, size = merge_mean(x, size, merge)
    if slots is not None:
        slots = compose(slots, slot_map(merge))
    return Tokens(x, size, slots)


def merge_mean(x: Tensor, size: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of each group, and the size of each group.

    Args:
        x: (B, N, D), any floating dtype.
        size: (B, N, 1), float32.

    Returns:
        (B, M, D) in the dtype of x, and (B, M, 1) float32.
    """
    keep, src, dst = merge
    dtype = torch.promote_types(x.dtype, torch.float32)
    joins = dst[:, None, :] == torch.arange(keep.shape[1], device=dst.device)[:, None]  # (B, M, N - M)
    size_keep, size_src = rows(size, keep), rows(size, src)
    # Sums of integers below 2^24: exact in float32, in any order, on any device.
    size_out = size_keep + (joins * size_src.mT).sum(2, keepdim=True)  # (B, M, 1)
    # Weights that sum to one: a sum over x itself could overflow float16. The few rows that join are spread by a small
    # one-hot product, which needs no scatter, and so is deterministic on every device and exports everywhere.
    weights = joins * (size_src.mT.to(dtype) / size_out)  # (B, M, N - M)
    kept = rows(x, keep).to(dtype).mul_(size_keep.to(dtype) / size_out)
    return torch.baddbmm(kept, weights, rows(x, src).to(dtype)).to(x.dtype), size_out


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x (B, N, D) that index (B, M) names: (B, M, D)."""
    # One index over the rows of the whole batch copies whole rows; gather would look up every element.
    first = torch.arange(x.shape[0], device=index.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).reshape(*index.shape, x.shape[2])


def slot_map(merge: Merge) -> Tensor:
    """(B, N) int64: the token out that each token in ends in."""
    keep, src, dst = merge
    stay = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    slots = keep.new_empty(keep.shape[0], keep.shape[1] + src.shape[1])
    return slots.scatter(1, torch.cat([keep, src], 1), torch.cat([stay, dst], 1))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The slot map (B, N0) of two steps, from those of the first (B, N0) and of the second (B, N1)."""
    return second.gather(1, first)


def unmerge(tokens: Tokens) -> Tensor:
    """One vector per initial token, in the initial order: every token of a group receives the group's vector.

    Args:
        tokens: what `forward_features` returned, with slots.

    Returns:
        (B, N0, D) in the dtype of tokens.x.

    Raises:
        ValueError: tokens were merged without slots being recorded.
    """
    if tokens.slots is not None:
        return rows(tokens.x, tokens.slots)
    if tokens.size is None:
        return tokens.x
    raise ValueError("these tokens were merged without a record of where each went: call forward_features(trace=True)")

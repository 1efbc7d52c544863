"""Tokens, and what a merge does to them.

A merge is data: which tokens stay, which join another, and whom. It is found by a function in matching.py and applied,
undone and composed by the functions here, all of them pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tomevit.errors import check_type
from tomevit.layers import backends


class Tokens(NamedTuple):
    """The state of a forward pass: B images, N tokens of D channels, N0 tokens at the start."""

    x: Tensor  # (B, N, D)
    size: Tensor | None = None  # (B, N, 1) float32: initial tokens per token; None while all are 1
    slots: Tensor | None = None  # (B, N0) int64: where each initial token is now, -1 if dropped; only when traced
    rope: Tensor | None = None  # (B or 1, N, d) float32: cosines and sines of its rotary position (rotary.py)
    weight: Tensor | None = None  # (B, N, 1) float: what it counts in attention and pooling; None: as its size says


class Merge(NamedTuple):
    """N tokens become M: each token that comes out starts from one that went in, and S join one of them.

    Tokens that are named neither in keep nor in src are dropped.
    """

    keep: Tensor  # (B, M) int64: the token in that each token out starts from
    src: Tensor  # (B, S) int64: the tokens in that join another
    dst: Tensor  # (B, S) int64: the token out that each of them joins
    #: (B, S) floating: what part of its weight each of them brings. Given, the mean is a plain one over the tokens.
    similarity: Tensor | None = None


def merge_tokens(tokens: Tokens, merge: Merge) -> Tokens:
    """Average the tokens that a merge joins, and keep all else in step.

    The mean is weighted by size (ToMe, section 3); where the merge has similarities it is plain, and attention weighs
    the sum of what the members bring (OpenGVLab/DiffRate, DiffRate/patch/deit.py).
    """
    x, size, slots, rope, weight = tokens
    ones = torch.ones(x.shape[0], x.shape[1], 1, dtype=torch.float32, device=x.device)
    size = ones if size is None else size
    counts = size if merge.similarity is None else ones
    if rope is not None:
        rope, _ = merge_mean(rope.expand(x.shape[0], -1, -1), counts, merge)
    if weight is not None or merge.similarity is not None:
        weight = merge_sum(size if weight is None else weight, merge, merge.similarity)
    x, size_out = merge_mean(x, counts, merge)
    if slots is not None:
        slots = compose(slots, slot_map(merge, ones.shape[1]))
    return Tokens(x, size_out if counts is size else merge_sum(size, merge), slots, rope, weight)


def merge_sum(size: Tensor, merge: Merge, share: Tensor | None = None) -> Tensor:
    """The sum over each group, (B, M, 1), of what its tokens have, (B, N, 1), and of joining ones a share, (B, S)."""
    joining = rows(size, merge.src)
    if share is not None:
        joining = joining * share[:, :, None]
    staying = rows(size, merge.keep).to(joining.dtype)
    if backends.merges_by_index(size):
        return staying.scatter_add(1, merge.dst[:, :, None], joining)
    return staying + (_joins(merge, joining.dtype) * joining.transpose(1, 2)).sum(2, keepdim=True)


def merge_mean(x: Tensor, size: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of each group, and the size of each group.

    Args:
        x: (B, N, D), any floating dtype.
        size: (B, N, 1), float32.

    Returns:
        (B, M, D) in the dtype of x, and (B, M, 1) float32.
    """
    if backends.merges_by_index(x):
        if backends.hides_merging(x):
            return torch.ops.tomevit.merge_mean(x, size, *merge[:3])
        if torch.is_grad_enabled() and x.requires_grad:
            return _MeanByIndex.apply(x, size, *merge[:3])  # type: ignore[no-untyped-call]
        return mean_by_index(x, size, merge)
    return mean_by_product(x, size, merge)


def mean_by_product(x: Tensor, size: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """`merge_mean`, with the rows that join spread by a small one-hot product.

    It needs no scatter, and so is deterministic on every device, compiles to few kernels and exports everywhere.
    """
    keep, src, *_ = merge
    dtype = backends.at_least_float32(x.dtype)
    joins = _joins(merge, size.dtype)
    size_keep, size_src = rows(size, keep), rows(size, src).transpose(1, 2)
    # Sums of integers below 2^24: exact in float32, in any order, on any device.
    size_out = size_keep + (joins * size_src).sum(2, keepdim=True)  # (B, M, 1)
    # Weights that sum to one: a sum over x itself could overflow float16.
    weights = joins * (size_src.to(dtype) / size_out)  # (B, M, S)
    kept = rows(x, keep).to(dtype).mul_(size_keep.to(dtype) / size_out)
    with backends.without_autocast(x):
        return torch.baddbmm(kept, weights, rows(x, src).to(dtype)).to(x.dtype), size_out


def _joins(merge: Merge, dtype: torch.dtype) -> Tensor:
    """(B, M, S): 1 where that token joins that group."""
    place = torch.arange(merge.keep.shape[1], device=merge.dst.device)
    return (merge.dst[:, None, :] == place[:, None]).to(dtype)


def mean_by_index(x: Tensor, size: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """`merge_mean`, touching only the rows that join and are joined; all others are copied, to the bit.

    Each group gathers in the row of one of its joining tokens, in order, and goes to its place from there: indexed
    additions on a CPU are sequential, so the result is deterministic. It has no gradient.
    """
    _, tokens, dim = x.shape
    dtype = backends.at_least_float32(x.dtype)
    keep, src = (_flat(index, tokens) for index in (merge.keep, merge.src))  # of (B N) rows
    target = _flat(merge.dst, merge.keep.shape[1])  # of (B M) rows
    x, size = x.flatten(0, 1), size.flatten()
    out, size_out, size_src = x.index_select(0, keep), size.index_select(0, keep), size.index_select(0, src)
    size_before = size_out.index_select(0, target)
    size_out = size_out.index_add(0, target, size_src)
    total = size_out.index_select(0, target).to(dtype)
    # Any one of a group may speak for it, as long as all agree.
    joining = torch.arange(target.shape[0], device=x.device)
    speaker = size_out.to(torch.int64).scatter(0, target, joining).index_select(0, target)
    mean = out.index_select(0, target).to(dtype) * (size_before / total)[:, None]
    mean.index_add_(0, speaker, x.index_select(0, src).to(dtype) * (size_src / total)[:, None])
    out[target] = mean.index_select(0, speaker).to(x.dtype)
    return out.view(*merge.keep.shape, dim), size_out.view(*merge.keep.shape, 1)


def mean_by_slots(x: Tensor, size: Tensor, size_out: Tensor, slots: Tensor) -> Tensor:
    """The size-weighted mean of each group, of a few channels, where only each token's place after the merge is known.

    Args:
        x: (B, N, D) float32 or float64.
        size, size_out: (B, N, 1) and (B, M, 1) float32, before and after the merge.
        slots: (B, N) int64.

    Returns:
        (B, M, D)
    """
    place = torch.arange(size_out.shape[1], device=x.device)[:, None]
    with backends.without_autocast(x):
        return (slots[:, None, :] == place).to(x.dtype) * (size.transpose(1, 2) / size_out).to(x.dtype) @ x


class _MeanByIndex(torch.autograd.Function):
    """`mean_by_index` with its gradient, in which every token takes its share of its group's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
        return mean_by_index(x, size, Merge(keep, src, dst))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        _, size, *merge = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(size, output[1], *merge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        size, size_out, *merge = ctx.saved_tensors
        slots = slot_map(Merge(*merge), size.shape[1])
        share = size.to(backends.at_least_float32(grad.dtype)) / rows(size_out, torch.where(slots < 0, 0, slots))
        return (rows_or_zero(grad, slots) * share).to(grad.dtype), None, None, None, None


@torch.library.custom_op("tomevit::merge_mean", mutates_args=())
def merge_mean_op(x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_mean` as one operator, for compilers."""
    return mean_by_index(x, size, Merge(keep, src, dst))


@merge_mean_op.register_fake
def _(x: Tensor, size: Tensor, keep: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*keep.shape, x.shape[2]), size.new_empty(*keep.shape, 1)


merge_mean_op.register_autograd(_MeanByIndex.backward, setup_context=_MeanByIndex.setup_context)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x (B, N, D) that index (B, M) names: (B, M, D). Indices from 0 to N - 1: torch stops at others."""
    # One index over the rows of the whole batch copies whole rows; gather would look up every element.
    return x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).reshape(*index.shape, x.shape[2])


def _flat(index: Tensor, tokens: int) -> Tensor:
    """An index (B, M) into each image's N tokens as one into the rows of the whole batch: (B M)."""
    batch = index.shape[0]
    # Looked up rather than added: an index beyond its image would name a row of the next.
    row = torch.arange(batch * tokens, device=index.device).view(batch, tokens)
    return row.gather(1, index).flatten()


def rows_or_zero(x: Tensor, slots: Tensor) -> Tensor:
    """`rows`, and zeros where the index is -1."""
    there = slots >= 0
    return rows(x, torch.where(there, slots, 0)) * there[:, :, None].to(x.dtype)


def slot_map(merge: Merge, tokens: int | None = None) -> Tensor:
    """(B, N) int64: the token out that each token in ends in, -1 for those that are dropped.

    Args:
        merge: of N tokens.
        tokens: N; None: none is dropped.
    """
    keep, src, dst, _ = merge
    stay = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    named = keep.shape[1] + src.shape[1]
    tokens = named if tokens is None else tokens
    shape = keep.shape[0], tokens
    slots = keep.new_empty(shape) if tokens == named else keep.new_full(shape, -1)
    return slots.scatter(1, torch.cat([keep, src], 1), torch.cat([stay, dst], 1))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The slot map (B, N0) of two steps, from those of the first (B, N0) and of the second (B, N1)."""
    there = first >= 0
    return torch.where(there, second.gather(1, torch.where(there, first, 0)), -1)


def check_tokens(tokens: object) -> None:
    """Raises ValueError, in a sentence, unless these are tokens of a model's."""
    check_type("tokens", tokens, Tokens, "what model.forward_features(images) returns")


def unmerge(tokens: Tokens) -> Tensor:
    """One vector per initial token, in the initial order: every token of a group receives the group's vector.

    Args:
        tokens: what `forward_features` returned, with slots.

    Returns:
        (B, N0, D) in the dtype of tokens.x; zeros for tokens that were dropped (`tokens.slots` is -1 there).

    Raises:
        ValueError: these are no tokens, or they were merged without slots being recorded.
    """
    check_tokens(tokens)
    if tokens.slots is not None:
        return rows_or_zero(tokens.x, tokens.slots)
    if tokens.size is None:
        return tokens.x
    raise ValueError("these tokens were merged without a record of where each went: call forward_features(trace=True)")

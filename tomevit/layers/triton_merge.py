"""Bipartite matching and merging on a GPU, in two Triton kernels.

The first finds each source's nearest target, straight from the keys of all heads: neither their mean nor the scores are
written out. The second selects the r sources that merge, and writes every token that is left. Nothing is sorted, and no
sum depends on the order in which threads run: results are the same in every run and for every batch around an image.

Without a GPU they run in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before the first import. In Triton 3.9
that is right for float32 and float16; bfloat16 it truncates, and multiplies bit patterns.
"""

# mypy: disable-error-code="import-not-found,import-untyped,misc,no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from tomevit.layers.merge import Tokens, compose, mean_by_slots, rows

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused merge needs Triton, which torch for CUDA brings: pip install triton") from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SOURCES = 8192  # a program of the second kernel holds them all in registers


def match_and_merge_fused(tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> Tokens:
    """What merge_tokens(tokens, bipartite_soft_matching(key.mean(1), r, num_prefix)) returns, up to rounding.

    Where similarities differ by no more than rounding, another token may be chosen. Differentiable in x.

    Args:
        tokens: x (B, N, D).
        key: (B, H, N, d), of any strides. x and key are float32, bfloat16 or float16, and may differ.
        r: tokens to merge, at most half of the N - num_prefix that may.
        num_prefix: tokens at the front that neither merge nor move.

    Raises:
        ValueError: a device, a dtype, a number of tokens or an r that the kernels do not take.
    """
    x, size, slots, rope, weight = tokens
    assert weight is None, "sizes are all that the kernels know"
    if size is None:
        size = x.new_ones((x.shape[0], x.shape[1], 1), dtype=torch.float32)
    x, size_out, step = _match_and_merge(x, size, key, r, num_prefix)
    size_out = size_out.detach()
    return Tokens(
        x,
        size_out,
        None if slots is None else compose(slots, step),
        None if rope is None else mean_by_slots(rope.expand(x.shape[0], -1, -1), size, size_out, step),
    )


@torch.library.custom_op(
    "tomevit::match_and_merge",
    mutates_args=(),
    schema="(Tensor x, Tensor size, Tensor key, SymInt r, SymInt num_prefix) -> (Tensor, Tensor, Tensor)",
)
def _match_and_merge(x: Tensor, size: Tensor, key: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N - r, D), sizes (B, N - r, 1), and where each token went, (B, N) int64, as slot_map has it."""
    batch, n, dim = x.shape
    _, heads, _, head_dim = key.shape
    patches = n - num_prefix
    num_sources = (patches + 1 - num_prefix % 2) // 2  # at even positions, as in bipartite_soft_matching
    if not 0 <= r <= patches // 2:
        raise ValueError(f"r is {r}, and of {patches} tokens at most {patches // 2} can merge")
    if num_sources > MAX_SOURCES:
        raise ValueError(f"the fused merge takes at most {2 * MAX_SOURCES} tokens, not {n}: use the plain one")
    if x.dtype not in DTYPES or key.dtype not in DTYPES:
        raise ValueError(f"the fused merge takes float32, bfloat16 and float16, not x {x.dtype} with key {key.dtype}")
    if x.device.type == "cpu" and isinstance(_merge, triton.JITFunction):
        raise ValueError("the fused merge runs on a GPU, and these tokens are on the CPU: use the plain one")

    x, size = x.contiguous(), size.contiguous()
    similarity = x.new_empty((batch, num_sources), dtype=torch.float32)
    nearest = x.new_empty((batch, num_sources), dtype=torch.int32)
    x_out, size_out, slots = outputs = _empty(x, size, key, r, num_prefix)
    # The largest blocks that leave registers to spare. Hopper's matrix units want 64 rows; float32 does without them.
    block, targets, warps = (32, 32, 8) if key.dtype == torch.float32 else (64, 32, 4)
    channels = max(16, triton.next_power_of_2(head_dim))  # the least that a product takes
    with torch.cuda.device(x.get_device()):  # Triton launches on the current one; -1, the CPU, changes nothing
        grid = (batch * triton.cdiv(num_sources, block),)
        sizes = (n, num_prefix, heads, head_dim, channels, block, targets)
        _find_nearest[grid](key, similarity, nearest, *key.stride(), *sizes, num_warps=warps, enable_fp_fusion=True)

        block, sources, channels = 8, max(16, triton.next_power_of_2(num_sources)), triton.next_power_of_2(dim)
        warps = 4 if max(sources, channels) <= 1024 else 8
        grid = (batch * triton.cdiv(max(num_prefix + num_sources, patches - num_sources), block),)
        sizes = (n, num_prefix, r, dim, sources, channels, block)
        _merge[grid](
            x, size, similarity, nearest, x_out, size_out, slots, *sizes, num_warps=warps, enable_fp_fusion=True
        )
    return outputs


@_match_and_merge.register_fake
def _empty(x: Tensor, size: Tensor, key: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    batch, n, dim = x.shape
    size_out = size.new_empty((batch, n - r, 1))
    return x.new_empty((batch, n - r, dim)), size_out, x.new_empty((batch, n), dtype=torch.int64)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], *output[1:])


def _backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    size, size_out, slots = ctx.saved_tensors
    share = size / rows(size_out, slots)  # that each token has in the mean of its group
    return (rows(grad, slots) * share).to(grad.dtype), None, None, None, None


_match_and_merge.register_autograd(_backward, setup_context=_save)


@triton.jit
def _sets(n, num_prefix):
    """The first source, the first target, and how many there are of each; both lie two apart."""
    source, target = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    return source, target, (n - source + 1) // 2, (n - target + 1) // 2


@triton.jit
def _mean_key(
    key, position, exists, stride_h, stride_n, stride_d, heads: tl.constexpr, head_dim, channels: tl.constexpr
):
    """The mean over the heads, rounded to the dtype of the keys, and one over its length."""
    channel = tl.arange(0, channels)[None, :]
    key += position[:, None] * stride_n + channel * stride_d
    total = tl.zeros((position.shape[0], channels), tl.float32)
    for head in tl.static_range(heads):
        total += tl.load(key + head * stride_h, exists[:, None] & (channel < head_dim), 0.0).to(tl.float32)
    mean = (total / heads).to(key.dtype.element_ty)
    length = tl.sqrt_rn(tl.sum(mean.to(tl.float32) * mean.to(tl.float32), 1))
    return mean, 1.0 / tl.maximum(length, 1e-12)


@triton.jit(do_not_specialize=["n", "num_prefix"])
def _find_nearest(
    key, similarity, nearest, stride_b, stride_h, stride_n, stride_d, n, num_prefix,
    heads: tl.constexpr, head_dim, channels: tl.constexpr, block: tl.constexpr, targets: tl.constexpr,
):  # fmt: skip
    """A block of the sources of one image: key (B, H, N, d) -> similarity (B, S) float32, nearest (B, S) int32 < T."""
    source, target, num_sources, num_targets = _sets(n, num_prefix)
    blocks = tl.cdiv(num_sources, block)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    key += image * stride_b
    i = tl.program_id(0) % blocks * block + tl.arange(0, block)
    mine, scale = _mean_key(
        key, source + 2 * i, i < num_sources, stride_h, stride_n, stride_d, heads, head_dim, channels
    )
    best, best_j = tl.full((block,), float("-inf"), tl.float32), tl.zeros((block,), tl.int32)
    # One stage: to load ahead, the keys of all heads would have to fit into shared memory.
    for first in tl.range(0, num_targets, targets, num_stages=1):
        j = first + tl.arange(0, targets)
        theirs, their_scale = _mean_key(
            key, target + 2 * j, j < num_targets, stride_h, stride_n, stride_d, heads, head_dim, channels
        )
        # Products of two 16-bit numbers are exact in float32; "ieee": those of float32 are not rounded to TF32 first.
        scores = tl.dot(mine, tl.trans(theirs), input_precision="ieee") * their_scale[None, :]
        top, at = tl.max(tl.where(j[None, :] < num_targets, scores, float("-inf")), 1, return_indices=True)
        best_j = tl.where(top > best, first + at, best_j)  # not >=: ties go to the earlier token
        best = tl.maximum(top, best)
    tl.store(similarity + image * num_sources + i, best * scale, i < num_sources)
    tl.store(nearest + image * num_sources + i, best_j, i < num_sources)


@triton.jit
def _order(similarity):
    """Integers in the order of the similarities: a total one, whatever NaN there is."""
    bits = tl.where(similarity == 0, 0.0, similarity).to(tl.int32, bitcast=True)  # -0 is 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _last_to_merge(order, i, r):
    """The r-th largest value, and the index of the last of that value among the first r."""
    # Found bit by bit, the sign first: 32 counts, where ranks would take a comparison for each pair.
    value = tl.where(tl.sum((order >= 0).to(tl.int32)) >= r, 0, -0x80000000)
    for bit in range(31):
        larger = value + (1 << (30 - bit))
        value = tl.where(tl.sum((order >= larger).to(tl.int32)) >= r, larger, value)
    tied, wanted = order == value, r - tl.sum((order > value).to(tl.int32))
    return value, tl.max(tl.where(tied & (tl.cumsum(tied.to(tl.int32), 0) <= wanted), i, -1))


@triton.jit(do_not_specialize=["n", "num_prefix", "r"])
def _merge(
    x, size, similarity, nearest, x_out, size_out, slots, n, num_prefix, r,
    dim, sources: tl.constexpr, channels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of one image, a block of the tokens that may stay (prefix and sources), then a block of the targets."""
    source, target, num_sources, num_targets = _sets(n, num_prefix)
    num_staying = num_prefix + num_sources  # or not
    blocks = tl.cdiv(tl.maximum(num_staying, num_targets), block)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * block
    x, size, slots = x + image * n * dim, size + image * n, slots + image * n
    x_out, size_out = x_out + image * (n - r) * dim, size_out + image * (n - r)
    similarity, nearest = similarity + image * num_sources, nearest + image * num_sources
    channel = tl.arange(0, channels)[None, :]
    within = channel < dim

    # Select. Every program does so for itself, to spare a launch.
    i = tl.arange(0, sources)
    order = tl.where(i < num_sources, _order(tl.load(similarity + i, i < num_sources, 0.0)), -0x80000000)
    value, last = _last_to_merge(order, i, r)
    merges = (order > value) | ((order == value) & (i <= last))
    joins = tl.load(nearest + i, i < num_sources, 0)

    # Those that stay move up by the number of those before them that merge.
    token = first + tl.arange(0, block)
    own = token - num_prefix
    is_source = (own >= 0) & (own < num_sources)
    own_order = _order(tl.load(similarity + own, is_source, 0.0))
    gone = is_source & ((own_order > value) | ((own_order == value) & (own <= last)))
    before = tl.sum((merges & (i < first - num_prefix)).to(tl.int32)) + tl.cumsum(gone.to(tl.int32), 0)
    slot = tl.where(gone, num_staying - r + tl.load(nearest + own, is_source, 0), token - before)
    position = tl.where(own < 0, token, source + 2 * own)
    stays = (token < num_staying) & ~gone
    row = tl.load(x + position[:, None] * dim + channel, stays[:, None] & within, 0.0)
    tl.store(x_out + slot[:, None] * dim + channel, row, stays[:, None] & within)
    tl.store(size_out + slot, tl.load(size + position, stays, 0.0), stays)
    tl.store(slots + position, slot.to(tl.int64), token < num_staying)

    # Targets take in what joins them, by position, as a running mean: a sum could overflow.
    j = first + tl.arange(0, block)
    exists = j < num_targets
    position = target + 2 * j
    total = tl.load(size + position, exists, 1.0)
    mean = tl.load(x + position[:, None] * dim + channel, exists[:, None] & within, 0.0).to(tl.float32)
    waiting = merges & (joins >= first) & (joins < first + block)
    for _ in range(tl.sum(waiting.to(tl.int32))):
        joining = tl.min(tl.where(waiting, i, sources))
        waiting &= i != joining
        here = j == tl.load(nearest + joining)
        added = tl.load(size + source + 2 * joining)
        other = tl.load(x + (source + 2 * joining) * dim + channel, within, 0.0).to(tl.float32)
        grown = total + added
        mean = tl.where(here[:, None], mean * (total / grown)[:, None] + other * (added / grown)[:, None], mean)
        total = tl.where(here, grown, total)
    slot = num_staying - r + j
    tl.store(x_out + slot[:, None] * dim + channel, mean.to(x_out.dtype.element_ty), exists[:, None] & within)
    tl.store(size_out + slot, total, exists)
    tl.store(slots + position, slot.to(tl.int64), exists)

"""Which tokens merge. Each function takes keys and returns a Merge of exactly r tokens; a new algorithm is one more.

    function(key, r, num_prefix) -> Merge

    key: (B, N, C) floating: what similarity is measured on, in a block the attention keys averaged over the heads.
    r: tokens to merge, at most half of the N - num_prefix that may.
    num_prefix: tokens at the front that neither merge nor move.

What comes out is in this order: the prefix, the tokens that could have merged and did not, the tokens that others may
join, each by position. No gradient passes through a matching.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tomevit.layers import backends
from tomevit.layers.merge import Merge, rows

Matching = Callable[[Tensor, int, int], Merge]


def bipartite_soft_matching(key: Tensor, r: int, num_prefix: int) -> Merge:
    """Bipartite soft matching (ToMe, section 3): even tokens each find their most similar odd one; the r best merge.

    Even and odd count from the first token, prefix included, so that weights trained with merging see the same sets.
    """
    # The operator's results may not share memory, as empty ones do.
    match = torch.ops.tomevit.bipartite_soft_matching if r > 0 and backends.hides_merging(key) else _bipartite
    return Merge(*match(key.detach(), r, num_prefix))


def _bipartite(key: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    even, odd = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    position = torch.arange(key.shape[1], device=key.device)
    return _join_most_similar(key, position[even::2], position[odd::2], r, num_prefix)


bipartite_op = torch.library.custom_op("tomevit::bipartite_soft_matching", _bipartite, mutates_args=())


@bipartite_op.register_fake
def _(key: Tensor, r: int, _: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = key.shape
    keep, src, dst = (key.new_empty(batch, count, dtype=torch.int64) for count in (tokens - r, r, r))
    return keep, src, dst


def every_kth_matching(key: Tensor, r: int | None, num_prefix: int, k: int = 4) -> Merge:
    """Every k-th patch stays; of the others the r most similar to one of those join it, with r = None all of them.

    Up to a share 1 - 1/k can merge at once, at a coarser match than the bipartite one (`kth_bipartite_soft_matching`
    in facebookresearch/ToMe, here with the prefix protected and the patches behind the last k-th one not lost).
    """
    patches = key.shape[1] - num_prefix
    k = min(k, patches)
    position = torch.arange(num_prefix, key.shape[1], device=key.device)
    whole = patches // k * k  # behind the last k-th patch others may remain
    groups = position[:whole].view(-1, k)
    src, dst = torch.cat([groups[:, :-1].flatten(), position[whole:]]), groups[:, -1]
    return _join_most_similar(key, src, dst, len(src) if r is None else r, num_prefix)


def random_matching(key: Tensor, r: int, num_prefix: int) -> Merge:
    """Patches drawn at random, r in each image, join the most similar of the rest: the baseline for a matching.

    Draws from torch's default generator: seed it for equal results.
    """
    noise = torch.rand(key.shape[0], key.shape[1] - num_prefix, device=key.device, dtype=torch.float32)
    draw = noise.argsort(-1) + num_prefix
    src, dst = draw[:, :r].sort(-1).values, draw[:, r:].sort(-1).values
    return _join_most_similar(key, src, dst, r, num_prefix)


MATCHINGS: dict[str, Matching] = {
    "bipartite": bipartite_soft_matching,
    "every_kth": every_kth_matching,
    "random": random_matching,
}


def find_matching(matching: str | Matching) -> Matching:
    """The function of that name, or the function itself.

    Raises:
        ValueError: no matching has that name.
    """
    if callable(matching):
        return matching
    if not isinstance(matching, str) or matching not in MATCHINGS:
        raise ValueError(f"there is no matching {matching!r}; there is {', '.join(MATCHINGS)}, or pass a function")
    return MATCHINGS[matching]


def _join_most_similar(key: Tensor, src: Tensor, dst: Tensor, r: int, num_prefix: int) -> Merge:
    """Of the tokens at positions src, the r that are most similar (cosine) to one at positions dst join it."""
    batch = key.shape[0]
    prefix = torch.arange(num_prefix, device=key.device)
    if r == 0:
        keep = torch.cat([index.expand(batch, -1) for index in (prefix, src, dst)], 1)
        return Merge(keep, keep[:, :0], keep[:, :0])
    # float32 before the norm: squares of float16 overflow from 256 on.
    key = key.detach().to(backends.at_least_float32(key.dtype))
    key = key / key.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    with backends.without_autocast(key):
        scores = _take(key, src) @ _take(key, dst).transpose(1, 2)  # (B, S, T)
    if backends.is_recorded():
        nearest = scores.argmax(-1)
        similarity = scores.gather(2, nearest[:, :, None]).squeeze(2)
    else:
        similarity, nearest = scores.max(-1)  # (B, S)
    merged, stays = (_largest_by_topk if backends.is_recorded() else _largest)(similarity, r)
    src_of = src.__getitem__ if src.ndim == 1 else partial(src.gather, 1)
    slot = torch.arange(num_prefix + src.shape[-1] - r, key.shape[1] - r, device=key.device)  # of each at dst
    return Merge(
        # Of an empty prefix torch's older ONNX exporter would take -1 for 1.
        keep=_side_by_side(prefix.expand(batch, num_prefix), src_of(stays), dst.expand(batch, -1)),
        src=src_of(merged),
        dst=slot[nearest.gather(1, merged)],
    )


def _side_by_side(*indices: Tensor) -> Tensor:
    """Indices (B, n) of several n as one."""
    if not backends.is_exporting():
        return torch.cat(indices, 1)
    # Tools that quantise programs take every concatenation, and every sum with a number, for one of activations.
    total, first = sum(index.shape[1] for index in indices), 0
    whole = torch.arange(total, device=indices[0].device)
    for index in indices:
        if width := index.shape[1]:
            place = torch.arange(-first, total - first, device=index.device)
            within = torch.where(torch.logical_and(place >= 0, place < width), place, torch.zeros_like(place))
            whole = torch.where(place < 0, whole, index.index_select(1, within))
            first += width
    return whole


def _largest(similarity: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Of similarities (B, S) the indices (B, r) of the largest, and (B, S - r) of the others, those ascending."""
    order = similarity.argsort(dim=-1, descending=True, stable=True)  # stable: ties go to the earlier token
    return order[:, :r], order[:, r:].sort(-1).values


def _largest_by_topk(similarity: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The same, for runtimes without a stable sort: where values are equal, their topk takes whichever it likes."""
    count = similarity.shape[1]
    last = similarity.topk(r).values[:, -1:]  # to merge; only the value counts
    # No two are equal: most is what is more similar than the last, then what is as similar, each by position.
    low, middle, high = (
        torch.arange(most * count, (most - 1) * count, -1, device=similarity.device) for most in (1, 2, 3)
    )
    rank = torch.where(similarity > last, high, torch.where(similarity == last, middle, low))
    least, merged = rank.topk(r)
    if not backends.is_traced() and r == count:
        return merged, merged[:, :0]
    return merged, torch.where(rank < least[:, -1:], low, torch.zeros_like(low)).topk(count - r).indices


def check_merge(merge: Merge, matching: Matching, tokens: int, r: int, num_prefix: int) -> None:
    """Raises ValueError unless a merge of a matching of the user's own is one of r tokens, none of the prefix."""
    name = getattr(matching, "__name__", repr(matching))
    batch = merge.keep.shape[0]
    wanted = {"keep": (batch, tokens - r), "src": (batch, r), "dst": (batch, r)}
    for part, shape in wanted.items():
        index = getattr(merge, part)
        if tuple(index.shape) != shape or index.dtype != torch.int64:
            raise ValueError(
                f"the matching {name} gave {part} of shape {tuple(index.shape)}, {index.dtype}, and for r={r} of "
                f"{tokens} tokens it must be {shape}, torch.int64"
            )
    if not backends.can_look_at(merge.keep):
        return
    everyone = torch.cat([merge.keep, merge.src], 1).sort(1).values
    if not everyone.equal(torch.arange(tokens, device=everyone.device).expand(batch, -1)):
        raise ValueError(f"the matching {name} must name each of the {tokens} tokens once, in keep or in src")
    if not merge.keep[:, :num_prefix].equal(torch.arange(num_prefix, device=everyone.device).expand(batch, -1)):
        raise ValueError(
            f"the matching {name} must keep the first {num_prefix} tokens first: the prefix does not merge"
        )
    if r and not (num_prefix <= merge.dst.min() and merge.dst.max() < tokens - r):
        raise ValueError(
            f"the matching {name} joins tokens to {merge.dst.min()} to {merge.dst.max()}, and of those that stay they "
            f"may join {num_prefix} to {tokens - r - 1}"
        )


def _take(key: Tensor, index: Tensor) -> Tensor:
    """The keys at the positions (S,) in every image, or (B, S) in each."""
    return key.index_select(1, index) if index.ndim == 1 else rows(key, index)

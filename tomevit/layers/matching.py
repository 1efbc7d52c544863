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
import torch.nn.functional as F
from torch import Tensor

from tomevit.layers import backends
from tomevit.layers.merge import Merge, rows

Matching = Callable[[Tensor, int, int], Merge]


@torch.no_grad()
def bipartite_soft_matching(key: Tensor, r: int, num_prefix: int) -> Merge:
    """Bipartite soft matching (ToMe, section 3): even tokens each find their most similar odd one; the r best merge.

    Even and odd count from the first token, prefix included, so that weights trained with merging see the same sets.
    """
    match = torch.ops.tomevit.bipartite_soft_matching if backends.hides_merging(key) else _bipartite
    return Merge(*match(key, r, num_prefix))


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


@torch.no_grad()
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


@torch.no_grad()
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
    key = F.normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1)
    with torch.autocast(key.device.type, enabled=False):
        scores = _take(key, src) @ _take(key, dst).mT  # (B, S, T)
    similarity, nearest = scores.max(-1)  # (B, S)
    order = similarity.argsort(dim=-1, descending=True, stable=True)  # stable: ties go to the earlier token
    merged, stays = order[:, :r], order[:, r:].sort(-1).values
    src_of = src.__getitem__ if src.ndim == 1 else partial(src.gather, 1)
    return Merge(
        keep=torch.cat([prefix.expand(batch, -1), src_of(stays), dst.expand(batch, -1)], 1),
        src=src_of(merged),
        dst=nearest.gather(1, merged) + (num_prefix + src.shape[-1] - r),
    )


def _take(key: Tensor, index: Tensor) -> Tensor:
    """The keys at the positions (S,) in every image, or (B, S) in each."""
    return key.index_select(1, index) if index.ndim == 1 else rows(key, index)

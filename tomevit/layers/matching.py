"""Which tokens merge. Each function looks at what it asks for, and returns a Merge; a new algorithm is one more.

    @needs("key", "size")
    def function(key, size, r, num_prefix) -> Merge

Before r and num_prefix it is given, in that order, what it needs: NEEDS has the names. One that declares nothing gets
the keys.

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

Matching = Callable[..., Merge]

#: What a matching may look at.
NEEDS = {
    "key": "(B, N, C) floating: attention keys, averaged over the heads, not rotated",
    "x": "(B, N, D) floating: the tokens after attention",
    "size": "(B, N, 1) float32: initial tokens per token",
    "importance": "(B, N) floating: the class token's attention to each token, averaged over the heads; without a "
    "class token one less its mean cosine to all patches",
    "drop": "int: tokens to leave out, beside the r that merge",
    "grid": "(int, int) or None: patches along height and width, while all are there",
    "depth": "float: blocks before this one, as a share of all",
}


def needs(*names: str) -> Callable[[Matching], Matching]:
    """Declare what a matching looks at, names of `NEEDS`: it gets that, in that order, and no more.

    Raises:
        ValueError: a name is not among them.
    """
    if unknown := [name for name in names if name not in NEEDS]:
        raise ValueError(f"a matching cannot need {unknown[0]!r}; there is {', '.join(NEEDS)}")

    def declare(matching: Matching) -> Matching:
        matching.needs = names  # type: ignore[attr-defined]
        return matching

    return declare


def needs_of(matching: Matching) -> tuple[str, ...]:
    """What a matching looks at, as it declares it; of one that declares nothing, the keys."""
    return getattr(matching, "needs", ("key",))


def bipartite_soft_matching(key: Tensor, r: int, num_prefix: int) -> Merge:
    """Bipartite soft matching (ToMe, section 3): even tokens each find their most similar odd one; the r best merge.

    Even and odd count from the first token, prefix included, so that weights trained with merging see the same sets.
    """
    match = torch.ops.tomevit.bipartite_soft_matching if r > 0 and backends.hides_merging(key) else _bipartite
    return Merge(*match(key.detach(), r, num_prefix))


def _bipartite(key: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    return _join_most_similar(key, *_even_and_odd(key, num_prefix), r, num_prefix)


def _even_and_odd(key: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(key.shape[1], device=key.device)
    return position[num_prefix + num_prefix % 2 :: 2], position[num_prefix + 1 - num_prefix % 2 :: 2]


def every_kth_matching(key: Tensor, r: int | None, num_prefix: int, k: int = 4) -> Merge:
    """Every k-th patch stays; of the others the r most similar to one of those join it, with r = None all of them.

    Up to a share 1 - 1/k can merge at once, at a coarser match than the bipartite one (`kth_bipartite_soft_matching`
    in facebookresearch/ToMe, here with the prefix protected and the patches after the last k-th one not lost).
    """
    patches = key.shape[1] - num_prefix
    k = min(k, patches)
    position = torch.arange(num_prefix, key.shape[1], device=key.device)
    whole = patches // k * k  # after the last k-th patch others may remain
    groups = position[:whole].view(-1, k)
    src, dst = torch.cat([groups[:, :-1].flatten(), position[whole:]]), groups[:, -1]
    return Merge(*_join_most_similar(key, src, dst, len(src) if r is None else r, num_prefix))


def random_matching(key: Tensor, r: int, num_prefix: int) -> Merge:
    """Patches drawn at random, r in each image, join the most similar of the rest: the baseline for a matching.

    Draws from torch's default generator: seed it for equal results.
    """
    noise = torch.rand(key.shape[0], key.shape[1] - num_prefix, device=key.device, dtype=torch.float32)
    draw = noise.argsort(-1) + num_prefix
    src, dst = draw[:, :r].sort(-1).values, draw[:, r:].sort(-1).values
    return Merge(*_join_most_similar(key, src, dst, r, num_prefix))


@needs("key", "importance")
def importance_matching(key: Tensor, importance: Tensor, r: int, num_prefix: int) -> Merge:
    """Bipartite soft matching in which important tokens stay themselves.

    The pairs are those of `bipartite_soft_matching`. The r best are chosen by their similarity less the importance of
    the token that would join, as a share of the most that a patch of its image has.
    """
    match = torch.ops.tomevit.importance_matching if r > 0 and backends.hides_merging(key) else _important
    return Merge(*match(key.detach(), importance, r, num_prefix))


def _important(key: Tensor, importance: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    src, dst = _even_and_odd(key, num_prefix)
    most = importance[:, num_prefix:].topk(1).values  # not amax, which some runtimes lack
    return _join_most_similar(key, src, dst, r, num_prefix, importance.index_select(1, src) / most)


@needs("x", "importance", "drop")
def diffrate_matching(x: Tensor, importance: Tensor, drop: int, r: int, num_prefix: int) -> Merge:
    """The least important are dropped, and of the others the r least important join the most similar one that stays.

    Similarity is the cosine of the tokens themselves; the mean is plain, and a token that joins brings its weight times
    its similarity, as the code that the published accuracies belong to does it (`OpenGVLab/DiffRate@91ae3e3`,
    DiffRate/patch/deit.py and merge.py; here a negative similarity counts as none, which there has no logarithm).
    """
    match = torch.ops.tomevit.diffrate_matching if r > 0 and backends.hides_merging(x) else _diffrate
    return Merge(*match(x.detach(), importance, drop, r, num_prefix))


def _diffrate(
    x: Tensor, importance: Tensor, drop: int, r: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keep, src, dst, similarity = _join_least(x, importance, drop, r, num_prefix)
    return keep, src, dst, similarity.clamp(min=0.0)


def _join_least(
    x: Tensor, importance: Tensor, drop: int, r: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The least important are left out, the next r join the most similar (cosine) of those that stay; their cosines."""
    unimportance = -importance[:, num_prefix:]
    _, alive = _most(unimportance, drop)
    joining, staying = _most(unimportance.gather(1, alive), r)
    src, keep = alive.gather(1, joining) + num_prefix, alive.gather(1, staying) + num_prefix
    similarity, nearest = _nearest(_normed(x), src, keep)
    prefix = torch.arange(num_prefix, device=x.device).expand(x.shape[0], -1)
    return _side_by_side(prefix, keep), src, nearest + num_prefix, similarity


@needs("x")
def redundant_matching(x: Tensor, r: int, num_prefix: int) -> Merge:
    """The r patches that are most like all others join the most similar one that stays.

    How much a patch is like the others is the mean of its cosines to them, on the tokens themselves. Other than in
    bipartite matching any patch may leave, and other than in PiToMe every one that stays may take it in.
    """
    match = torch.ops.tomevit.redundant_matching if r > 0 and backends.hides_merging(x) else _redundant
    return Merge(*match(x.detach(), r, num_prefix))


def _redundant(x: Tensor, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    return _join_least(x, unlikeness(x, num_prefix), 0, r, num_prefix)[:3]


def unlikeness(x: Tensor, num_prefix: int) -> Tensor:
    """One less the mean cosine of each token to all patches: (B, N) float32 or float64, for x (B, N, D)."""
    normed = _normed(x)
    # The mean of the cosines is the product with the mean of the directions: no N x N scores.
    return 1 - (normed * normed[:, num_prefix:].mean(1, keepdim=True)).sum(-1)


@needs("key", "depth")
def pitome_matching(key: Tensor, depth: float, r: int, num_prefix: int) -> Merge:
    """Of the 2r tokens that are most like many others, every second joins the most similar of those between.

    How much a token is like the others is its energy: the mean over all of ELU(cosine - m), where the margin m falls
    from 0.75 at the first block towards 0 at the last (PiToMe, arXiv:2405.16148). All other tokens are protected.
    """
    match = torch.ops.tomevit.pitome_matching if r > 0 and backends.hides_merging(key) else _pitome
    return Merge(*match(key.detach(), depth, r, num_prefix))


def _pitome(key: Tensor, depth: float, r: int, num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    if r == 0:
        keep = torch.arange(key.shape[1], device=key.device).expand(key.shape[0], -1)
        return keep, keep[:, :0], keep[:, :0]
    normed = _normed(key)
    patches = normed[:, num_prefix:]
    with backends.without_autocast(patches):
        energy = F.elu(patches @ patches.transpose(1, 2) - 0.75 * (1 - depth)).mean(2)
    ranked, protected = _most(energy, 2 * r)
    if backends.is_recorded():  # where they are by position
        ranked = ranked.gather(1, energy.gather(1, ranked).topk(2 * r).indices)
    src, dst = ranked[:, ::2] + num_prefix, _ascending(ranked[:, 1::2]) + num_prefix
    _, nearest = _nearest(normed, src, dst)
    prefix = torch.arange(num_prefix, device=key.device).expand(key.shape[0], -1)
    return _side_by_side(prefix, protected + num_prefix, dst), src, nearest + key.shape[1] - 2 * r


@needs("x", "grid")
def grid_matching(x: Tensor, grid: tuple[int, int] | None, r: int, num_prefix: int) -> Merge:
    """Neighbours become one, 2 x 2: no similarity, no sort, and what is left is a grid of half the height and width.

    Along an odd edge the last cells have two patches or one.

    Raises:
        ValueError: there is no whole grid any more, or r is not what merges of it.
    """
    height, width = grid or (0, 0)
    columns = (width + 1) // 2
    left = (height + 1) // 2 * columns
    if grid is None or r != height * width - left:
        raise ValueError(f"2x2 neighbours merge once and all together: r=[0, 0, 'grid'], not {r} of {grid} patches")
    position = torch.arange(num_prefix, x.shape[1], device=x.device).view(height, width)
    cell = torch.arange(num_prefix, num_prefix + left, device=x.device).view(-1, columns)
    first, right, below, last = (position[i::2, j::2] for i in (0, 1) for j in (0, 1))
    cells = cell[:, : right.shape[1]], cell[: below.shape[0]], cell[: below.shape[0], : right.shape[1]]
    keep, src, dst = (
        torch.cat([each.flatten() for each in parts]).expand(x.shape[0], -1)
        for parts in ((torch.arange(num_prefix, device=x.device), first), (right, below, last), cells)
    )
    return Merge(keep, src, dst)


MATCHINGS: dict[str, Matching] = {
    "bipartite": bipartite_soft_matching,
    "every_kth": every_kth_matching,
    "random": random_matching,
    "importance": importance_matching,
    "diffrate": diffrate_matching,
    "redundant": redundant_matching,
    "pitome": pitome_matching,
    "grid": grid_matching,
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
    if matching == "grid":
        raise ValueError(
            "matching='grid' merges once, in a block that r names, as in r=[0, 0, 'grid'] or r='1.5x grid'"
        )
    return MATCHINGS[matching]


# Operators for `backends.hides_merging`. Their results may not share memory, as empty ones do: hence r > 0 above.
bipartite_op = torch.library.custom_op("tomevit::bipartite_soft_matching", _bipartite, mutates_args=())
importance_op = torch.library.custom_op("tomevit::importance_matching", _important, mutates_args=())
pitome_op = torch.library.custom_op("tomevit::pitome_matching", _pitome, mutates_args=())
redundant_op = torch.library.custom_op("tomevit::redundant_matching", _redundant, mutates_args=())
diffrate_op = torch.library.custom_op("tomevit::diffrate_matching", _diffrate, mutates_args=())


def _empty(x: Tensor, drop: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    keep, src, dst = (x.new_empty(batch, count, dtype=torch.int64) for count in (tokens - drop - r, r, r))
    return keep, src, dst


@bipartite_op.register_fake
def _(key: Tensor, r: int, _: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(key, 0, r)


@redundant_op.register_fake
def _(x: Tensor, r: int, _: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, 0, r)


@importance_op.register_fake
def _(key: Tensor, _: Tensor, r: int, __: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(key, 0, r)


@pitome_op.register_fake
def _(key: Tensor, _: float, r: int, __: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(key, 0, r)


@diffrate_op.register_fake
def _(x: Tensor, _: Tensor, drop: int, r: int, __: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty(x, drop, r), x.new_empty(x.shape[0], r, dtype=backends.at_least_float32(x.dtype))


def _join_most_similar(
    key: Tensor, src: Tensor, dst: Tensor, r: int, num_prefix: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens at positions src, the r that are most similar (cosine) to one at positions dst join it.

    Args:
        key: (B, N, C).
        src, dst: (S,), or (B, S) where they differ by image.
        r: tokens to merge.
        num_prefix: tokens at the front that stay.
        importance: (B, S), what is taken off the similarity of each at src.
    """
    batch = key.shape[0]
    prefix = torch.arange(num_prefix, device=key.device)
    if r == 0:
        keep = torch.cat([index.expand(batch, -1) for index in (prefix, src, dst)], 1)
        return keep, keep[:, :0], keep[:, :0]
    similarity, nearest = _nearest(_normed(key), src, dst)
    merged, stays = _most(similarity if importance is None else similarity - importance, r)
    src_of = src.__getitem__ if src.ndim == 1 else partial(src.gather, 1)
    slot = torch.arange(num_prefix + src.shape[-1] - r, key.shape[1] - r, device=key.device)  # of each at dst
    return (
        # Of an empty prefix torch's older ONNX exporter would take -1 for 1.
        _side_by_side(prefix.expand(batch, num_prefix), src_of(stays), dst.expand(batch, -1)),
        src_of(merged),
        slot[nearest.gather(1, merged)],
    )


def _normed(x: Tensor) -> Tensor:
    # float32 before the norm: squares of float16 overflow from 256 on.
    x = x.detach().to(backends.at_least_float32(x.dtype))
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _nearest(normed: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """For each token at src, (S,) or (B, S), the cosine to the most similar at dst, and its index there: (B, S)."""
    with backends.without_autocast(normed):
        scores = _take(normed, src) @ _take(normed, dst).transpose(1, 2)  # (B, S, T)
    if not backends.is_recorded():
        return scores.max(-1)
    nearest = scores.argmax(-1)
    return scores.gather(2, nearest[:, :, None]).squeeze(2), nearest


def _most(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of values (B, S) the indices (B, count) of the largest, and (B, S - count) of the others, those ascending."""
    if count == 0:
        everyone = torch.arange(values.shape[1], device=values.device).expand(values.shape[0], -1)
        return everyone[:, :0], everyone
    return (_largest_by_topk if backends.is_recorded() else _largest)(values, count)


def _ascending(index: Tensor) -> Tensor:
    """An index (B, n), sorted."""
    return (-index).topk(index.shape[1]).values.neg() if backends.is_recorded() else index.sort(-1).values


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
    order = similarity.argsort(dim=-1, descending=True, stable=True)  # stable: ties go to the earlier token
    return order[:, :r], order[:, r:].sort(-1).values


def _largest_by_topk(similarity: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """`_largest`, for runtimes without a stable sort: where values are equal, their topk takes whichever it likes."""
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
    """Raises ValueError unless a merge of a matching of the user's own takes away r tokens, none of the prefix."""
    name = getattr(matching, "__name__", repr(matching))
    batch, joining = merge.keep.shape[0], merge.src.shape[-1]
    wanted = {"keep": (batch, tokens - r), "src": (batch, min(joining, r)), "dst": (batch, joining)}
    for part, shape in wanted.items():
        index = getattr(merge, part)
        if tuple(index.shape) != shape or index.dtype != torch.int64:
            raise ValueError(
                f"the matching {name} gave {part} of shape {tuple(index.shape)}, {index.dtype}, and for r={r} of "
                f"{tokens} tokens it must be {shape}, torch.int64"
            )
    if merge.similarity is not None and merge.similarity.shape != merge.src.shape:
        raise ValueError(
            f"the matching {name} gave similarity of shape {tuple(merge.similarity.shape)}, and src of "
            f"{tuple(merge.src.shape)}: each token that joins has one"
        )
    if not backends.can_look_at(merge.keep):
        return
    everyone = torch.cat([merge.keep, merge.src], 1).sort(1).values
    if not (everyone[:, 1:] > everyone[:, :-1]).all() or everyone.min() < 0 or everyone.max() >= tokens:
        raise ValueError(
            f"the matching {name} must name each of the {tokens} tokens once, in keep or in src, or leave it out, "
            f"which drops it"
        )
    if not merge.keep[:, :num_prefix].equal(torch.arange(num_prefix, device=everyone.device).expand(batch, -1)):
        raise ValueError(
            f"the matching {name} must keep the first {num_prefix} tokens first: the prefix does not merge"
        )
    if joining and not (num_prefix <= merge.dst.min() and merge.dst.max() < tokens - r):
        raise ValueError(
            f"the matching {name} joins tokens to {merge.dst.min()} to {merge.dst.max()}, and of those that stay they "
            f"may join {num_prefix} to {tokens - r - 1}"
        )


def _take(key: Tensor, index: Tensor) -> Tensor:
    """The keys at the positions (S,) in every image, or (B, S) in each."""
    return key.index_select(1, index) if index.ndim == 1 else rows(key, index)

"""What must hold of every matching, every merge and every schedule, whatever the input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import images_for, relative_error, tiny
from tests.matchings import DETERMINISTIC, OWN, Case, case_of, cases
from tomevit import flops
from tomevit.config import Config
from tomevit.layers import (
    MATCHINGS,
    Merge,
    Tokens,
    bipartite_soft_matching,
    compose,
    every_kth_matching,
    mean_patch,
    merge_mean,
    merge_tokens,
    random_matching,
    resolve_schedule,
    slot_map,
    unmerge,
)
from tomevit.layers.matching import _largest, _largest_by_topk
from tomevit.schedule import Schedule


def equal(first: Merge, second: Merge) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # None is None


def images_of(merge: Merge, which: Any) -> Merge:
    return Merge(*(None if part is None else part[which] for part in merge))


def group_sums(size: Tensor, slots: Tensor, count: int) -> Tensor:
    """The sum over each group by the definition; what was dropped is in none."""
    return torch.stack([(size * (slots == m)[..., None]).sum(1) for m in range(count)], 1)


def group_means(x: Tensor, size: Tensor, slots: Tensor, count: int) -> Tensor:
    """The weighted mean of each group by the definition, image by image and group by group."""
    return torch.stack(
        [
            torch.stack(
                [
                    (x[b][slots[b] == m] * size[b][slots[b] == m]).sum(0) / size[b][slots[b] == m].sum()
                    for m in range(count)
                ]
            )
            for b in range(len(x))
        ]
    )


# ---------------------------------------------------------------------------------------------------------- matchings


@pytest.mark.parametrize("matching", MATCHINGS)
@given(case=cases())
def test_every_token_stays_or_joins_once_and_the_prefix_does_neither(matching: str, case: Case) -> None:
    keep, src, dst, similarity = case.find(matching)
    batch, joining, dropped = len(case.key), case.merges(matching), case.drops(matching)
    assert src.shape == dst.shape == (batch, joining)
    assert keep.shape == (batch, case.tokens - joining - dropped)
    everyone = torch.cat([keep, src], 1).sort(1).values
    assert (everyone.diff(dim=1) > 0).all()
    assert (everyone >= 0).all()
    assert (everyone < case.tokens).all()
    if not dropped:
        assert torch.equal(everyone, torch.arange(case.tokens).expand(batch, -1))
    assert torch.equal(keep[:, : case.prefix], torch.arange(case.prefix).expand(batch, -1))
    assert (dst >= case.prefix).all()
    assert (dst < keep.shape[1]).all()
    if similarity is not None:
        assert similarity.shape == src.shape
        assert (similarity >= 0).all()


@pytest.mark.parametrize("matching", ["bipartite", "importance"])
@given(case=cases(min_patches=2))
def test_bipartite_order_is_prefix_even_odd(matching: str, case: Case) -> None:
    merge = case.find(matching)
    tokens, prefix = case.tokens, case.prefix
    odd = [i for i in range(prefix, tokens) if i % 2]
    assert (merge.src % 2 == 0).all()
    for keep, src in zip(merge.keep.tolist(), merge.src.tolist(), strict=True):
        even = [i for i in range(prefix, tokens) if i % 2 == 0 and i not in src]
        assert keep == [*range(prefix), *even, *odd]


@given(case=cases())
def test_every_kth_order_is_prefix_others_kth(case: Case) -> None:
    merge = every_kth_matching(case.key, case.r, case.prefix, k=3)
    tokens, prefix = case.tokens, case.prefix
    kth = list(range(prefix + 2, tokens, 3))
    for keep, src in zip(merge.keep.tolist(), merge.src.tolist(), strict=True):
        others = [i for i in range(prefix, tokens) if i not in kth and i not in src]
        assert keep == [*range(prefix), *others, *kth]


@pytest.mark.parametrize("matching", ["random", "diffrate", "grid"])
@given(case=cases())
def test_the_order_is_by_position_where_any_token_may_be_joined(matching: str, case: Case) -> None:
    merge = case.find(matching)
    assert merge.src.shape[1] == case.merges(matching)
    assert (merge.keep.diff(dim=1) > 0).all()


@given(case=cases())
def test_pitome_order_is_prefix_protected_joined(case: Case) -> None:
    keep = case.find("pitome").keep
    for part in (keep[:, : -case.r], keep[:, -case.r :]):
        assert (part.diff(dim=1) > 0).all()


@pytest.mark.parametrize("matching", [name for name in MATCHINGS if name != "grid"])  # it looks at positions alone
@given(case=cases())
def test_tokens_join_the_most_similar_and_the_most_similar_join(matching: str, case: Case) -> None:
    keep, src, dst, _ = case.find(matching)
    key = torch.nn.functional.normalize((case.x if matching == "diffrate" else case.key).double(), dim=-1)
    if matching in ("bipartite", "importance"):
        joinable = keep % 2 == 1
    elif matching == "every_kth":
        joinable = (keep - case.prefix) % 4 == 3
    elif matching == "pitome":
        joinable = (torch.arange(keep.shape[1]) >= keep.shape[1] - case.r).expand_as(keep)
    else:
        joinable = torch.ones_like(keep, dtype=torch.bool)
    joinable = joinable & (keep >= case.prefix)
    for b in range(len(key)):
        similarity = key[b] @ key[b, keep[b]].T
        similarity[:, ~joinable[b]] = -2
        best = similarity.max(1).values
        chosen = similarity[src[b], dst[b]]
        torch.testing.assert_close(chosen, best[src[b]], rtol=0, atol=1e-6)
        stays = keep[b][~joinable[b] & (keep[b] >= case.prefix)]
        if matching in ("bipartite", "every_kth", "random"):
            assert len(stays) == 0 or best[stays].max() <= chosen.min() + 1e-6


@given(case=cases(min_patches=2), kinds=st.integers(1, 4))
def test_ties_go_to_the_earlier_token(case: Case, kinds: int) -> None:
    # Keys along the axes have similarities of exactly 0 and 1, so that a plain loop knows who must win.
    batch, tokens = case.key.shape[:2]
    kind = torch.randint(kinds, (batch, tokens))
    key = torch.eye(kinds)[kind] * 3.0
    merge = bipartite_soft_matching(key, case.r, case.prefix)
    even = [i for i in range(case.prefix, tokens) if i % 2 == 0]
    odd = [i for i in range(case.prefix, tokens) if i % 2]
    for b in range(batch):
        same = {i: [j for j in odd if kind[b, j] == kind[b, i]] for i in even}
        order = sorted(even, key=lambda i: not same[i])[: case.r]
        assert merge.src[b].tolist() == order
        assert merge.keep[b][merge.dst[b]].tolist() == [(same[i] or odd)[0] for i in order]


@pytest.mark.parametrize("matching", DETERMINISTIC)
@pytest.mark.parametrize("tokens", [5, 198, 577])
def test_equal_keys_give_equal_merges_in_every_image(matching: str, tokens: int) -> None:
    key = torch.randn(64).expand(4, tokens, 64).contiguous()
    case = case_of(key, tokens // 2 - 1, 1)
    merge = replace(case, importance=torch.full_like(case.importance, 1 / tokens)).find(matching)
    assert equal(merge, images_of(merge, [0] * 4))
    if matching != "grid":
        assert (merge.dst == merge.dst[:, :1]).all()
    assert (merge.src.diff(dim=1) > 0).all()


@pytest.mark.parametrize("matching", DETERMINISTIC)
@given(case=cases())
def test_matching_is_deterministic_and_independent_of_the_batch(matching: str, case: Case) -> None:
    merge = case.find(matching)
    assert equal(merge, case.find(matching))
    backwards = list(range(len(case.key)))[::-1]
    assert equal(merge, images_of(case.images(backwards).find(matching), backwards))
    for b in range(len(case.key)):
        alone = slice(b, b + 1)
        assert equal(case.images(alone).find(matching), images_of(merge, alone))


@given(case=cases(), scale=st.sampled_from([1e-3, 7.0, 1e4]))
def test_similarity_ignores_the_length_of_keys(case: Case, scale: float) -> None:
    key = torch.eye(8)[torch.randint(8, case.key.shape[:2])]
    merge = bipartite_soft_matching(key, case.r, case.prefix)
    assert equal(merge, bipartite_soft_matching(key * scale, case.r, case.prefix))


def test_random_matching_follows_the_seed() -> None:
    key = torch.randn(4, 101, 8)
    first, other = random_matching(key, 40, 1), random_matching(key, 40, 1)
    assert not equal(first, other)
    torch.manual_seed(0)
    key = torch.randn(4, 101, 8)
    assert equal(first, random_matching(key, 40, 1))
    assert not torch.equal(first.src[0], first.src[1])


@given(case=cases(min_patches=5), k=st.integers(2, 5))
def test_every_kth_merges_all_others_and_loses_none(case: Case, k: int) -> None:
    patches = case.key.shape[1] - case.prefix
    merge = every_kth_matching(case.key, None, case.prefix, k)
    merged, size = merge_mean(case.x, case.size, merge)
    assert merged.shape[1] == case.prefix + patches // k
    assert torch.equal(size.sum(1), case.size.sum(1))


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("patches", [1, 2, 3, 4, 5])
def test_few_patches_merge_as_far_as_a_schedule_allows(matching: str, prefix: int, patches: int) -> None:
    key = torch.randn(2, prefix + patches, 8)
    for drop in range(patches if matching == "diffrate" else 1):
        for r in range((patches - drop) // 2 + 1):
            keep, src, *_ = case_of(key, r, prefix, drop=drop).find(matching)
            everyone = torch.cat([keep, src], 1).sort(1).values
            assert everyone[:, :prefix].tolist() == [list(range(prefix))] * 2
            assert everyone.shape[1] == prefix + patches - drop
            if not drop:
                assert everyone.tolist() == [list(range(prefix + patches))] * 2


# ------------------------------------------------------------------------------------------------------------- merges


@pytest.mark.parametrize("matching", MATCHINGS)
@given(case=cases())
def test_merging_then_unmerging_gives_group_means(matching: str, case: Case) -> None:
    merge = case.find(matching)
    merged, size = merge_mean(case.x, case.size, merge)
    slots = slot_map(merge, case.tokens)
    there = slots >= 0
    assert (~there).sum(1).eq(case.drops(matching)).all()
    assert torch.equal(size.sum(1), (case.size * there[..., None]).sum(1))
    assert (size > 0).all()
    assert torch.equal(group_sums(case.size, slots, merged.shape[1]), size)
    assert torch.equal(merged[:, : case.prefix], case.x[:, : case.prefix])
    assert torch.equal(size[:, : case.prefix], case.size[:, : case.prefix])
    means = group_means(case.x, case.size, slots, merged.shape[1])
    torch.testing.assert_close(merged, means, rtol=0, atol=1e-13)
    unmerged = unmerge(Tokens(merged, size, slots))
    expected = means.gather(1, slots.clamp(min=0)[..., None].expand_as(unmerged)) * there[..., None]
    torch.testing.assert_close(unmerged, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("matching", MATCHINGS)
@given(case=cases(min_patches=32))
def test_slot_maps_compose(matching: str, case: Case) -> None:
    initial, start = case.x, torch.arange(case.tokens).expand(len(case.key), -1)
    traced, composed = Tokens(initial, None, start), start
    case = replace(case, r=(case.tokens - case.prefix - case.drops(matching)) // 2)
    for _ in range(3):
        merge = case.find(matching)
        composed = compose(composed, slot_map(merge, case.tokens))
        traced = merge_tokens(traced, merge)
        case = case.behind(matching, traced.x, traced.size)
    assert torch.equal(traced.slots, composed)
    ones = torch.ones(len(case.key), composed.shape[1], 1)
    assert torch.equal(group_sums(ones, composed, traced.x.shape[1]), traced.size)
    if matching != "diffrate":  # its means are plain
        # Merging step by step, weighted by size, is averaging the initial tokens at once.
        means = group_means(initial, ones.double(), composed, traced.x.shape[1])
        torch.testing.assert_close(traced.x, means, rtol=0, atol=1e-12)


@given(case=cases())
def test_with_similarities_the_mean_is_plain_and_weights_are_no_counts(case: Case) -> None:
    merge = case.find("diffrate")
    slots, count = slot_map(merge, case.tokens), merge.keep.shape[1]
    for weight in (None, case.size * 0.7):
        tokens = merge_tokens(Tokens(case.x, case.size, weight=weight), merge)
        plain = group_means(case.x, torch.ones_like(case.size), slots, count)
        torch.testing.assert_close(tokens.x, plain, rtol=0, atol=1e-13)
        assert torch.equal(tokens.size, group_sums(case.size, slots, count))  # still counts patches
        brings = torch.ones_like(case.size[..., 0]).scatter(1, merge.src, merge.similarity)[..., None]
        weighed = group_sums((case.size if weight is None else weight) * brings, slots, count)
        torch.testing.assert_close(tokens.weight, weighed, rtol=1e-6, atol=0)
    # What merges by another matching later is weighed in step.
    again = merge_tokens(tokens, Merge(*bipartite_soft_matching(tokens.x, (count - case.prefix) // 2, case.prefix)))
    torch.testing.assert_close(again.weight.sum(1), tokens.weight.sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("matching", MATCHINGS)
def test_tokens_that_none_joins_do_not_change(matching: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 300, 8).to(dtype)
    size = torch.arange(1.0, 301.0)[:, None].expand(2, -1, -1)
    merge = case_of(x, 40, 1, drop=7).find(matching)
    merged, size_out = merge_mean(x, size, merge)
    unchanged = (size_out == size.gather(1, merge.keep[..., None])).squeeze(2)
    assert (unchanged.sum(1) >= merge.keep.shape[1] - merge.src.shape[1]).all()
    kept = x.gather(1, merge.keep[..., None].expand_as(merged))
    assert torch.equal(merged[unchanged], kept[unchanged])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_merging_never_overflows(dtype: torch.dtype, sign: int) -> None:
    largest = sign * (torch.finfo(dtype).max if dtype.itemsize == 2 else 65504.0)
    x = torch.full((2, 1025, 8), largest, dtype=dtype)
    tokens = Tokens(x)
    for _ in range(10):
        tokens = merge_tokens(tokens, bipartite_soft_matching(tokens.x, (tokens.x.shape[1] - 1) // 2, 1))
    assert tokens.x.shape[1] == 2
    assert tokens.size[:, 1:].eq(1024).all()
    if dtype.itemsize == 2:
        assert torch.equal(tokens.x, x[:, :2])
    else:
        # The weights of 512 tokens that join one, each rounded to float32.
        torch.testing.assert_close(tokens.x, x[:, :2], rtol=512 * 2**-24, atol=0)


@pytest.mark.parametrize("matching", DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matching_half_precision_keys_near_overflow(matching: str, dtype: torch.dtype) -> None:
    direction = torch.eye(6)[torch.randint(6, (2, 40))]
    merge = case_of((direction * 60000).to(dtype), 15, 1, drop=4).find(matching)
    assert equal(merge, case_of(direction, 15, 1, drop=4).find(matching))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    # bfloat16 counts to 256 and float16 to 2048 before they skip numbers.
    x = torch.randn(1, 5001, 4, dtype=dtype)
    tokens = Tokens(x)
    while tokens.x.shape[1] > 3:
        merge = bipartite_soft_matching(tokens.x, (tokens.x.shape[1] - 1) // 2, 1)
        tokens = merge_tokens(tokens, merge)
        assert tokens.size.dtype == torch.float32
        assert tokens.size.double().sum() == 5001
        assert tokens.x.dtype == dtype
    assert tokens.size.max() > 2048


def test_identical_tokens_merge_without_change() -> None:
    x = torch.randn(2, 1, 6, dtype=torch.float64).expand(2, 31, 6).contiguous()
    merged, _ = merge_mean(x, torch.randint(1, 9, (2, 31, 1)).float(), bipartite_soft_matching(x, 15, 1))
    torch.testing.assert_close(merged, x[:, :16], rtol=0, atol=1e-14)


def test_gradients_reach_every_token_by_its_share() -> None:
    x = torch.randn(2, 21, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 9, (2, 21, 1)).float()
    merge = bipartite_soft_matching(x, 7, 1)
    merged, size_out = merge_mean(x, size, merge)
    merged.sum().backward()
    slots = slot_map(merge)[..., None]
    torch.testing.assert_close(x.grad, (size / size_out.gather(1, slots)).double().expand_as(x))
    assert torch.autograd.gradcheck(lambda x: merge_mean(x, size, merge)[0], x)


def test_unmerging_what_was_not_traced_is_an_error() -> None:
    model = tiny(8)
    with torch.inference_mode():
        tokens = model.forward_features(images_for(model), trace=False)
    with pytest.raises(ValueError, match="trace=True"):
        unmerge(tokens)


# ---------------------------------------------------------------------------------------------------------- schedules

SCHEDULES = st.one_of(
    st.integers(0, 200),
    st.tuples(st.integers(0, 100), st.floats(-1, 1)),
    st.lists(st.integers(0, 100), max_size=6),
    st.floats(0, 0.5, exclude_min=True),
)


@settings(max_examples=500)
@given(r=SCHEDULES, patches=st.integers(1, 300), prefix=st.integers(0, 6))
def test_at_most_half_of_the_patches_merge_in_a_block(r: Schedule, patches: int, prefix: int) -> None:
    schedule = resolve_schedule(r, 6, patches + prefix, prefix)
    assert len(schedule) == 6
    left = patches
    for merged in schedule:
        assert type(merged) is int
        assert 0 <= merged <= left // 2
        left -= merged
    assert left >= 1


@given(r=st.integers(0, 60), inflection=st.floats(-1, 1), depth=st.integers(2, 32))
def test_inflected_schedules_keep_their_mean_and_their_slope(r: int, inflection: float, depth: int) -> None:
    schedule = resolve_schedule((r, inflection), depth, 10**6, 1)
    # Each block's count is rounded down, the first and the last to integers that mirror each other.
    assert r * depth - depth < sum(schedule) <= r * depth
    assert schedule[0] + schedule[-1] in (2 * r, 2 * r - 1)
    steps = [after - before for before, after in itertools.pairwise(schedule)]
    assert all(step >= 0 for step in steps) or all(step <= 0 for step in steps)


def test_schedule_forms() -> None:
    assert resolve_schedule(5, 3, 101, 1) == (5, 5, 5)
    assert resolve_schedule((5, 0.0), 3, 101, 1) == (5, 5, 5)
    assert resolve_schedule((10, -1.0), 3, 101, 1) == (20, 10, 0)
    assert resolve_schedule((10, 1), 3, 101, 1) == (0, 10, 20)
    assert resolve_schedule([7], 3, 101, 1) == (7, 0, 0)
    assert resolve_schedule([], 3, 101, 1) == (0, 0, 0)
    assert resolve_schedule([7, 5], 3, 101, 1) == (7, 5, 0)  # a list of two is no (r, inflection)
    assert resolve_schedule([7, 1], 2, 101, 1) == (7, 1)
    assert resolve_schedule(0.25, 3, 101, 1) == (25, 18, 14)
    assert resolve_schedule(10**6, 3, 101, 1) == (50, 25, 12)
    assert resolve_schedule((8, -1.0), 1, 101, 1) == (8,)
    assert resolve_schedule((2**63 - 1, -1.0), 3, 101, 1)[0] == 50
    numbers: list[Any] = [0.29, np.float64(0.29), Fraction(29, 100), 29, np.int8(29), (np.int64(29), Fraction(1, 2))]
    assert [resolve_schedule(r, 1, 101, 1) for r in numbers] == [(29,)] * len(numbers)


@given(patches=st.integers(2, 5000), data=st.data())
def test_a_share_loses_no_token_to_binary_rounding(patches: int, data: st.DataObject) -> None:
    merged = data.draw(st.integers(1, patches // 2))
    assert resolve_schedule(merged / patches, 1, patches, 0) == (merged,)
    share = data.draw(st.decimals("0.0001", "0.5", places=4))
    assert resolve_schedule(float(share), 1, patches, 0) == (int(share * patches),)


WRONG: list[Any] = [-1, True, None, {}, 1 + 2j, math.nan, 0.0, -0.1, 0.51, 8.0, math.inf]
WRONG += [[1] * 5, [1, -1], [1.0], [True], ["1"], [None], [0.5]]
WRONG += [(), (1,), (1, 2, 3), (1, 1.5), (1, -1.01), (1, math.nan), (1, None), (1, True), (1, "0")]
WRONG += [(1.0, 0.5), (-1, 0.0), (True, 0.0), range(4), torch.tensor(1.0)]
WRONG += [10**400, -(10**400), [10**400], (10**400, -1.0), (8, 10**400), Fraction(10**400, 3)]


@pytest.mark.parametrize("r", WRONG, ids=repr)
def test_wrong_schedules_are_value_errors(r: Any) -> None:
    with pytest.raises(ValueError, match=r"\br\b|inflection"):
        resolve_schedule(r, 4, 65, 1)
    model = tiny(3)
    with pytest.raises(ValueError, match=r"\br\b|inflection"):
        model.r = r
    assert model.r == 3


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("matching", OWN)
@pytest.mark.parametrize("r", [0, 4, 100, (8, -1.0), (8, 1.0), [20, 0, 7], 0.3], ids=repr)
@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"reg_tokens": 3}], ids=repr)
def test_token_counts_are_the_shapes(matching: str, r: Schedule, fields: dict[str, Any]) -> None:
    model = tiny(r, matching=matching, **fields)
    with torch.inference_mode():
        layers = model.forward_intermediates(images_for(model))
    counts = model.token_counts()
    assert counts[0] == model.config.num_tokens
    assert [tokens.x.shape[1] for tokens in layers] == list(counts[1:])
    assert model.token_counts(0) == (model.config.num_tokens,) * 5


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"reg_tokens": 3}], ids=repr)
def test_intermediates_trace_every_token(fields: dict[str, Any]) -> None:
    model = tiny((8, 0.5), **fields).double()
    images = images_for(model)
    prefix = model.config.num_prefix
    with torch.inference_mode():
        layers = model.forward_intermediates(images)
        last = model.forward_features(images)
        normed = model.forward_intermediates(images, norm=True)[-1]
    for tokens in layers:
        assert torch.equal(tokens.slots[:, :prefix], torch.arange(prefix).expand(3, -1))
        counted = torch.stack([torch.bincount(slots, minlength=tokens.x.shape[1]) for slots in tokens.slots])
        size = torch.ones_like(counted) if tokens.size is None else tokens.size[..., 0]
        assert torch.equal(counted.float(), size.float())
    assert all(a is b or torch.equal(a, b) for a, b in zip(normed, last, strict=True))  # None is None
    assert torch.equal(layers[-1].size, last.size)
    assert torch.equal(layers[-1].slots, last.slots)


@pytest.mark.parametrize("dist_token", [False, True], ids=["cls", "cls+dist"])
def test_unmerge_gives_the_full_grid_in_order(dist_token: bool) -> None:
    model = tiny(9, dist_token=dist_token)
    with torch.inference_mode():
        tokens = model.forward_features(images_for(model))
    grid = unmerge(tokens)
    assert grid.shape == (3, model.config.num_tokens, model.config.embed_dim)
    for b in range(3):
        for position, slot in enumerate(tokens.slots[b].tolist()):
            assert torch.equal(grid[b, position], tokens.x[b, slot])


def test_unmerge_puts_every_patch_back_where_it_was() -> None:
    # Quadrants of one colour each, without positions: only equals merge, and under proportional attention that changes
    # nothing, so that every patch must come back as it was.
    model = tiny(depth=2).double()
    with torch.no_grad():
        model.pos_embed.zero_()
    images = torch.randn(2, 3, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3).double()
    with torch.inference_mode():
        tokens = model.forward_features(images, r=[16, 8])
        plain = model.forward_features(images, r=0).x
    assert tokens.x.shape[1] == 65 - 24
    assert relative_error(plain[:, 1:2], plain[:, 64:]) > 1e-2
    torch.testing.assert_close(unmerge(tokens), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"pool": "avg"}], ids=repr)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_r_0_is_the_plain_model(fields: dict[str, Any], training: bool) -> None:
    model = tiny(**fields).train(training)
    images = images_for(model)
    plain, other = model(images), tiny(8, **fields).train(training)(images, r=0)
    assert plain is not other
    for ours, theirs in zip(plain, other, strict=True):
        assert torch.equal(ours, theirs)
    assert model.forward_features(images).size is None


@pytest.mark.parametrize("num_classes", [7, 0])
@pytest.mark.parametrize("r", [0, 9, [8, 0, 0, 8]], ids=repr)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dist_token": True},
        {"pool": "avg"},
        {"pool": "avg", "pool_norm": "after"},
        {"pool": "avg", "class_token": False},
        {"reg_tokens": 2, "qk_norm": True, "qkv_bias": False},
    ],
    ids=repr,
)
def test_forward_is_features_then_head(fields: dict[str, Any], r: Schedule, num_classes: int) -> None:
    """For the answer and for the gradients: forward leaves out what the head does not read in the last block."""
    model = tiny(r, num_classes=num_classes, **fields).double()
    images = images_for(model).requires_grad_()
    fast = model(images)
    fast.square().sum().backward()
    gradients = [images.grad, *(p.grad for p in model.parameters())]
    images.grad = None
    model.zero_grad()
    full = model.forward_head(model.forward_features(images))
    full.square().sum().backward()
    torch.testing.assert_close(fast, full, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, [images.grad, *(p.grad for p in model.parameters())], rtol=0, atol=1e-10)


@pytest.mark.parametrize("fields", [{}, {"class_token": False}, {"reg_tokens": 2}], ids=repr)
def test_average_pooling_weighs_tokens_by_size(fields: dict[str, Any]) -> None:
    model = tiny(12, pool="avg", **fields).double()
    prefix = model.config.num_prefix
    with torch.inference_mode():
        tokens = model.forward_features(images_for(model))
        pooled = mean_patch(tokens, prefix)
    torch.testing.assert_close(pooled, unmerge(tokens)[:, prefix:].mean(1), rtol=0, atol=1e-13)
    assert relative_error(tokens.x[:, prefix:].mean(1), pooled) > 1e-3


def test_average_pooling_does_not_overflow_float16() -> None:
    tokens = Tokens(torch.full((2, 30, 4), 65504.0, dtype=torch.float16), torch.full((2, 30, 1), 700.0))
    assert torch.equal(mean_patch(tokens, 1), tokens.x[:, 0])
    assert torch.equal(mean_patch(tokens._replace(size=None), 1), tokens.x[:, 0])


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"pool": "avg"}], ids=repr)
def test_an_image_is_classified_alone_as_in_a_batch(fields: dict[str, Any]) -> None:
    model = tiny(10, **fields)
    images = images_for(model, 5)
    with torch.inference_mode():
        logits, tokens = model(images), model.forward_features(images)
        for b in range(5):
            alone = model.forward_features(images[b : b + 1])
            assert torch.equal(alone.slots[0], tokens.slots[b])
            assert torch.equal(alone.size[0], tokens.size[b])
            assert relative_error(model(images[b : b + 1])[0], logits[b]) < 1e-5


def test_proportional_attention_makes_merging_duplicates_invisible() -> None:
    # Patches in pairs of equal neighbours without positions: as tokens they stay equal, so that merging each pair and
    # counting it twice leaves every other token as it was.
    images = torch.randn(2, 3, 8, 4).repeat_interleave(4, 2).repeat_interleave(8, 3)
    answers = {}
    for prop_attn in (True, False):
        model = tiny(prop_attn=prop_attn).double()
        with torch.no_grad():
            model.pos_embed.zero_()
        with torch.inference_mode():
            tokens = model.forward_features(images.double(), r=[32])
            assert tokens.size[:, 1:].eq(2).all()
            answers[prop_attn] = model(images.double(), r=[32]), model(images.double(), r=0)
    torch.testing.assert_close(*answers[True], rtol=0, atol=1e-12)
    merged, plain = answers[False]
    assert relative_error(merged, plain) > 1e-3


@pytest.mark.parametrize("fields", [{}, {"dist_token": True}, {"pool": "avg"}], ids=repr)
def test_models_of_one_block(fields: dict[str, Any]) -> None:
    model = tiny((8, -1.0), depth=1, drop_path=0.1, **fields)
    images = images_for(model)
    assert model.token_counts() == (model.config.num_tokens, model.config.num_tokens - 8)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        torch.testing.assert_close(model(images), model.forward_head(tokens), rtol=0, atol=1e-5)
    assert tokens.x.shape[1] == model.config.num_tokens - 8
    assert model(images, r=[]).isfinite().all()


@pytest.mark.parametrize("matching", OWN)
def test_a_large_r_is_clamped_until_one_patch_is_left(matching: str) -> None:
    model = tiny(1000, depth=8, matching=matching)
    assert model.token_counts() == (65, 33, 17, 9, 5, 3, 2, 2, 2)
    with torch.inference_mode():
        tokens = model.forward_features(images_for(model))
    assert tokens.size[:, 1].eq(64).all()


def test_flops_fall_as_r_grows() -> None:
    costs = [flops(Config(), r) for r in range(0, 30, 5)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


# ------------------------------------------------------------------------------------------ no index leaves its image


@pytest.mark.parametrize("beyond", [-1, 9, 12, 10**6])
@pytest.mark.parametrize("part", ["keep", "src", "dst"])
def test_no_merge_reaches_into_another_image(part: str, beyond: int) -> None:
    tokens = Tokens(torch.randn(3, 9, 4))
    merge = bipartite_soft_matching(tokens.x, 3, 1)
    index = getattr(merge, part).clone()
    index[1, -1] = beyond
    for training in (False, True):
        with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|out of range"):
            merge_tokens(Tokens(tokens.x.clone().requires_grad_(training)), merge._replace(**{part: index}))


@pytest.mark.parametrize("patches", [[0, 64], [-1, 3]])
def test_visible_patches_are_the_image_s_own(patches: list[int]) -> None:
    model, (least, most) = tiny(1), patches
    assert model.config.num_patches == 64
    for mode in (torch.enable_grad, torch.inference_mode):
        with (
            mode(),
            pytest.raises(ValueError, match=f"visible names patches {least} to {most}, .* 0 to 63"),
        ):
            model.forward_features(images_for(model), visible=torch.tensor([patches] * 3))


def wrong_merges(merge: Merge) -> dict[str, Merge]:
    keep, src, dst, _ = merge
    return {
        "keep of shape": Merge(keep[:, 1:], src, dst),
        "src of shape .* torch.int32": Merge(keep, src.int(), dst),
        "each of the 65 tokens once": Merge(keep, src.roll(1, 0), dst),
        "keep the first 1 tokens first": Merge(keep.roll(1, 1), src, dst),
        "joins tokens to 0 to ": Merge(keep, src, dst * 0),
        "joins tokens to .* to 61, and of those that stay they may join 1 to 60": Merge(keep, src, dst * 0 + 61),
    }


@pytest.mark.parametrize("what", range(6))
def test_a_matching_of_the_users_own_is_checked(what: int) -> None:
    def mine(key: Tensor, r: int, num_prefix: int) -> Merge:
        return list(wrong_merges(bipartite_soft_matching(key, r, num_prefix)).values())[what]

    model = tiny(4, matching=mine, depth=2, pool="avg")
    assert model.config.num_tokens == 65
    message = list(wrong_merges(bipartite_soft_matching(torch.randn(3, 65, 4), 4, 1)))[what]
    with pytest.raises(ValueError, match=f"the matching mine .*{message}"):
        model(images_for(model))
    right = tiny(4, matching=lambda *args: bipartite_soft_matching(*args), depth=2, pool="avg")
    assert torch.equal(right(images_for(right)), tiny(4, depth=2, pool="avg")(images_for(right)))


@given(st.integers(1, 40), st.data())
def test_the_most_similar_by_topk_are_those_of_a_stable_sort(count: int, data: st.DataObject) -> None:
    values = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=count, max_size=count)
    similarity = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=3)))
    r = data.draw(st.integers(1, count))
    (merged, stays), (expected, others) = _largest_by_topk(similarity, r), _largest(similarity, r)
    assert torch.equal(merged.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(stays, others)

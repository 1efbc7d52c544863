"""Which schedules to try: the shortest path over blocks and tokens, and exchanges between two blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from tomevit.config import Config
from tomevit.schedule import Step
from tomevit.tasks.tune.costs import Array, Drift, Seconds, num_merging

T = TypeVar("T")

#: Numbers of patches that a path may go through; of more patches it goes in larger steps.
MOST_STATES = 200
#: Trade-offs between time and drift, over eight orders of magnitude.
WEIGHTS = 49


def shortest_paths(
    config: Config, seconds: Seconds, drift: Drift, matchings: Sequence[str | None]
) -> list[tuple[Step, ...]]:
    """The best schedule for each of many trade-offs, each once, the slowest first."""
    stride = -(-config.num_patches // MOST_STATES)
    gone = np.arange(0, config.num_patches, stride)
    times = np.full((len(matchings), len(gone), len(gone)), np.inf)
    for i, before in enumerate(gone):
        tokens = config.num_tokens - int(before)
        for j in range(i, len(gone)):
            fewer = int(gone[j] - before)
            if 2 * fewer > config.num_patches - before:
                break
            for m, matching in enumerate(matchings):
                times[m, i, j] = seconds.block(tokens, fewer, matching)
    drifts = np.stack([drift.tables[matching][:, gone] for matching in matchings])
    last = np.array([seconds.last(config.num_tokens - int(k)) for k in gone])
    if config.num_read is None:
        last = np.zeros(len(gone))
    scale = seconds.block(config.num_tokens) * config.depth / float(np.median(drifts[:, :, -1]))
    found: dict[tuple[Step, ...], None] = {}
    for weight in np.geomspace(1e4, 1e-4, WEIGHTS):
        path = shortest_path(times, drifts, last, scale * float(weight))
        steps = [
            Step(int(gone[j] - gone[i]), 0, matchings[m] if j > i else None)
            for (_, i), (m, j) in zip([(0, 0), *path], path, strict=False)
        ]
        found[*steps, *[Step()] * (config.depth - len(steps))] = None
    return sorted(found, key=seconds.forward, reverse=True)


def shortest_path(times: Array, drifts: Array, last: Array, weight: float) -> list[tuple[int, int]]:
    """The schedule of least seconds + weight · drift, block by block: by which matching, and to which state.

    Args:
        times: (M, S, S), seconds of a block by each matching from one state to another, which are so many tokens;
            infinite where there is no way.
        drifts: (M, blocks, S), what it costs to be in a state from that block on.
        last: (S,), seconds of what comes after those blocks.
        weight: seconds for one unit of drift.
    """
    states = np.arange(times.shape[1])
    best, back = np.full(len(states), np.inf), []
    best[0] = 0.0
    for block in range(drifts.shape[1]):
        at = weight * drifts[:, block]
        ways = times + at[:, None, :] - at[:, :, None]  # (M, from, to)
        by = ways.argmin(0)
        whole = best[:, None] + np.take_along_axis(ways, by[None], 0)[0]
        source = whole.argmin(0)
        best = whole[source, states]
        back.append((by[source, states], source))
    state, path = int((best + last).argmin()), []
    for by_state, source in reversed(back):
        path.append((int(by_state[state]), state))
        state = int(source[state])
    return path[::-1]


def exchanges(
    steps: Sequence[Step], config: Config, seconds: Seconds, matchings: Sequence[str | None]
) -> Iterator[tuple[Step, ...]]:
    """Schedules near one, that take no longer by the times of a block.

    Some tokens more merge in one block, and in another as many fewer as the time gained allows; or a block merges as
    many by another matching.
    """
    limit, blocks = seconds.forward(steps), range(num_merging(config))
    first = None if None in matchings else matchings[0]  # of a block where nothing merges yet

    def changed(i: int, more: int, j: int, fewer: int) -> tuple[Step, ...]:
        new = list(steps)
        new[i] = new[i]._replace(merge=new[i].merge + more) if new[i].total else Step(more, 0, first)
        left = new[j]._replace(merge=new[j].merge - fewer)
        new[j] = left if left.total else Step()
        return tuple(new)

    for more in sorted({max(1, config.num_patches // part) for part in (48, 24, 12, 6)}):
        for i in blocks:
            for j in blocks:
                if i == j or not steps[j].merge:
                    continue
                # One more that stays costs more time, so the most that may is found by halving.
                low, high = 0, steps[j].merge
                while low < high:
                    middle = (low + high + 1) // 2
                    ok = seconds.forward(changed(i, more, j, middle)) <= limit
                    low, high = (middle, high) if ok else (low, middle - 1)
                new = changed(i, more, j, low)
                if low and is_possible(new, config) and seconds.forward(new) <= limit:
                    yield new
    for i in blocks:
        for matching in matchings:
            if steps[i].merge and not steps[i].drop and steps[i].matching != matching:
                new = (*steps[:i], steps[i]._replace(matching=matching), *steps[i + 1 :])
                if seconds.forward(new) <= limit:
                    yield new


def is_possible(steps: Sequence[Step], config: Config) -> bool:
    """Whether each block has as many tokens as should merge in it."""
    patches = config.num_patches
    for step in steps:
        if step.drop >= max(1, patches) or 2 * step.merge > patches - step.drop:
            return False
        patches -= step.total
    return True


def undominated(those: Sequence[T], measures: Callable[[T], Sequence[float]]) -> list[T]:
    """Those to which no other is at least as good in all measures, of which less is better; of equals the first."""
    found = [(each, tuple(measures(each))) for each in those]
    kept = []
    for i, (each, ours) in enumerate(found):
        others = ((k, theirs) for k, (_, theirs) in enumerate(found) if k != i)
        if not any(
            all(b <= a for a, b in zip(ours, theirs, strict=True)) and (theirs != ours or k < i) for k, theirs in others
        ):
            kept.append(each)
    return kept


def spread(those: Sequence[T], seconds: Callable[[T], float], most: int) -> list[T]:
    """Of many a few, as evenly spaced over the ratio of their times as they are, the first and the last among them."""
    if len(those) <= most:
        return list(those)
    ranked = sorted(those, key=seconds)
    logs = np.log([seconds(each) for each in ranked])
    wanted = np.linspace(logs[0], logs[-1], most)
    return [ranked[i] for i in sorted({int(np.abs(logs - at).argmin()) for at in wanted})]

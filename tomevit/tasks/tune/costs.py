"""What a schedule will cost: seconds by one block's times, which are alike for all, and how far answers will move."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tomevit.config import Config
from tomevit.layers.merge import Tokens
from tomevit.measure.bounds import without_launches
from tomevit.measure.timing import WARMUP, turns
from tomevit.models import VisionTransformer
from tomevit.schedule import Step

Key = TypeVar("Key", bound=Hashable)
Array = npt.NDArray[np.float64]

#: At so many token counts a block is timed.
COUNTS = 20
#: In so many rounds: the curve through them needs no interval.
ROUNDS = 7
#: Blocks of which it is tried how far a merge there moves the answers; between them it is interpolated.
PROBED = 4


class BlockRun(NamedTuple):
    """One block, run on its own."""

    tokens: int  # that enter
    merge: int = 0
    matching: str | None = None  # None: the model's own
    last: bool = False  # the last block, of which the head reads a few tokens


def time_rounds(
    calls: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    tell: Callable[[int, int], object] = lambda *_: None,
) -> dict[Key, list[float]]:
    """The seconds of each call in every round, all taking turns. All timing of a search goes through here.

    Args:
        tell: told at the start and after each run how many are done, and of how many, warm-up included.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    total = len(calls) * (rounds + WARMUP)
    tell(0, total)
    for done, turn in enumerate(turns(calls, rounds=rounds, device=device), 1):
        if turn.counts:
            times[turn.key].append(turn.seconds)
        tell(done, total)
    return times


# ------------------------------------------------------------------------------------------------------------- seconds


def block_runs(config: Config, matchings: Sequence[str | None]) -> list[BlockRun]:
    """What is timed of a block: some twenty token counts, without merging, and with a quarter and half merged."""
    least = config.num_prefix + min(2, config.num_patches)
    counts = sorted({round(n) for n in np.linspace(least, config.num_tokens, COUNTS)})
    runs = [BlockRun(n) for n in counts]
    for n in counts:
        shares = {max(1, (n - config.num_prefix) // part) for part in (4, 2)}
        runs += [BlockRun(n, r, matching) for matching in matchings for r in sorted(shares)]
    return runs + [BlockRun(n, last=True) for n in counts if config.num_read is not None]


def time_blocks(
    ready: VisionTransformer,
    whole: Callable[[], object],
    matchings: Sequence[str | None],
    *,
    batch: int,
    captured: bool,
    tell: Callable[[int, int], object],
) -> tuple[dict[BlockRun, float], float]:
    """The median seconds of a middle block as it runs in a model, and of a whole forward that merges nothing.

    Args:
        ready: the model whose blocks run as they do in its mode.
        whole: the forward.
        matchings: names, None for the model's own.
        batch: images per call.
        captured: as graphs, where the device has such: without the time that starting its operators takes.
        tell: as `time_rounds` has it.
    """
    config, depth = ready.config, ready.config.depth
    draw = torch.Generator(ready.device).manual_seed(0)
    size = batch * config.num_tokens
    noise = torch.randn(size * config.embed_dim, generator=draw, device=ready.device, dtype=ready.dtype)
    ones = torch.ones(size, dtype=torch.float32, device=ready.device)
    rope = None if ready.rope is None else ready.rope.table

    def tokens(run: BlockRun) -> Tokens:
        n = run.tokens
        x = noise[: batch * n * config.embed_dim].view(batch, n, config.embed_dim)
        # Where tokens have merged before, attention weighs them, and each has a position of its own.
        counts = None if n == config.num_tokens else ones[: batch * n].view(batch, n, 1)
        merged = run.matching if run.matching is not None else config.matching
        weight = counts if merged == "diffrate" else None
        where = None if rope is None else rope[:, :n].expand(1 if counts is None else batch, -1, -1)
        return Tokens(x, counts, None, where, weight)

    def call(run: BlockRun) -> Callable[[], object]:
        block = ready.blocks[-1 if run.last else depth // 2]
        step = Step(run.merge, 0, run.matching, None, 0.0 if run.last else (depth // 2) / depth)
        return partial(block, tokens(run), step, config.num_read if run.last else None)

    calls: dict[BlockRun | None, Callable[[], object]] = {None: whole}
    calls |= {run: call(run) for run in block_runs(config, matchings)}
    if captured and ready.device.type == "cuda":
        pool = torch.cuda.graph_pool_handle()
        calls = {run: without_launches(each, ready.device, pool) for run, each in calls.items()}
    times = time_rounds(calls, rounds=ROUNDS, device=ready.device, tell=tell)
    medians = {run: median(found) for run, found in times.items()}
    of_whole = medians.pop(None)
    return {run: seconds for run, seconds in medians.items() if run is not None}, of_whole


class Seconds:
    """What schedules take, by the times of one block: between the counts that were timed, times lie on lines.

    Args:
        config: of the model.
        timed: as `time_blocks` found it.
        whole: seconds of a forward that merges nothing, of which what is not blocks takes the rest.
    """

    def __init__(self, config: Config, timed: Mapping[BlockRun, float], whole: float) -> None:
        self.config = config
        self._plain = self._curve({run.tokens: time for run, time in timed.items() if not run.merge and not run.last})
        self._last = self._plain
        if config.num_read is not None:
            self._last = self._curve({run.tokens: time for run, time in timed.items() if run.last})
        self._merging: dict[str | None, tuple[Array, Array]] = {}
        for matching in {run.matching for run in timed if run.merge}:
            runs = sorted((run, time) for run, time in timed.items() if run.merge and run.matching == matching)
            # Of one count the runs stand in the order of what merges; of few patches both are the same.
            few = self._curve({run.tokens: time for run, time in reversed(runs)})
            self._merging[matching] = few, self._curve({run.tokens: time for run, time in runs})
        self.rest = 0.0
        self.rest = max(0.0, whole - self.forward([Step()] * config.depth))

    def _curve(self, known: Mapping[int, float]) -> Array:
        counts = sorted(known)
        return np.interp(np.arange(self.config.num_tokens + 1), counts, [known[n] for n in counts])

    def block(self, tokens: int, fewer: int = 0, matching: str | None = None) -> float:
        """Seconds of a block that so many tokens enter, and so many fewer leave."""
        if not fewer:
            return float(self._plain[tokens])
        quarter, half = self._merging.get(matching, self._merging[None])
        share = fewer / (tokens - self.config.num_prefix)
        # What does not depend on how many merge, the matching itself, is in both.
        return max(0.0, float(quarter[tokens] + (4 * share - 1) * (half[tokens] - quarter[tokens])))

    def last(self, tokens: int) -> float:
        """Seconds of the last block, where nothing merges."""
        return float(self._last[tokens])

    def forward(self, steps: Sequence[Step]) -> float:
        """Seconds of a whole forward."""
        tokens, seconds = self.config.num_tokens, self.rest
        for step in steps[:-1] if self.config.num_read is not None else steps:
            seconds += self.block(tokens, step.total, step.matching)
            tokens = max(self.config.num_prefix + 1, tokens - step.total)
        return seconds + (self.last(tokens) if self.config.num_read is not None else 0.0)


# --------------------------------------------------------------------------------------------------------------- drift


class Probe(NamedTuple):
    """A schedule that merges in one place, to see what that costs."""

    block: int
    merged: int
    steps: tuple[Step, ...]


def probes(config: Config, matching: str | None) -> Iterator[Probe]:
    """Few blocks, evenly spaced, the first and the last that merge among them; and in each a quarter of the patches,
    half, and three quarters, for which the next block helps.

    What a merge costs changes smoothly with depth, and with the tokens about as a power of them: two or three amounts
    at four blocks say how. A third amount is there since budgets of 2x end with a quarter of the tokens or less.
    """
    blocks, patches = num_merging(config), config.num_patches
    for block in sorted({round(i) for i in np.linspace(0, blocks - 1, min(blocks, PROBED))}):
        before = (Step(),) * block
        for merged in sorted({max(1, patches // 4), patches // 2}):
            yield Probe(block, merged, (*before, Step(merged, 0, matching)))
        half, more = patches // 2, (patches - patches // 2) // 2
        if block + 1 < blocks and more:
            yield Probe(block, half + more, (*before, Step(half, 0, matching), Step(more, 0, matching)))


def num_merging(config: Config) -> int:
    """Blocks in which a merge changes what the head reads."""
    return config.depth - (config.num_read is not None)


class Drift:
    """How far answers move: for each block what it costs to have so many patches fewer from there on.

    A schedule moves them by the sum over its blocks of what the last of its merges there cost, since the most similar
    have merged before. Both are first guesses, which exchanges correct by what they measure.

    Args:
        config: of the model.
        measured: for each matching, what each probe, by block and merged, moved the answers.
    """

    def __init__(self, config: Config, measured: Mapping[str | None, Mapping[tuple[int, int], float]]) -> None:
        self.config = config
        self.tables = {matching: self._table(found) for matching, found in measured.items()}

    def _table(self, found: Mapping[tuple[int, int], float]) -> Array:
        """(blocks that merge, patches + 1): the logarithm is interpolated between blocks."""
        blocks = sorted({block for block, _ in found})
        rows = [self._row({merged: found[at, merged] for at, merged in found if at == block}) for block in blocks]
        table = np.zeros((num_merging(self.config), self.config.num_patches + 1))
        for merged in range(1, table.shape[1]):
            logs = [np.log(row[merged]) for row in rows]
            table[:, merged] = np.exp(np.interp(np.arange(len(table)), blocks, logs))
        return table

    def _row(self, found: Mapping[int, float]) -> Array:
        """(patches + 1,): lines between the logarithms, and powers beyond, from 1 to 4."""
        amounts = np.log(sorted(found))
        logs = np.maximum.accumulate(np.log([max(1e-12, found[amount]) for amount in sorted(found)]))
        slopes = np.diff(logs) / np.diff(amounts) if len(amounts) > 1 else np.array([2.0])
        first, last = np.clip((slopes[0], slopes[-1]), 1, 4)
        at = np.log(np.arange(1, self.config.num_patches + 1))
        inside = np.interp(at, amounts, logs)
        inside += first * np.minimum(0, at - amounts[0]) + last * np.maximum(0, at - amounts[-1])
        return np.concatenate([[0.0], np.exp(inside)])

    def of(self, steps: Sequence[Step]) -> float:
        """How far a schedule should move them."""
        gone, drift = 0, 0.0
        for block, step in enumerate(steps[: num_merging(self.config)]):
            if step.total:
                table = self.tables.get(step.matching, next(iter(self.tables.values())))
                drift += float(table[block, gone + step.total] - table[block, gone])
                gone += step.total
        return drift

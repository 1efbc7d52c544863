"""The best schedules for a model on its device, searched on a user's own images: `tomevit.tune`.

Blocks are alike, so the search is cheap. One block is timed at some twenty token counts; a few merges are tried to see
how far they move the answers; the shortest path over blocks and tokens is a first guess for each trade-off; exchanges
between two blocks, measured, correct it. What is left is measured on images held back, beside constant r.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.config import Config
from tomevit.flops import flops
from tomevit.measure.bench import MODES, twin
from tomevit.measure.defaults import default_r
from tomevit.measure.memory import explain_out_of_memory
from tomevit.measure.timing import Quartiles, ratio_interval
from tomevit.models import VisionTransformer, unwrap_transformer
from tomevit.schedule import Schedule, Step
from tomevit.tasks.tune import costs
from tomevit.tasks.tune.answers import Faithfulness, name_of
from tomevit.tasks.tune.costs import BlockRun, Drift, Seconds, num_merging, probes
from tomevit.tasks.tune.front import Front, Point, best_of, matchings_of
from tomevit.tasks.tune.record import Record
from tomevit.tasks.tune.search import exchanges, shortest_paths, spread, undominated
from tomevit.tasks.tune.setting import SEARCHED, check_arguments, choices, describe, num_searched
from tomevit.words import SHAPES

__all__ = ["Front", "Point", "tune"]

#: Values of a constant r that are measured.
CONSTANTS = 6
#: Of the paths so many are tried on the images.
PATHS = 16
#: So many schedules are improved by exchanges, and each by so many trials.
IMPROVED, TRIALS = 6, 8
#: By the times of a block a schedule must be so many times as fast as r = 0 to be worth a trial, and so many at most:
#: beyond, next to nothing is left of the images, and of few trials most had better be where people choose.
LEAST_SPEED_UP, MOST_SPEED_UP = 1.03, 3.0
#: So many that the search found are measured on the images held back.
FINALISTS = 12
#: What beside paths and constant r is tried, for every matching.
BUDGETS = ("1.25x", "1.5x", "2x")

T = TypeVar("T")
Tell = Callable[[str, int, int], object]


def tune(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch: int = 8,
    mode: str = "eager",
    matchings: Sequence[str] = SEARCHED,
    rounds: int = 20,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    progress: Tell | None = None,
) -> Front:
    """Measure which schedules are fastest and most faithful on the model's device, on these images.

    Half of the images, drawn at random, 128 at most, are searched on. All figures of the front are of the others, held
    back, and of whole forwards that take turns with r = 0, with constant r and with the presets of the model's card: at
    equal time the front is nowhere worse than constant r, as measured. It holds for this device, dtype, batch and mode
    alone. The model stays as it is: set `model.r = front.at(speed_up=1.5).r`.

    Args:
        model: ours, on the device and in the dtype to measure; it runs in evaluation mode.
        images: (N, C, H, W) floating, prepared (`tomevit.transform`), on any device: 128 to 512, of the kind that the
            model is for.
        labels: (N,) int64, the right classes. Given, the accuracy is measured too; the search does not need them.
        batch: images per call to be timed.
        mode: how the model runs, as in `tomevit bench`: "eager", "compiled", "whole" or "optimized". Answers are
            compared on the eager model, and where a whole program runs, one block is timed as "compiled", on CUDA as a
            captured graph.
        matchings: names of `tomevit.layers.MATCHINGS` to choose from, block by block; a function of the user's own in
            the model's config is one more.
        rounds: timed calls of each schedule that is measured at the end.
        seed: of the split.
        file: JSON where the front goes, and where what was measured is kept when something ends the search before: the
            same call goes on from there.
        progress: told what is being done, how many steps of it are done, and of how many, at the start and after each.

    Raises:
        ValueError: fewer than 32 images, or of another shape; nothing can merge; a matching or mode of no known name;
            the batch does not fit into memory; answers that are not finite; or the file is of another setting.
        OSError: the file cannot be read or written.
    """
    subject = unwrap_transformer(twin(unwrap_transformer(model))).eval()
    own, searched = choices(subject.config, matchings)
    check_arguments(subject, images, labels, batch, mode, rounds)
    tell = progress or (lambda *_: None)
    setting = describe(subject, images, labels, batch, mode, matchings, rounds, seed)
    record = Record.open(file, setting)
    if record.front is not None:
        return record.front
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    search, held_back = order[: num_searched(len(order))], order[num_searched(len(order)) :]
    try:
        with explain_out_of_memory(batch, subject.device), _programs(mode):
            seconds = _time_blocks(subject, record, images[search], searched, batch, mode, tell)
            trial = Faithfulness(subject, images[search], None, batch, record.search)
            found = _search(subject, seconds, searched, trial, record, tell)
            those = _finalists(subject, searched, found)
            right = None if labels is None else labels.to(images.device)[held_back].cpu()
            faithful = Faithfulness(subject, images[held_back], right, batch, record.held_back)
            for r, _ in _telling(those.values(), tell, "comparing answers"):
                faithful(r)
            record.write()
            _time_forwards(
                subject, record, [r for r, _ in those.values()], images[held_back], batch, mode, rounds, tell
            )
        points = _points(subject, record, own, those)
        best, note = best_of(points)
        record.front = Front(
            setting=setting, points=tuple(best), others=tuple(p for p in points if p not in best), note=note
        )
    finally:
        record.write()
    return record.front


def _telling(those: Collection[T], tell: Tell, what: str) -> Iterator[T]:
    """Each of these, told of at the start and when it is done."""
    tell(what, 0, len(those))
    for done, each in enumerate(those, 1):
        yield each
        tell(what, done, len(those))


def _programs(mode: str) -> AbstractContextManager[Any]:
    """So that torch's compiler does not give up after eight token counts; it takes seconds to import."""
    return nullcontext() if MODES[mode].eager else private.allow_many_programs()


# -------------------------------------------------------------------------------------------------------------- stages


def _time_blocks(
    model: VisionTransformer,
    record: Record,
    images: Tensor,
    searched: Iterable[str | None],
    batch: int,
    mode: str,
    tell: Tell,
) -> Seconds:
    """What any schedule takes, by one block's times."""
    if record.whole is None:
        # A whole program has no blocks to run: nearest come compiled ones, and to a captured program captured blocks.
        captured = mode in ("whole", "optimized") and model.device.type == "cuda"
        ready: Any = model if captured else MODES["compiled" if mode == "whole" else mode].make(model)
        inputs = _repeated(images, batch).to(model.device)
        with torch.inference_mode():
            matchings = tuple(dict.fromkeys([None, *searched]))
            timed, record.whole = costs.time_blocks(
                ready,
                lambda: ready(inputs, r=0),
                matchings,
                batch=batch,
                captured=captured,
                tell=lambda *at: tell("timing a block", *at),
            )
        record.blocks = [[*run, seconds] for run, seconds in timed.items()]
        record.write()
    return Seconds(model.config, {BlockRun(*run): seconds for *run, seconds in record.blocks}, record.whole)


def _search(
    model: VisionTransformer,
    seconds: Seconds,
    searched: tuple[str | None, ...],
    trial: Faithfulness,
    record: Record,
    tell: Tell,
) -> list[Schedule]:
    """The schedules that were best on the search's images, by predicted time."""
    config = model.config
    wanted = [(matching, probe) for matching in searched for probe in probes(config, matching)]
    moved: dict[str | None, dict[tuple[int, int], float]] = {}
    for matching, probe in _telling(wanted, tell, "trying single merges"):
        moved.setdefault(matching, {})[probe.block, probe.merged] = trial(_entries(probe.steps, config)).drift
    record.write()
    drift = Drift(config, moved)

    plain = seconds.forward([Step()] * config.depth)

    def pays(steps: tuple[Step, ...]) -> bool:
        return plain / MOST_SPEED_UP <= seconds.forward(steps) <= plain / LEAST_SPEED_UP

    paths = list(filter(pays, shortest_paths(config, seconds, drift, searched)))
    shapes = filter(pays, (_plain_steps(model, r) for r in _shapes(model, searched)))
    first = list(dict.fromkeys([*spread(paths, seconds.forward, PATHS), *shapes]))
    known: dict[tuple[Step, ...], float] = {}
    for steps in _telling(first, tell, "trying schedules"):
        known[steps] = trial(_entries(steps, config)).drift
    record.write()

    def ranked() -> list[tuple[Step, ...]]:
        those = undominated(list(known), lambda steps: (seconds.forward(steps), known[steps]))
        return [steps for steps in those if pays(steps)]

    start = spread(ranked(), seconds.forward, IMPROVED)
    for steps in _telling(start, tell, "exchanging"):
        best, tried = steps, {steps}
        for _ in range(TRIALS):
            near = [each for each in exchanges(best, config, seconds, searched) if each not in tried]
            if not near:
                break
            new = min(near, key=drift.of)
            tried.add(new)
            known[new] = trial(_entries(new, config)).drift
            best = new if known[new] < known[best] else best
    record.write()
    return [_entries(steps, config) for steps in spread(ranked(), seconds.forward, FINALISTS)]


def _shapes(model: VisionTransformer, searched: Iterable[str | None]) -> list[Schedule]:
    """Budgets in every shape by every matching, as far as they can be had."""
    found = []
    for matching in searched:
        for shape in ("", *SHAPES):
            for budget in BUDGETS:
                try:
                    found.append(model.plain(" ".join(filter(None, (budget, shape, matching)))))
                except ValueError:  # it is more than this shape can save
                    continue
    return found


def _plain_steps(model: VisionTransformer, r: Schedule) -> tuple[Step, ...]:
    """What a schedule does, as the search writes it: nothing in the last block where that changes nothing."""
    own, config = model.config.matching, model.config
    steps = [
        Step(step.merge, step.drop, None if step.matching == own or not step.total else step.matching)
        for step in model.steps(r)
    ]
    return tuple(steps[: num_merging(config)] + [Step()] * (config.depth - num_merging(config)))


def _entries(steps: Sequence[Step], config: Config) -> Schedule:
    """The r of these steps."""
    return [step.entry for step in [*steps, *[Step()] * (config.depth - len(steps))]]


def _finalists(
    model: VisionTransformer, searched: Iterable[str | None], found: Iterable[Schedule]
) -> dict[tuple[Step, ...], tuple[Schedule, str]]:
    """What is measured on the images held back, each schedule once: r, and where it comes from. r = 0 comes first."""
    shapes = {_plain_steps(model, r) for r in _shapes(model, searched)}
    presets = [list(preset.r) for preset in model.card.presets if preset.fits(model.config)]
    wanted: list[tuple[str, Schedule]] = [("unmerged", 0), *(("constant", r) for r in _constants(model))]
    wanted += [*(("preset", r) for r in presets), *(("", r) for r in found)]
    those: dict[tuple[Step, ...], tuple[Schedule, str]] = {}
    for kind, r in wanted:
        steps = _plain_steps(model, r)
        those.setdefault(steps, (r, kind or ("shape" if steps in shapes else "found")))
    return those


def _constants(model: VisionTransformer) -> list[int]:
    """Some r up to the one that leaves next to nothing, and those of which the card has figures."""
    most = max(1, model.config.num_patches // model.config.depth)
    found = {max(1, round(most * i / CONSTANTS)) for i in range(1, CONSTANTS + 1)}
    return sorted(found | {r for r in default_r(model.card) if isinstance(r, int)})


def _time_forwards(
    model: VisionTransformer,
    record: Record,
    those: Sequence[Schedule],
    images: Tensor,
    batch: int,
    mode: str,
    rounds: int,
    tell: Tell,
) -> None:
    """Whole forwards of all schedules, taking turns."""
    if record.forwards:
        return
    ready, inputs = MODES[mode].make(model), _repeated(images, batch).to(model.device)
    calls = {name_of(r): _call(ready, inputs, r) for r in those}
    with torch.inference_mode():
        record.forwards = costs.time_rounds(
            calls, rounds=rounds, device=model.device, tell=lambda *at: tell("timing schedules", *at)
        )


def _call(model: nn.Module, inputs: Tensor, r: Schedule) -> Callable[[], object]:
    return lambda: model(inputs, r=r)


def _repeated(images: Tensor, batch: int) -> Tensor:
    """A batch of these images, some of them several times where there are fewer."""
    return images[torch.arange(batch, device=images.device) % len(images)]


def _points(
    model: VisionTransformer, record: Record, own: str, those: dict[tuple[Step, ...], tuple[Schedule, str]]
) -> list[Point]:
    config = model.config
    plain_flops, plain_times = flops(config, computed=True), record.forwards[name_of(0)]
    points = []
    for steps, (r, kind) in those.items():
        moved, times = record.held_back[name_of(r)], record.forwards[name_of(r)]
        quartiles = Quartiles.of(times)
        headless = not config.num_classes
        points.append(
            Point(
                r=r,
                kind=kind,  # type: ignore[arg-type]
                matchings=matchings_of(steps, own),
                tokens=model.token_counts(r)[-1],
                flop_ratio=plain_flops / flops(config, r, computed=True),
                seconds=quartiles.median,
                seconds_range=(quartiles.lower, quartiles.upper),
                speed_up=median(plain_times) / quartiles.median,
                speed_up_range=ratio_interval([plain_times], times),
                agreement=moved.agreement,
                kl=None if headless else moved.drift,
                cosine=moved.agreement / 100 if headless else None,
                top1=moved.top1,
            )
        )
    return points

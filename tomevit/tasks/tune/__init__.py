"""The best schedules for a model on its device, searched on a user's own images: `tomevit.tune`.

Blocks are alike, so the search is cheap. One block is timed at some twenty token counts; a few merges are tried to see
how far they move the answers; the shortest path over blocks and tokens is a first guess for each trade-off; exchanges
between two blocks, measured, correct it. What is left is measured on images held back, beside constant r.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomevit import private
from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import join_with_or
from tomevit.flops import flops
from tomevit.layers.embed import check_images
from tomevit.measure.bench import MODES, subject, twin
from tomevit.measure.defaults import default_r
from tomevit.measure.memory import explain_out_of_memory
from tomevit.measure.timing import Quartiles, ratio_interval
from tomevit.models import VisionTransformer, unwrap_transformer
from tomevit.schedule import MATCHING_NAMES, SHAPES, Schedule, Step, schedule_to_json
from tomevit.tasks.tune import costs
from tomevit.tasks.tune.costs import BlockRun, Drift, Seconds, num_merging, outputs, probes
from tomevit.tasks.tune.front import Front, Point, best_of, matchings_of
from tomevit.tasks.tune.record import Moved, Record
from tomevit.tasks.tune.search import exchanges, shortest_paths, spread, undominated
from tomevit.weights.checkpoint import digest_of

__all__ = ["LEAST_IMAGES", "Front", "Point", "tune"]

#: Images that a search takes at least; it halves them.
LEAST_IMAGES = 32
#: Images per call where only the answers count, at least.
BATCH = 32
#: Values of a constant r that are measured.
CONSTANTS = 6
#: Of the paths so many are tried on the images.
PATHS = 12
#: So many schedules are improved by exchanges, and each by so many trials.
IMPROVED, TRIALS = 6, 8
#: A schedule must be so many times as fast as r = 0, by the times of a block, to be worth a trial more.
LEAST_SPEED_UP = 1.03
#: So many that the search found are measured on the images held back.
FINALISTS = 10
#: What beside paths and constant r is tried, for every matching.
BUDGETS = ("1.25x", "1.5x", "2x")

Tell = Callable[[str, int, int], object]


def tune(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch: int = 8,
    mode: str = "eager",
    matchings: Sequence[str] = ("bipartite", "diffrate", "importance", "pitome"),
    rounds: int = 20,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
    progress: Tell | None = None,
) -> Front:
    """Measure which schedules are fastest and most faithful on the model's device, on these images.

    Half of the images, drawn at random, is searched on. All figures of the front are of the other half, and of whole
    forwards that take turns with r = 0, with constant r and with the presets of the model's card: at equal time the
    front is nowhere worse than constant r, as measured. It holds for this device, dtype, batch and mode alone. The
    model stays as it is: set `model.r = front.at(speed_up=1.5).r`.

    Args:
        model: ours, on the device and in the dtype to measure; it runs in evaluation mode.
        images: (N, C, H, W) floating, prepared (`tomevit.transform`), on any device: 128 to 512, of the kind that the
            model is for.
        labels: (N,) int64, the right classes. Given, the accuracy is measured too; the search does not need them.
        batch: images per call to be timed.
        mode: how the model runs, as in `tomevit bench`: "eager", "compiled", "whole" or "optimized". Answers are
            compared on the eager model; for "whole" a block's times are those of "compiled".
        matchings: names of `tomevit.layers.MATCHINGS` to choose from, block by block; a function of the user's own in
            the model's config is one more.
        rounds: timed calls of each schedule that is measured at the end.
        seed: of the split.
        file: JSON where the front goes, and where what was measured is kept when something ends the search before: the
            same call goes on from there.
        progress: told what is being done, how many steps of it are done, and of how many.

    Raises:
        ValueError: fewer than 32 images, or of another shape; nothing can merge; a matching or mode of no known name;
            the batch does not fit into memory; answers that are not finite; or the file is of another setting.
        OSError: the file cannot be read or written.
    """
    model = twin(unwrap_transformer(model)).eval()
    own, searched = _searched(model.config, matchings)
    _check(model, images, labels, batch, mode, rounds)
    tell = progress or (lambda *_: None)
    setting = _setting(model, images, labels, batch, mode, matchings, rounds, seed)
    record = Record.open(file, setting)
    if record.front is not None:
        return record.front
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    search, held_back = order[: len(order) // 2], order[len(order) // 2 :]
    try:
        with explain_out_of_memory(batch, model.device), _programs(mode):
            seconds = _time_blocks(model, record, images, searched, batch, mode, tell)
            trial = Faithfulness(model, images[search], None, batch, record.search)
            found = _search(model, seconds, searched, trial, record, tell)
            those = _finalists(model, own, found)
            right = None if labels is None else labels.to(images.device)[held_back].cpu()
            faithful = Faithfulness(model, images[held_back], right, batch, record.held_back)
            for i, (r, _) in enumerate(those.values(), 1):
                faithful(r)
                tell("comparing answers", i, len(those))
            record.write()
            _time_forwards(model, record, [r for r, _ in those.values()], images[held_back], batch, mode, rounds, tell)
        points = _points(model, record, own, those)
        best, note = best_of(points)
        record.front = Front(
            setting=setting, points=tuple(best), others=tuple(p for p in points if p not in best), note=note
        )
    finally:
        record.write()
    return record.front


def _searched(config: Config, matchings: Sequence[str]) -> tuple[str, tuple[str | None, ...]]:
    """What the model's own matching is called, and those to choose from, None for the model's own."""
    own = config.matching if isinstance(config.matching, str) else getattr(config.matching, "__name__", "own")
    known = [name for name in MATCHING_NAMES if name not in ("grid", "random")]
    if isinstance(matchings, str) or not (matchings or callable(config.matching)):
        raise ValueError(f"matchings is {matchings!r}, and must list some of {', '.join(known)}")
    if wrong := [name for name in matchings if name not in known]:
        raise ValueError(f"matchings has {wrong[0]!r}, which cannot be searched; there is {join_with_or(known)}")
    names: list[str | None] = [None] if callable(config.matching) else []
    return own, tuple(dict.fromkeys(names + [None if name == config.matching else name for name in matchings]))


def _check(model: VisionTransformer, images: Tensor, labels: Tensor | None, batch: int, mode: str, rounds: int) -> None:
    """Raises ValueError where an argument is wrong, before anything is measured."""
    config = model.config
    check_images(images, (config.in_chans, *config.img_size))
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"{len(images)} images are too few to tell schedules apart: give {LEAST_IMAGES} at least")
    if labels is not None:
        if not config.num_classes:
            raise ValueError("labels are for a model with a head, and this one has none")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}, and must be torch.int64 of "
                f"{(len(images),)}: one class for each image"
            )
        if labels.min() < 0 or labels.max() >= config.num_classes:
            raise ValueError(f"labels must lie between 0 and {config.num_classes - 1}: the model's classes")
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}; there is {join_with_or(MODES)}")
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}, and must be at least 1")
    if config.num_patches < 2 or num_merging(config) < 1:
        raise ValueError("nothing can merge in this model, of one patch or of one block whose class token is read")


def _setting(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor | None,
    batch: int,
    mode: str,
    matchings: Sequence[str],
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """What the figures must be read with, and a search goes on under: as `Front.to_json` has it."""
    config = model.config
    own = config.matching
    return subject(model, model.device) | {
        "tokens": config.num_tokens,
        "prefix": config.num_prefix,
        "depth": config.depth,
        "matching": own if isinstance(own, str) else getattr(own, "__qualname__", type(own).__name__),
        "prop_attn": config.prop_attn,
        "weights": digest_of(model.state_dict()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "precision": torch.get_float32_matmul_precision(),
        "batch": batch,
        "mode": mode,
        "rounds": rounds,
        "matchings": list(matchings),
        "seed": seed,
        "images": {
            "count": len(images),
            "search": len(images) // 2,
            "held_back": len(images) - len(images) // 2,
            "sha256": _digest(images),
            "labels": None if labels is None else _digest(labels),
        },
    }


def _digest(values: Tensor) -> str:
    """The sha256 of a tensor's shape, dtype and values."""
    sha = hashlib.sha256(f"{list(values.shape)} {values.dtype}".encode())
    for part in values.split(256):
        sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _programs(mode: str) -> Any:
    """So that torch's compiler does not give up after eight token counts; it takes seconds to import."""
    return nullcontext() if MODES[mode].eager else private.allow_many_programs()


# ------------------------------------------------------------------------------------------------------------- answers


class Faithfulness:
    """How the answers to some images differ from those at r = 0; each schedule is tried once.

    Args:
        images: (N, C, H, W).
        labels: (N,) on the CPU, or None.
        batch: images per call, or BATCH if that is more.
        known: by r in JSON, what was found before; what is found is added.
    """

    def __init__(
        self, model: VisionTransformer, images: Tensor, labels: Tensor | None, batch: int, known: dict[str, Moved]
    ) -> None:
        self.model, self.images, self.labels, self.known = model, images, labels, known
        self.batch = max(batch, BATCH)
        self._plain: Tensor | None = None

    def __call__(self, r: Schedule) -> Moved:
        key = name_of(r)
        if key not in self.known:
            self.known[key] = self._compare(r)
        return self.known[key]

    def _compare(self, r: Schedule) -> Moved:
        if self._plain is None:
            self._plain = self._answers(0)
        plain, merged = self._plain, self._answers(r)
        if not self.model.config.num_classes:
            cosine = F.cosine_similarity(plain, merged, dim=1).mean().item()
            return Moved(max(0.0, 1 - cosine), 100 * cosine, None)
        kl = F.kl_div(merged.log_softmax(1), plain.log_softmax(1), reduction="batchmean", log_target=True).item()
        classes = merged.argmax(1)
        agreement = 100 * (classes == plain.argmax(1)).double().mean().item()
        top1 = None if self.labels is None else 100 * (classes == self.labels).double().mean().item()
        return Moved(max(0.0, kl), agreement, top1)

    def _answers(self, r: Schedule) -> Tensor:
        found = outputs(self.model, self.images, r, self.batch)
        if not found.isfinite().all():
            raise ValueError(f"the model's answers to these images are not all finite, with r = {name_of(r)}")
        # A single logit is that of one class against another, whose logit is 0.
        return F.pad(found, (0, 1)) if self.model.config.num_classes == 1 else found


def name_of(r: Schedule) -> str:
    """What a schedule is called in a record."""
    return json.dumps(schedule_to_json(r))


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
        # A whole program has no blocks to run; compiled ones come nearest.
        ready: Any = MODES["compiled" if mode == "whole" else mode].make(model)
        inputs = _repeated(images, batch).to(model.device)
        with torch.inference_mode():
            matchings = tuple(dict.fromkeys([None, *searched]))
            timed, record.whole = costs.time_blocks(
                ready, lambda: ready(inputs, r=0), matchings, batch=batch, tell=lambda *at: tell("timing a block", *at)
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
    for i, (matching, probe) in enumerate(wanted, 1):
        moved.setdefault(matching, {})[probe.block, probe.merged] = trial(_entries(probe.steps, config)).drift
        tell("trying single merges", i, len(wanted))
    record.write()
    drift = Drift(config, moved)

    paths = spread(shortest_paths(config, seconds, drift, searched), seconds.forward, PATHS)
    known: dict[tuple[Step, ...], float] = {}
    first = list(dict.fromkeys([*paths, *(_plain_steps(model, r) for r in _shapes(model, searched))]))
    for i, steps in enumerate(first, 1):
        known[steps] = trial(_entries(steps, config)).drift
        tell("trying schedules", i, len(first))
    record.write()

    limit = seconds.forward([Step()] * config.depth) / LEAST_SPEED_UP

    def ranked() -> list[tuple[Step, ...]]:
        fast = [steps for steps in known if seconds.forward(steps) <= limit]
        return undominated(fast, lambda steps: (seconds.forward(steps), known[steps]))

    start = spread(ranked(), seconds.forward, IMPROVED)
    for i, steps in enumerate(start):
        best, tried = steps, {steps}
        for done in range(TRIALS):
            near = [each for each in exchanges(best, config, seconds, searched) if each not in tried]
            if not near:
                break
            new = min(near, key=drift.of)
            tried.add(new)
            known[new] = trial(_entries(new, config)).drift
            best = new if known[new] < known[best] else best
            tell("exchanging", i * TRIALS + done + 1, len(start) * TRIALS)
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
    model: VisionTransformer, own: str, found: Iterable[Schedule]
) -> dict[tuple[Step, ...], tuple[Schedule, str]]:
    """What is measured on the images held back, each schedule once: r, and where it comes from. r = 0 comes first."""
    shapes = {_plain_steps(model, r) for r in _shapes(model, [None])}
    presets = [list(p.r) for p in model.card.presets if _fits(model.card, p.num_tokens, len(p.r))]
    constants = [("constant", r) for r in _constants(model)]
    those: dict[tuple[Step, ...], tuple[Schedule, str]] = {}
    for kind, r in [("unmerged", 0), *constants, *(("preset", r) for r in presets), *(("", r) for r in found)]:
        steps = _plain_steps(model, r)
        those.setdefault(steps, (r, kind or ("shape" if steps in shapes else "found")))
    return those


def _fits(card: Card, tokens: int, depth: int) -> bool:
    return tokens == card.config.num_tokens and depth == card.config.depth


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

"""How fast a model is at several r, against the fastest model that merges nothing: ours or timm's.

Merge efficiency is the share of the FLOPs saved that becomes time saved:

    (throughput at r / best throughput at r = 0) / (FLOPs at 0 / FLOPs at r)

"Best" is the fastest unmerged candidate of the same run, on the same device, in the same dtype and batch, whether ours
or timm's, eager or compiled; FLOPs are those that our model computes (`flops(..., computed=True)`). 1 is the limit.
"""

from __future__ import annotations

import copy
import platform
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.deploy.optimize import compile_blocks, optimize
from tomevit.errors import join_with_or
from tomevit.flops import flops
from tomevit.measure.bounds import ADVICE, Bounds, Limits, bounds, faster_dtype
from tomevit.measure.defaults import SMALL_DROP
from tomevit.measure.memory import BatchTooLargeError, explain_out_of_memory
from tomevit.measure.published import BySchedule, published_at, published_by_schedule
from tomevit.measure.timing import WARMUP, Quartiles, environment, ratio_interval, turns
from tomevit.models import VisionTransformer
from tomevit.notebook import html_table
from tomevit.schedule import Schedule, distinct_schedules, entries, format_schedule, schedule_to_json
from tomevit.version import __version__
from tomevit.weights.formats import FORMATS
from tomevit.weights.rules import from_native

#: What can be asked for as a dtype: torch's, and the precision of float32 matrix products.
PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}
SCHEMA = 1


# --------------------------------------------------------------------------------------------------------- candidates


class Candidate(NamedTuple):
    """What takes its turn: one implementation, run in one way, at one r."""

    implementation: str  # "tomevit", "timm"
    mode: str  # a name in MODES
    r: Schedule  # as it was asked for
    forward: Callable[[Tensor], object]
    flops: int  # multiply-adds per image that it computes
    weights: int | None  # their bytes; None if its operators cannot be counted one by one


class Mode(NamedTuple):
    """A way to run a model."""

    make: Callable[[nn.Module], nn.Module]  # of a model one that runs in this way; the given one stays as it is
    for_timm: bool  # or for tomevit's models alone
    eager: bool  # operators run one by one


def twin(model: nn.Module) -> nn.Module:
    """The same model on the same weights, of which modules can be compiled without touching the first."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _by_block(model: nn.Module) -> nn.Module:
    """Compiled block by block; with dynamic shapes where tokens merge, so that an r does not cost a program each."""
    model = twin(model)
    if isinstance(model, VisionTransformer):
        compile_blocks(model)
    else:
        blocks: Any = model.blocks
        for block in blocks:
            block.compile(dynamic=False)
    return model


def _whole(model: nn.Module) -> nn.Module:
    """A program with fixed shapes for each r and batch, on CUDA captured as a graph: the most that compiling gives."""
    compiled: Any = torch.compile(twin(model), fullgraph=True, dynamic=False, mode="reduce-overhead")
    return compiled


#: The ways to run a model: one line each.
MODES = {
    "eager": Mode(lambda model: model, for_timm=True, eager=True),
    "compiled": Mode(_by_block, for_timm=True, eager=False),
    "whole": Mode(_whole, for_timm=True, eager=False),
    "optimized": Mode(optimize, for_timm=False, eager=False),
}


def candidates(
    model: VisionTransformer,
    r_values: Sequence[Schedule],
    *,
    modes: Sequence[str] = ("eager",),
    timm: nn.Module | None = None,
) -> list[Candidate]:
    """Our model at r = 0 and every other r, and timm's, in every mode.

    Args:
        model: on the device and in the dtype to measure.
        r_values: what to compare with r = 0, which is there in any case and comes first.
        modes: names in MODES.
        timm: its model of the same weights, as `timm_twin` makes it.
    """
    config, found = model.config, []
    size = sum(parameter.nbytes for parameter in model.parameters())
    for name in modes:
        mode = MODES[name]
        weights = size if mode.eager else None
        if timm is not None and mode.for_timm:
            found.append(Candidate("timm", name, 0, mode.make(timm), flops(config), weights))
        ready = mode.make(model)
        for r in distinct_schedules([0, *r_values]):
            plain = model.plain(r)
            cost = flops(config, plain, computed=True)
            found.append(Candidate("tomevit", name, r, partial(ready, r=plain), cost, weights))
    return found


def timm_twin(model: VisionTransformer) -> nn.Module:
    """The model of timm's with the same architecture, on the very weights of ours.

    Raises:
        ValueError: timm is not installed, or does not have this model; the message says which.
    """
    card, config = model.card, model.config
    if not card.timm:
        raise ValueError(f"timm has no name for {card.name or 'this model'}")
    if find_spec("timm") is None:
        raise ValueError("timm is not installed: pip install timm")
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(f"timm is installed and cannot be imported: {str(error).splitlines()[0]}") from error
    classes = config.num_classes or config.proj_dim  # a projection is a head there
    # Its tables of rotations are no weights, and are made with the model.
    with torch.device("meta" if config.rope is None else "cpu"):
        theirs: nn.Module = timm.create_model(
            card.timm, img_size=config.img_size, num_classes=classes, in_chans=config.in_chans
        )
    try:
        theirs.load_state_dict(_named_for_timm(model, theirs.state_dict()), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"timm's {card.timm} has another architecture: {str(error).splitlines()[1].strip()}"
        ) from error
    return theirs.to(model.device).eval()


def _named_for_timm(model: VisionTransformer, theirs: Collection[str]) -> dict[str, Tensor]:
    """The weights under the names of timm's model: ours, or those of its other classes."""
    tensors = model.state_dict(keep_vars=True)
    for name in ("timm", "timm_clip", "timm_eva"):
        with suppress(ValueError), torch.no_grad():  # the format has no place for some of them
            renamed = from_native(FORMATS[name], tensors, model.config)
            if renamed.keys() == set(theirs):
                return renamed
    return tensors


# --------------------------------------------------------------------------------------------------------- comparison


class Row(NamedTuple):
    """One candidate, measured."""

    implementation: str
    mode: str
    r: Schedule  # as it was asked for
    plain: Schedule  # in numbers: what "2x" means for this model
    schedule: tuple[int | str, ...]  # what happens in each block, as entries of a list that is an r
    tokens: int  # leaving the last block
    gflops: float  # multiply-adds per image, in 10⁹, as the paper counts them
    gflops_computed: float  # as our model computes them
    seconds: Quartiles  # of a call, which is a batch
    images_per_second: float  # by the median
    speed_up: float  # over the fastest candidate that merges nothing
    speed_up_range: tuple[float, float] | None  # of 95 % confidence; None: too few rounds
    flop_ratio: float  # r = 0 over this r, as the paper counts
    flop_ratio_computed: float  # as our model computes: what the speed-up would be if time followed FLOPs
    merges: bool
    bounds: Bounds | None = None

    @property
    def efficiency(self) -> float:
        """The share of the FLOPs saved that became time saved; 1 is the limit."""
        return self.speed_up / self.flop_ratio_computed

    @property
    def efficiency_range(self) -> tuple[float, float] | None:
        """What it lies between, with 95 % confidence; None: too few rounds."""
        if self.speed_up_range is None:
            return None
        lower, upper = self.speed_up_range
        return lower / self.flop_ratio_computed, upper / self.flop_ratio_computed

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.mode}"

    def __repr__(self) -> str:
        return (
            f"<Row {self.name}, r = {format_schedule(self.r)}: {self.images_per_second:.4g} images/s, "
            f"{self.speed_up:.2f} times as fast, {self.tokens} remaining tokens, {self.gflops:.3g} GFLOPs>"
        )


class Fidelity(NamedTuple):
    """What was measured of a schedule's answers on images of the user's."""

    kept: float  # accuracy, or agreement with r = 0, in per cent
    unmerged: float  # the same at r = 0
    what: str  # of these it is
    images: int  # that it was measured on

    @property
    def drop(self) -> float:
        """What merging loses, in points."""
        return self.unmerged - self.kept

    def __str__(self) -> str:
        return f"{self.kept:.2f} % {self.what} against {self.unmerged:.2f} % at r = 0, on {self.images} images"


class Suggestion(NamedTuple):
    """An r, and why; or why there is none."""

    r: Schedule | None  # as it was asked for; None: of no r that pays is the accuracy known
    why: str
    plain: Schedule | None = 0  # in numbers


class Comparison(NamedTuple):
    """All candidates at one batch in one dtype."""

    dtype: str  # a name in PRECISIONS
    batch: int
    rows: list[Row]
    rounds: int  # that all rows have at least
    note: str = ""  # why there are fewer rows or rounds than were asked for
    hints: tuple[str, ...] = ()  # what binds, and what would help
    suggestion: Suggestion | None = None
    interrupted: bool = False

    @property
    def best(self) -> Row | None:
        """The fastest row that merges nothing."""
        return min((row for row in self.rows if not row.merges), key=lambda row: row.seconds.median, default=None)

    def __repr__(self) -> str:
        return f"<Comparison in {self.dtype}, batch {self.batch}, {self.rounds} rounds: {self.rows}>"

    def _repr_html_(self) -> str:
        heading = ("run", "r", "images/s", "times as fast", "remaining tokens", "GFLOPs")
        rows = (
            (
                row.name,
                format_schedule(row.r),
                f"{row.images_per_second:.4g}",
                f"{row.speed_up:.2f}",
                row.tokens,
                f"{row.gflops:.3g}",
            )
            for row in self.rows
        )
        caption = f"{self.dtype}, batch {self.batch}, {self.rounds} rounds"
        return html_table(caption, heading, rows, " ".join(filter(None, (self.note, *self.hints))))


def compare(
    those: Sequence[Candidate],
    model: VisionTransformer,
    *,
    batch: int,
    rounds: int = 10,
    dtype: str | None = None,
    limits: Limits | None = None,
    target: float | None = None,
    fidelity: Mapping[tuple[int | str, ...], Fidelity] | None = None,
    progress: Callable[[Candidate], object] | None = None,
) -> Comparison:
    """Time candidates in inference, all taking turns, on generated images.

    A batch that does not fit into memory, and an interrupt from the keyboard, end in a comparison that says so.

    Args:
        those: of which one at least merges nothing.
        model: ours, for its architecture, device and dtype.
        batch: images per call.
        rounds: timed calls of each; the medians are compared.
        dtype: a name in PRECISIONS; default: the model's.
        limits: of the device, to find out what binds; None: do not.
        target: the speed-up that the suggestion is to reach.
        fidelity: as `suggest` has it.
        progress: called after every call, two rounds of warm-up included.
    """
    config, device, kind = model.config, model.device, model.dtype
    dtype = dtype or str(kind).removeprefix("torch.")
    times: list[list[float]] = [[] for _ in those]
    found: dict[int, Bounds] = {}
    hints: list[str] = []
    note, interrupted = "", False
    try:
        with explain_out_of_memory(batch, device):
            shape, draw = (batch, config.in_chans, *config.img_size), torch.Generator(device).manual_seed(0)
            images = torch.randn(shape, generator=draw, device=device, dtype=kind)
            calls: dict[int, Callable[[], object]] = {i: partial(each.forward, images) for i, each in enumerate(those)}
            with torch.inference_mode(), _many_programs(those), precision(dtype):
                for turn in turns(calls, rounds=rounds, device=device):
                    if turn.counts:
                        times[turn.key].append(turn.seconds)
                    if progress is not None:
                        progress(those[turn.key])
            if limits is not None:
                with precision(dtype):
                    for i, each in enumerate(those):
                        found[i] = _bounds_of(each, calls[i], Quartiles.of(times[i]).median, model, batch, limits)
                    if faster := faster_dtype(limits, config, kind, min(256, batch * config.num_tokens)):
                        hints.append(faster)
    except KeyboardInterrupt:
        note, interrupted = f"interrupted after {min(map(len, times))} of {rounds} rounds", True
    except BatchTooLargeError as error:
        note, times, found = str(error), [[] for _ in those], {}
        if device.type == "cuda":
            torch.cuda.empty_cache()

    rows = _rows(those, times, found, model, batch)
    result = Comparison(dtype, batch, rows, min(map(len, times)), note, tuple(hints), None, interrupted)
    if result.best is None:
        return result._replace(rows=[])
    hints = [*_binding(rows), *hints]
    return result._replace(
        hints=tuple(hints), suggestion=suggest(rows, published_by_schedule(model.card), target, fidelity)
    )


def _bounds_of(
    candidate: Candidate,
    call: Callable[[], object],
    measured: float,
    model: VisionTransformer,
    batch: int,
    limits: Limits,
) -> Bounds:
    """What the time of one candidate goes to, which a call takes `measured` seconds."""
    tokens = model.token_counts(candidate.r)[:-1]
    return bounds(
        call,
        measured,
        limits,
        config=model.config,
        dtype=model.dtype,
        flops=batch * candidate.flops,
        tokens=max(1, batch * sum(tokens) // len(tokens)),
        weights=candidate.weights,
    )


def bench(
    model: VisionTransformer,
    r_values: Sequence[Schedule],
    *,
    batch: int = 8,
    rounds: int = 10,
    modes: Sequence[str] = ("eager",),
    timm: bool = False,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Time a model in inference at several r, all taking turns, on generated images.

    Args:
        model: on the device and in the dtype to measure.
        r_values: what to compare with r = 0, which is measured in any case and comes first.
        batch: images per call.
        rounds: timed calls of each; the medians are compared.
        modes: names in MODES.
        timm: compare with timm's model too, if it is installed and has it.
        progress: called after every call, two rounds of warm-up included.

    Raises:
        ValueError: an r of no known form, timm's model cannot be had, or the batch does not fit into memory.
    """
    those = candidates(model, r_values, modes=modes, timm=timm_twin(model) if timm else None)
    tell = None if progress is None else (lambda _, progress=progress: progress())
    result = compare(those, model, batch=batch, rounds=rounds, progress=tell)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.note:
        raise ValueError(result.note)
    return result.rows


def sweep(
    model: VisionTransformer,
    r_values: Sequence[Schedule],
    *,
    batches: Sequence[int] = (8,),
    dtypes: Sequence[str] = ("float32",),
    device: torch.device | str = "cpu",
    modes: Sequence[str] = ("eager",),
    timm: bool = False,
    rounds: int = 10,
    target: float | None = None,
    fidelity: Mapping[tuple[int | str, ...], Fidelity] | None = None,
    progress: Callable[[float], object] | None = None,
) -> Iterator[Comparison]:
    """Compare at every batch in every dtype, with what binds and which r is suggested; yield each when it is done.

    Args:
        model: on any device, in any dtype; it stays as it is.
        batches, dtypes: images per call, and names in PRECISIONS.
        device: to measure on.
        fidelity: as `suggest` has it.
        progress: called with the share of all work that has been done since the last call.

    Other arguments and errors as `bench`, but that a batch which does not fit is left out with a note.

    Raises:
        KeyboardInterrupt: after what was measured until then has been yielded.
    """
    device, limits = torch.device(device), Limits(device)
    if "tf32" in dtypes and device.type != "cuda":
        raise ValueError("tf32 is a precision of NVIDIA's GPUs: name a CUDA device, or float32")
    if wrong := sorted({*modes} - MODES.keys()):
        raise ValueError(f"there is no mode {wrong[0]!r}; there is {join_with_or(MODES)}")
    for r in r_values:
        model.schedule(r)  # before the first minute is spent
    for dtype in dtypes:
        ours = copy.deepcopy(model).to(device, PRECISIONS[dtype][0])
        those = candidates(ours, r_values, modes=modes, timm=timm_twin(ours) if timm else None)
        work = len(dtypes) * sum(batches) * (rounds + WARMUP) * sum(each.flops for each in those)
        for batch in batches:

            def tell(candidate: Candidate, batch: int = batch, work: int = work) -> None:
                if progress is not None:
                    progress(batch * candidate.flops / work)

            result = compare(
                those,
                ours,
                batch=batch,
                rounds=rounds,
                dtype=dtype,
                limits=limits,
                target=target,
                fidelity=fidelity,
                progress=tell,
            )
            yield result
            if result.interrupted:
                raise KeyboardInterrupt


def _rows(
    those: Sequence[Candidate],
    times: Sequence[Sequence[float]],
    found: dict[int, Bounds],
    model: VisionTransformer,
    batch: int,
) -> list[Row]:
    config = model.config
    medians = {i: statistics.median(found) for i, found in enumerate(times) if found}
    schedules = [entries(model.steps(each.r)) for each in those]
    merges = [any(schedule) for schedule in schedules]
    best = min((i for i in medians if not merges[i]), key=lambda i: medians[i], default=None)
    unmerged = [times[j] for j in medians if not merges[j]]
    rows = []
    for i, each in enumerate(those):
        if i not in medians:
            continue
        over = times[i if best is None else best]
        spread = Quartiles.of(times[i])
        plain = model.plain(each.r)
        paper, computed = flops(config, plain), flops(config, plain, computed=True)
        rows.append(
            Row(
                implementation=each.implementation,
                mode=each.mode,
                r=each.r,
                plain=plain,
                schedule=schedules[i],
                tokens=model.token_counts(plain)[-1],
                gflops=paper / 1e9,
                gflops_computed=computed / 1e9,
                seconds=spread,
                images_per_second=batch / spread.median,
                speed_up=statistics.median(over) / spread.median,
                speed_up_range=ratio_interval(unmerged or [times[i]], times[i]),
                flop_ratio=flops(config) / paper,
                flop_ratio_computed=flops(config, computed=True) / computed,
                merges=merges[i],
                bounds=found.get(i),
            )
        )
    return rows


#: A share of the time above which what the device reaches was measured wrongly; up to there it is noise.
IMPOSSIBLE = 2.0


def _binding(rows: Sequence[Row]) -> list[str]:
    """What binds the fastest row that merges nothing and the fastest that merges, and what to do about it."""
    told = []
    for merges in (False, True):
        alike = [row for row in rows if row.merges is merges and row.bounds is not None]
        told += sorted(alike, key=lambda row: row.seconds.median)[:1]
    hints = [
        f"{row.name}, r = {format_schedule(row.r)}, is bound by {row.bounds.bound_by} ({row.bounds})"
        for row in told
        if row.bounds
    ]
    if any(max(row.bounds.shares.values(), default=0) > IMPOSSIBLE for row in told if row.bounds):
        return [
            "what binds cannot be told: the device was busy with something else while its speed was probed, by which "
            f"the model would take longer than it does ({', '.join(str(row.bounds) for row in told)})"
        ]
    kinds = dict.fromkeys(row.bounds.bound_by for row in told if row.bounds)
    return hints + [f"{kind}: {ADVICE[kind]}" for kind in kinds]


def suggest(
    rows: Sequence[Row],
    published: BySchedule = (),
    target: float | None = None,
    fidelity: Mapping[tuple[int | str, ...], Fidelity] | None = None,
) -> Suggestion:
    """An r for what was measured: without a target one whose accuracy is known, since the fastest merges the most.

    Args:
        rows: of one comparison.
        published: accuracies of the weights (`tomevit.measure.published.published_by_schedule`).
        target: the speed-up to reach: with the least drop where fidelity says that, else with the least merging. None:
            the fastest that pays and loses SMALL_DROP points at most, or of which an accuracy is published.
        fidelity: measured on images of the user's, by `Row.schedule`; it goes before what is published.
    """
    fidelity = fidelity or {}
    merged = sorted((row for row in rows if row.merges), key=lambda row: row.gflops, reverse=True)
    paying = [row for row in merged if row.speed_up > 1]
    if not merged:
        return Suggestion(0, "nothing that merges was measured")
    fastest = max(merged, key=lambda row: row.speed_up)
    if not paying:
        return Suggestion(
            0,
            f"merging does not pay here: the best, r = {format_schedule(fastest.r)}, has {fastest.speed_up:.2f} times "
            f"the throughput",
        )

    if target is None:
        return _suggest_by_cost(paying, published, fidelity)
    enough = [row for row in merged if row.speed_up >= target]
    if not enough:
        return _suggestion(fastest, f"{target:g} times is not reached; the most is", published, fidelity)
    if measured := [row for row in enough if row.schedule in fidelity]:
        why = f"the most faithful that reaches {target:g} times:"
        return _suggestion(min(measured, key=lambda row: fidelity[row.schedule].drop), why, published, fidelity)
    return _suggestion(enough[0], f"the least merging that reaches {target:g} times:", published, fidelity)


def _suggest_by_cost(
    paying: Sequence[Row], published: BySchedule, fidelity: Mapping[tuple[int | str, ...], Fidelity]
) -> Suggestion:
    """Of rows that are faster than what merges nothing, the fastest of those whose cost is known and small."""
    measured = [row for row in paying if row.schedule in fidelity]
    harmless = [row for row in measured if fidelity[row.schedule].drop <= SMALL_DROP]
    known = [row for row in paying if published_at(row.schedule, published) is not None]
    if measured and not harmless:
        why = f"all that pay lose more than {SMALL_DROP:g} point; the most faithful has"
        return _suggestion(min(measured, key=lambda row: fidelity[row.schedule].drop), why, published, fidelity)
    for those, why in (
        (harmless, f"the fastest that loses {SMALL_DROP:g} point at most:"),
        (known, "the r whose accuracy is published:"),
    ):
        if those:
            return _suggestion(max(those, key=lambda row: row.speed_up), why, published, fidelity)
    elsewhere = ", ".join(format_schedule(each.r) for schedule, each in published if any(schedule))
    where = f", and is published for r = {elsewhere}" if elsewhere else ""
    return Suggestion(
        None,
        f"no r is suggested: the accuracy of those that pay is not known{where}; measure it on your images, by "
        f"tomevit tune or tomevit eval",
        None,
    )


def _suggestion(
    row: Row, why: str, published: BySchedule, fidelity: Mapping[tuple[int | str, ...], Fidelity]
) -> Suggestion:
    cost = f", for {fidelity[row.schedule]}" if row.schedule in fidelity else _cost(row, published)
    return Suggestion(row.r, f"{why} {_gain(row)}{cost}", row.plain)


def _gain(row: Row) -> str:
    return f"{row.speed_up:.2f} times the best unmerged ({row.name})"


def _cost(row: Row, published: BySchedule) -> str:
    """The accuracy at this r as published, beside the one without merging."""
    top1 = published_at(row.schedule, published)
    if top1 is None:
        return "; its accuracy is not published: measure it on your images"
    beside = "".join(f" against {each.top1:.2f} % at r = 0" for schedule, each in published if not any(schedule))
    return f", for {top1:.2f} % top-1{beside}, as published"


# ------------------------------------------------------------------------------------------------------------- setting


def setting(
    model: VisionTransformer, *, device: torch.device | str, rounds: int, timm: bool, name: str | None = None
) -> dict[str, Any]:
    """What figures must be read with: the model, the machine, the versions."""
    found = subject(model, device, name) | {"rounds": rounds}
    if timm:
        import timm as theirs

        found["timm"] = theirs.__version__
    return found


def subject(model: VisionTransformer, device: torch.device | str, name: str | None = None) -> dict[str, Any]:
    """The model, and where it runs: what any figure must be read with."""
    found: dict[str, Any] = {"model": name or model.card.full_name, "img_size": list(model.config.img_size)}
    found |= environment(device)
    if torch.device(device).type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found | {"platform": platform.platform(terse=True), "tomevit": __version__}


def as_json(setting: dict[str, Any], comparisons: Iterable[Comparison]) -> dict[str, Any]:
    """Everything, as JSON takes it.

    schema       1; it changes when a field changes its meaning or goes
    …            the setting: model, img_size, rounds, device, threads, platform, tomevit, timm, torch, python
    comparisons  one for each dtype and batch:
        dtype, batch, rounds    rounds: those that were timed
        note                    why there are fewer rows or rounds than asked for, or ""
        hints                   sentences on what binds
        suggestion              {r, why, plain}, or null; r and plain as in the rows, null where no accuracy is known
        rows                    one for each candidate:
            implementation, mode, tokens, merges
            r                   as it was asked for; (r, inflection) is {"mean": r, "inflection": inflection}
            plain               the same in numbers, as `model.r` has it
            schedule            what happens in each block: entries of a list that is an r
            seconds             {lower, median, upper}: quartiles of a call
            images_per_second   by the median
            speed_up            over the fastest row of the comparison that merges nothing
            speed_up_range      [lower, upper], with 95 % confidence, or null for fewer than 6 rounds
            gflops, flop_ratio  multiply-adds as the paper counts, and those of r = 0 over these
            gflops_computed, flop_ratio_computed    as they are computed
            efficiency          speed_up / flop_ratio_computed
            efficiency_range    as speed_up_range
            bounds              {arithmetic, memory, launches, allocation, rate, bandwidth, bound_by}, or null:
                                    shares of the time (null: unknown), and what the device reaches, per second
    """
    return {"schema": SCHEMA} | setting | {"comparisons": [_comparison_as_json(each) for each in comparisons]}


def _comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    rows = [
        row._asdict()
        | {"r": schedule_to_json(row.r), "plain": schedule_to_json(row.plain)}
        | {"seconds": row.seconds._asdict(), "efficiency": row.efficiency, "efficiency_range": row.efficiency_range}
        | {"bounds": None if row.bounds is None else row.bounds._asdict() | {"bound_by": row.bounds.bound_by}}
        for row in comparison.rows
    ]
    suggestion = None
    if comparison.suggestion is not None:
        r, why, plain = comparison.suggestion
        as_plain = {"r": r, "plain": plain}
        suggestion = {name: None if each is None else schedule_to_json(each) for name, each in as_plain.items()}
        suggestion |= {"why": why}
    fields = {name: getattr(comparison, name) for name in ("dtype", "batch", "rounds", "note")}
    return fields | {"hints": list(comparison.hints), "suggestion": suggestion, "rows": rows}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """The precision of float32 products that a name in PRECISIONS asks for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[dtype][1])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------------------- private


def _many_programs(those: Sequence[Candidate]) -> AbstractContextManager[Any]:
    """Without it torch.compile gives up after eight programs of a block, in silence, and runs it eagerly."""
    if all(each.weights is not None for each in those):
        return nullcontext()  # torch's compiler takes seconds to import
    return private.allow_many_programs()

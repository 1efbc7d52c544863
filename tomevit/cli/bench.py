"""How fast, and why: `tomevit bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from tomevit.cli import options, reports
from tomevit.cli.console import echo, json_lines
from tomevit.cli.options import Command, R, described, with_meaning, with_range
from tomevit.cli.plot import draw, picture_kind
from tomevit.cli.reports import report_form, write_report
from tomevit.cli.running import device_of, untrained
from tomevit.cli.tables import Column, Legend, Part, Table, show
from tomevit.measure.bench import MODES, PRECISIONS, Comparison, Fidelity, Row, as_json, setting, sweep, timm_twin
from tomevit.measure.bounds import SHARES
from tomevit.measure.defaults import default_r
from tomevit.models import VisionTransformer
from tomevit.output import check_outputs, new_file
from tomevit.progress import progress_bar
from tomevit.schedule import Schedule, entries, format_schedule
from tomevit.tasks.tune.front import Front

COLUMNS = (
    *(Column(""), Column("r"), Column("tokens", 3), Column("images/s"), Column("ms", 2), Column("quartiles", 4)),
    *(Column("speed-up"), Column("FLOP ratio", 1), Column("efficiency", 1)),
    *(Column(name, 5) for name in SHARES),
)
EFFICIENCY = (
    "Efficiency is the speed-up over the FLOP ratio of what is computed, with the range of 95 % confidence; 1 is its "
    "limit."
)
ESTIMATES = (
    "The last columns are estimates, from what the device reaches: the share of the time that matrix products, reading "
    "and writing memory, starting operators, and memory fetched from the system would take alone."
)
LEGEND = Legend(
    (
        ("", "Times are of a batch. Speed-up is over the fastest that merges nothing, marked *."),
        ("efficiency", EFFICIENCY),
        (SHARES[0], ESTIMATES),
    )
)
BAR = "{desc}{percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left"


@click.command(cls=Command)
@click.argument("model", metavar="[NAME|FILE]", default="vit_b16")
@click.option(
    "--r",
    "r_values",
    type=R(),
    multiple=True,
    help=f"Values to compare with r = 0; default: three that fit its depth. An r: {options.FORMS_OF_R}.",
)
@click.option(
    "--batch",
    "batches",
    type=options.BATCH,
    multiple=True,
    help="Images per call; default: 1 8, beyond a CPU 1 64.",
)
@options.img_size
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(PRECISIONS)), multiple=True, default=("float32",), show_default=True
)
@options.device
@options.threads
@click.option(
    "--mode",
    "modes",
    type=click.Choice(list(MODES)),
    multiple=True,
    help="How models run: compiled is block by block, whole a program for each r.  [default: eager]",
)
@click.option("--compile", "compiled", is_flag=True, help="The same as --mode compiled.")
@click.option("--timm/--no-timm", default=None, help="Against timm's model too; default: where it is installed.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed calls of each.")
@click.option(
    "--target",
    type=click.FloatRange(1, min_open=True),
    help="Suggest the least r with this speed-up; with --front the most faithful.",
)
@click.option(
    "--front",
    "front_file",
    type=options.FilePath(exists=True, dir_okay=False),
    help="What tomevit tune measured of this model, on any device: compare its schedules, suggest by their fidelity.",
)
@reports.form_flags(json="As JSON.", markdown="As Markdown, to paste into an issue.")
@options.picture
@reports.out
def bench(
    model: str,
    r_values: tuple[Schedule, ...],
    batches: tuple[int, ...],
    img_size: tuple[int, int] | None,
    dtypes: tuple[str, ...],
    device: str,
    threads: int | None,
    modes: tuple[str, ...],
    compiled: bool,
    timm: bool | None,
    rounds: int,
    target: float | None,
    front_file: Path | None,
    flag: str | None,
    picture: Path | None,
    out: Path | None,
) -> None:
    """Throughput of a model at several r, against the fastest that merges nothing: itself at r = 0, or timm's.

    All candidates take turns, and medians are compared. It says what binds (arithmetic, memory, launches), how much of
    the FLOPs saved becomes time saved, and which r to take, where its accuracy is known: as published, or by --front.
    A NAME, by default vit_b16, has fresh weights; they do not matter here.
    """
    check_outputs(picture, out, inputs=[model, *filter(None, [front_file])])
    form = report_form(out, flag, FORMS)
    kind = "" if picture is None else picture_kind(picture)
    if threads is not None:
        torch.set_num_threads(threads)
    place = device_of(device)
    subject = untrained(model, img_size)
    modes = tuple(dict.fromkeys((*modes, *(("compiled",) if compiled else ())))) or ("eager",)
    batches = tuple(dict.fromkeys(batches)) or ((1, 8) if place.type == "cpu" else (1, 64))
    front = None if front_file is None else Front.load(front_file)
    if front is not None:
        front.check(subject)
    found_faithful = [] if front is None else [point.r for point in front.points if point.kind != "unmerged"]
    with_timm, notes = _with_timm(subject, timm)

    found: list[Comparison] = []
    where = setting(subject, device=place, rounds=rounds, timm=with_timm, name=model)
    with progress_bar(total=1.0, bar_format=BAR) as bar:
        comparisons = sweep(
            subject,
            r_values or found_faithful or default_r(subject.card),
            batches=batches,
            dtypes=tuple(dict.fromkeys(dtypes)),
            device=place,
            modes=modes,
            timm=with_timm,
            rounds=rounds,
            target=target,
            fidelity=None if front is None else _fidelity(front, subject),
            progress=bar.update,
        )
        interrupted = _interrupted(comparisons, found)

    lines = FORMS[form](where, found, notes)
    if out is not None:
        write_report(out, lines)
    if picture is not None and any(comparison.rows for comparison in found):
        with new_file(picture) as draft:
            draw(draft, kind, {model: as_json(where, found)})
        echo(f"written to {picture}", err=True)
    if out is None:  # at last, for it may find no reader
        show(lines)
    if interrupted:
        raise KeyboardInterrupt
    if not any(comparison.rows for comparison in found):
        raise ValueError("nothing was measured: no batch fits into the memory of the device; give a smaller --batch")


def _fidelity(front: Front, model: VisionTransformer) -> dict[tuple[int | str, ...], Fidelity]:
    """What a front has of each schedule's answers; its times may be of another device, and do not count here."""
    first = front.points[0]
    what = "agreement" if first.top1 is None else "top-1"
    images = front.setting["images"]["held_back"]
    return {
        entries(model.steps(point.r)): Fidelity(point.kept, first.kept, what, images)
        for point in (*front.points, *front.others)
    }


def _interrupted(comparisons: Iterable[Comparison], found: list[Comparison]) -> bool:
    """Collect comparisons as they come; whether the keyboard interrupted that. What was found until then counts."""
    try:
        for comparison in comparisons:
            found.append(comparison)  # noqa: PERF402  # extend would drop what came before an interrupt
    except KeyboardInterrupt:
        return True
    return False


def _with_timm(model: VisionTransformer, wanted: bool | None) -> tuple[bool, list[str]]:
    """Whether to compare with timm's model; if nobody said and it cannot be had, the reason."""
    if wanted is False:
        return False, []
    try:
        timm_twin(model)
    except ValueError as error:
        if wanted:
            raise
        return False, [f"Not compared with timm's model: {error}."]
    return True, []


# ----------------------------------------------------------------------------------------------------------------- text


def _as_text(where: dict[str, Any], found: Sequence[Comparison], notes: Sequence[str]) -> list[Part]:
    lines: list[Part] = [described(where)]
    for comparison in found:
        lines += ["", f"{comparison.dtype}, batch {comparison.batch}"]
        if comparison.rows:
            lines.append(_table(comparison))
        lines += _sentences(comparison)
    return [*lines, "", *notes, LEGEND, _ratios_of_the_paper(found)]


def _as_markdown(where: dict[str, Any], found: Sequence[Comparison], notes: Sequence[str]) -> list[str]:
    lines = [f"### tomevit bench: {where['model']}", "", described(where)]
    for comparison in found:
        lines += ["", f"**{comparison.dtype}, batch {comparison.batch}**", ""]
        if comparison.rows:
            lines += [*_table(comparison).markdown(), ""]
        lines += [f"- {sentence}" for sentence in _sentences(comparison)]
    return [*lines, "", *notes, LEGEND.text(), _ratios_of_the_paper(found)]


def _table(comparison: Comparison) -> Table:
    best = comparison.best
    return Table(COLUMNS, [_row_cells(row, row is best) for row in comparison.rows])


def _row_cells(row: Row, best: bool) -> list[str]:
    lower, median, upper = (1000 * seconds for seconds in row.seconds)
    digits = max(0, 2 - len(str(int(median))) + 1)
    shares = {} if row.bounds is None else row.bounds.shares
    return [
        row.name + " *" * best,
        format_schedule(row.r),
        str(row.tokens),
        f"{row.images_per_second:.1f}",
        f"{median:.{digits}f}",
        f"{lower:.{digits}f}–{upper:.{digits}f}",
        f"{row.speed_up:.2f}",
        f"{row.flop_ratio_computed:.2f}",
        with_range(row.efficiency, row.efficiency_range, 2) if row.merges else "",
        *(f"{100 * shares[name]:.0f} %" if name in shares else "" for name in SHARES),
    ]


def _sentences(comparison: Comparison) -> list[str]:
    """What is to be said below a table, each on a line of its own."""
    found = [*([comparison.note] if comparison.note else []), *comparison.hints]
    if comparison.suggestion is not None:
        r, why, plain = comparison.suggestion
        found.append(why if r is None or plain is None else f"suggested: r = {with_meaning(r, plain)}; {why}")
    return [f"{sentence}." for sentence in found]


def _ratios_of_the_paper(found: Iterable[Comparison]) -> str:
    """The FLOP ratios as the paper has them, which are larger where the last block computes one token alone."""
    ratios = {
        str(row.r): f"r = {with_meaning(row.r, row.plain)}: {row.flop_ratio:.2f}"
        for comparison in found
        for row in comparison.rows
        if row.merges
    }
    return (
        f"FLOP ratios by the paper's count, with every token in the last block: {', '.join(ratios.values()) or 'none'}."
    )


FORMS: dict[str, Callable[..., Sequence[Part]]] = {
    "text": _as_text,
    "json": lambda where, found, notes: json_lines(as_json(where, found)),  # noqa: ARG005
    "markdown": _as_markdown,
}

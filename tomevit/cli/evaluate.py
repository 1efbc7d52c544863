"""How right: `tomevit eval`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from tomevit.cards import Card
from tomevit.cli import options, reports
from tomevit.cli.console import echo, json_lines
from tomevit.cli.options import Command, R, described
from tomevit.cli.plot import draw, picture_kind
from tomevit.cli.reports import report_form, write_report
from tomevit.cli.running import DTYPES, card_of_argument, own_device, readers, trained
from tomevit.cli.tables import Column, Legend, Part, Table, show
from tomevit.config import Config
from tomevit.data.distributed import fail_together, join_process_group, processes
from tomevit.data.labelled_images import Labelled, labelled, read_class_names
from tomevit.errors import printable
from tomevit.flops import plain_steps
from tomevit.measure.bench import subject
from tomevit.measure.published import published_by_schedule
from tomevit.models import VisionTransformer
from tomevit.output import check_outputs, is_stream, new_file
from tomevit.progress import Bar, progress_bar
from tomevit.schedule import Schedule, distinct_schedules, entries, format_schedule
from tomevit.tasks.classify import check_head
from tomevit.tasks.evaluate import (
    Evaluation,
    Expected,
    Row,
    Share,
    Step,
    Verdict,
    as_json,
    evaluate,
    forget,
    judge,
)

COLUMNS = (
    *(Column("r"), Column("tokens", 4), Column("top-1 %"), Column("95 %"), Column("top-5 %", 6), Column("95 %", 7)),
    *(Column("vs r = 0"), Column("95 %", 3), Column("agree %", 2), Column("published", 2)),
    *(Column("images/s", 1), Column("speed-up"), Column("GFLOPs", 5), Column("FLOP ratio", 4)),
)
LEGEND = Legend(
    (
        ("", "Intervals are Wilson's; for the difference to r = 0, in points on the same images, Bonett and Price's."),
        ("agree %", "Agree: the same answer as at r = 0."),
        ("images/s", "images/s: of the forward pass alone, the median over batches, while images are read."),
        ("GFLOPs", "GFLOPs: billions of multiply-adds as they are computed."),
        ("FLOP ratio", "FLOP ratio: how many times fewer multiply-adds are computed than at r = 0."),
        ("published", "Published: the top-1 of these weights at this r, where there is one."),
    )
)
NAMED = 20  # unreadable files that are named; all are in the JSON
PUBLISHED = "published"


class _Request(NamedTuple):
    """What was asked for, as the options of the command have it."""

    data: Path
    model: str
    r_values: tuple[Schedule, ...]
    truth: Path | None
    classes: Path | None
    limit: int | None
    img_size: tuple[int, int] | None
    dtype: str
    device: str
    expected: list[tuple[Schedule | None, float] | None]
    flag: str | None
    picture: Path | None
    out: Path | None
    restart: bool


class _Task(NamedTuple):
    """What there is to do."""

    model: VisionTransformer  # on its device, in its dtype
    images: Labelled
    r_values: list[Schedule]
    expected: list[Expected]
    state: Path | None  # the file that keeps what is known, so that an interrupted run can go on; None: there is none
    form: str  # of the report that is written
    picture_kind: str  # "" without a picture


def _parse_expected(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[Schedule | None, float] | None]:
    """(r or None, per cent) for each; None for what is published."""
    found: list[tuple[Schedule | None, float] | None] = []
    for value in values:
        r, equals, percent = value.rpartition("=")
        try:
            number = None if value == PUBLISHED else float(percent)
        except ValueError:
            number = -1.0
        if number is not None and not 0 <= number <= 100:
            raise click.BadParameter(f"{value!r} is neither 84.57 (per cent) nor 16=84.57 (at r = 16)", ctx, param)
        found.append(None if number is None else (R().convert(r, param, ctx) if equals else None, number))
    return found


@click.command("eval", cls=Command)
@click.option(
    "--data",
    required=True,
    type=options.FilePath(),
    help="A folder for each class; or images and a list of their classes; or ILSVRC's or any folder with val/ in it.",
)
@options.model(required=True)
@click.option(
    "--r",
    "r_values",
    type=R(),
    multiple=True,
    help=f"Values to evaluate; default: 0 and what the weights were trained with. An r: {options.FORMS_OF_R}.",
)
@options.truth
@options.classes
@click.option("--limit", type=click.IntRange(1), help="So many images only, drawn by chance, the same each time.")
@options.batch
@options.img_size
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@options.device
@options.threads
@options.workers
@click.option(
    "--skip-broken", is_flag=True, help="Unreadable files are no failure: status 0. They are named either way."
)
@click.option(
    "--expect",
    "expected",
    multiple=True,
    is_flag=False,
    flag_value=PUBLISHED,
    metavar="[[R=]PERCENT]",
    callback=_parse_expected,
    help="Compare top-1 with what is published for the weights, or with a figure, as in 84.57 or 16=84.57; "
    "status 1 if it is not within the interval.",
)
@reports.form_flags(json="As JSON.", markdown="As Markdown, to paste into an issue.")
@options.picture
@click.option(
    "-o",
    "--out",
    type=options.FilePath(dir_okay=False),
    help="Write it to a file too: .json and .md have their own form. An interrupted run goes on from OUT.progress.",
)
@click.option("--restart", is_flag=True, help="Begin anew, whatever OUT.progress has.")
@click.pass_context
def eval_command(
    ctx: click.Context,
    data: Path,
    model: str,
    r_values: tuple[Schedule, ...],
    truth: Path | None,
    classes: Path | None,
    limit: int | None,
    batch: int,
    img_size: tuple[int, int] | None,
    dtype: str,
    device: str,
    threads: int | None,
    workers: int | None,
    skip_broken: bool,
    expected: list[tuple[Schedule | None, float] | None],
    flag: str | None,
    picture: Path | None,
    out: Path | None,
    restart: bool,
) -> None:
    """Accuracy and throughput on labelled images at several r, each image read once.

    Top-1 and top-5 with intervals of 95 %, the difference to r = 0 on the same images and how often the answer is the
    same. Images are prepared as the weights were evaluated when they were published.

    \b
    On several GPUs:
    torchrun --nproc-per-node N --no-python -- tomevit eval --device cuda ...
    """  # noqa: D301  # click's mark for lines that stay as they are
    if threads is not None:
        torch.set_num_threads(threads)
    request = _Request(
        data=data,
        model=model,
        r_values=r_values,
        truth=truth,
        classes=classes,
        limit=limit,
        img_size=img_size,
        dtype=dtype,
        device=device,
        expected=expected,
        flag=flag,
        picture=picture,
        out=out,
        restart=restart,
    )
    with join_process_group():
        rank, world = processes()
        task = fail_together(partial(_prepare, request))
        if task.images.passed_over and not rank:
            echo(f"tomevit: {task.images.passed_over}", err=True)
        workers = readers(task.model.device) if workers is None else workers
        found = _evaluate(task, batch, workers, restart=restart)
    if rank:
        ctx.exit(130 if found.interrupted else 0)
    verdicts = judge(found.rows, task.expected)
    _report(request, task, _setting(request, task, workers, world), found, verdicts)
    broken = bool(found.unreadable) and not skip_broken
    ctx.exit(1 if broken or not all(verdict.within for verdict in verdicts) else 0)


def _evaluate(task: _Task, batch: int, workers: int, *, restart: bool) -> Evaluation:
    rank, _ = processes()
    if task.state is not None and restart and rank == 0:
        forget(task.state)
    with progress_bar(unit="image", shown=not rank) as bar:
        return evaluate(
            task.model,
            task.images.files,
            task.images.labels,
            task.r_values,
            batch=batch,
            workers=workers,
            state=task.state,
            progress=partial(_update_bar, bar, rank),
        )


def _report(
    request: _Request, task: _Task, setting: dict[str, Any], found: Evaluation, verdicts: Sequence[Verdict]
) -> None:
    """Print what was found, and write it where that was asked for.

    Raises:
        ValueError: no image could be read.
        KeyboardInterrupt: the evaluation was interrupted; then what is known is printed alone.
    """
    if not found.rows and not found.interrupted:
        file, reason = found.unreadable[0]
        raise ValueError(f"none of the {found.images} images can be read, as {printable(file)}: {printable(reason)}")
    result = as_json(setting, found, verdicts)
    try:
        show(FORMS[request.flag or "text"](result, found, verdicts))
    finally:  # also where what is printed finds no reader
        if request.out is not None and not found.interrupted:
            write_report(request.out, FORMS[task.form](result, found, verdicts))
    if found.interrupted:
        if found.rows:
            goes_on = "the same command goes on from there"
            echo(goes_on if task.state else "with -o the next run would go on from there", err=True)
        raise KeyboardInterrupt
    if request.picture is not None:
        with new_file(request.picture) as draft:
            draw(draft, task.picture_kind, {request.model: result})
        echo(f"written to {request.picture}", err=True)
    if task.state is not None:
        forget(task.state)


# ---------------------------------------------------------------------------------------------------------- preparation


def _prepare(request: _Request) -> _Task:
    """Load the model and find the images. Whatever the user may have got wrong comes before a download.

    Raises:
        ValueError, OSError: something does not fit, or is not there.
    """
    check_outputs(request.picture, request.out)
    kind = "" if request.picture is None else picture_kind(request.picture)
    form = report_form(request.out, request.flag, FORMS)
    state = None
    if request.out is not None and not is_stream(request.out):
        state = request.out.with_name(f"{request.out.name}.progress")
    if request.restart and state is None:
        raise ValueError("--restart is for a run with -o: without it nothing is kept to go on from")
    place = own_device(request.device)
    model, img_size = request.model, request.img_size
    card = card_of_argument(model)
    check_head(card)
    r_values = list(request.r_values) or distinct_schedules([0, card.r])
    config = card.config if img_size is None else replace(card.config, img_size=img_size)
    schedules = {entries(plain_steps(r, config, card.presets)): r for r in reversed(r_values)}
    expected = _expected(request.expected, card, config, schedules)
    num_classes = card.config.num_classes
    names = read_class_names(request.classes, num_classes) if request.classes else card.class_names
    images = labelled(request.data, num_classes, names, truth=request.truth)
    inputs = [model, *images.files, *map(str, filter(None, (request.truth, request.classes)))]
    check_outputs(request.picture, request.out, inputs=inputs)
    loaded = trained(model, img_size=img_size).to(place, DTYPES[request.dtype])
    return _Task(loaded, _random_subset(images, request.limit), r_values, expected, state, form, kind)


def _setting(request: _Request, task: _Task, workers: int, world: int) -> dict[str, Any]:
    """What the figures must be read with."""
    return subject(task.model, task.model.device, request.model) | {
        "weights": task.model.card.full_name,
        "data": str(request.data),
        "labels": task.images.how,
        "notes": list(task.images.notes),
        "limit": request.limit,
        "dtype": request.dtype,
        "workers": workers,
        "processes": world,
    }


def _expected(
    wanted: Sequence[tuple[Schedule | None, float] | None],
    card: Card,
    config: Config,
    evaluated: Mapping[tuple[int | str, ...], Schedule],
) -> list[Expected]:
    """What --expect asks for, at r that are evaluated.

    Args:
        wanted: r and per cent of each; None: what is published.
        card: of the weights.
        config: theirs, at the image size of this evaluation.
        evaluated: each r, by what happens in each block then.
    """
    found: list[Expected] = []
    for item in wanted:
        if item is None:
            name, known = card.full_name or "these weights", published_by_schedule(card)
            if not known:
                raise ValueError(f"no accuracy is published for {name}; --expect takes one, as in --expect 16=84.57")
            if config != card.config:
                raise ValueError("what is published holds for the weights' own image size: leave out --img-size")
            fitting = [each._replace(r=evaluated[schedule]) for schedule, each in known if schedule in evaluated]
            if not fitting:
                there = ", ".join(format_schedule(each.r) for _, each in known)
                raise ValueError(f"the accuracy of {name} is published at r = {there}, which --r does not have")
            found += fitting
            continue
        r, percent = item
        first, *others = evaluated
        if r is None and others:
            example = f"{format_schedule(evaluated[first])}={percent:g}"
            raise ValueError(f"--expect {percent:g} must say at which r, as in --expect {example}")
        schedule = first if r is None else entries(plain_steps(r, config, card.presets))
        if schedule not in evaluated:
            assert r is not None
            raise ValueError(f"--expect has r = {format_schedule(r)}, which --r does not have")
        found.append(Expected(evaluated[schedule], percent, "--expect"))
    return found


def _random_subset(images: Labelled, limit: int | None) -> Labelled:
    """So many of them, drawn by chance: the first would be of the first classes alone."""
    if limit is None or limit >= len(images.files):
        return images
    chosen = (
        torch.randperm(len(images.files), generator=torch.Generator().manual_seed(0))[:limit].sort().values.tolist()
    )
    return images._replace(
        files=[images.files[i] for i in chosen],
        labels=[images.labels[i] for i in chosen],
        notes=(*images.notes, f"{limit} of {len(images.files)} images, drawn by chance."),
    )


def _update_bar(bar: Bar, rank: int, step: Step) -> None:
    """How far it is, on the bar of the first process."""
    if step.done == 0 and rank == 0 and step.resumed:
        echo(f"going on from {step.resumed} images of an earlier run", err=True)
    bar.total = step.images
    bar.update(step.done - bar.n)
    if step.unreadable:
        bar.set_postfix_str(f"{step.unreadable} unreadable", refresh=False)


# ----------------------------------------------------------------------------------------------------------------- text


def _as_text(result: dict[str, Any], found: Evaluation, verdicts: Sequence[Verdict]) -> list[Part]:
    lines: list[Part] = [*_heading(result)]
    if found.rows:
        lines += ["", Table(COLUMNS, [*map(_cells, found.rows)]), "", LEGEND]
    return [*lines, *_sentences(result, found, verdicts)]


def _as_markdown(result: dict[str, Any], found: Evaluation, verdicts: Sequence[Verdict]) -> list[str]:
    table = ["", *Table(COLUMNS, [*map(_cells, found.rows)]).markdown(), "", LEGEND.text(), ""] if found.rows else []
    sentences = [f"- {sentence}" for sentence in _sentences(result, found, verdicts)]
    return [f"### tomevit eval: {result['model']}", "", *_heading(result), *table, *sentences]


def _heading(result: dict[str, Any]) -> list[str]:
    processes = f" in each of {result['processes']} processes" * (result["processes"] > 1)
    return [
        f"{described(result)}",
        f"{result['evaluated']} images from {result['data']} ({result['labels']}), "
        f"{result['dtype']}, in batches of {result['batch']}{processes}",
    ]


def _cells(row: Row) -> list[str]:
    def rounded(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def between(share: Share) -> str:
        return f"{share.lower:.2f}–{share.upper:.2f}"

    difference = ["", ""]
    if row.difference is not None:
        difference = [f"{row.difference.value:+.2f}", f"{row.difference.lower:+.2f} to {row.difference.upper:+.2f}"]
    return [
        format_schedule(row.r),
        str(row.tokens),
        f"{row.top1.value:.2f}",
        between(row.top1),
        f"{row.top5.value:.2f}",
        between(row.top5),
        *difference,
        "" if row.agreement is None else f"{row.agreement.value:.2f}",
        rounded(row.published, 2),
        rounded(row.images_per_second, 1),
        rounded(row.speed_up, 2),
        f"{row.gflops_computed:.3g}",
        f"{row.flop_ratio:.2f}",
    ]


def _sentences(result: dict[str, Any], found: Evaluation, verdicts: Sequence[Verdict]) -> list[str]:
    """What is to be said below the table, each on a line of its own."""
    said = list(result["notes"])
    if found.interrupted:
        done = found.evaluated + len(found.unreadable)
        said.append(f"Interrupted: {done} of {found.images} images are done. They are drawn by chance.")
    said += [
        f"{format_schedule(row.r)} is r = {format_schedule(row.plain)} here."
        for row in found.rows
        if row.r != row.plain
    ]
    said += [
        f"At r = {format_schedule(row.r)} the logits of {row.not_finite} images are not finite."
        for row in found.rows
        if row.not_finite
    ]
    for verdict in verdicts:
        off = verdict.measured.value - verdict.expected
        said.append(
            f"At r = {format_schedule(verdict.r)} top-1 is {off:+.2f} points from the {verdict.expected:.2f} % of "
            f"{verdict.source}, which {'is within' if verdict.within else 'is not within'} the interval."
        )
    if found.rate is not None:
        said.append(f"{found.rate:.4g} images/s in all, every r and reading included (--workers {result['workers']}).")
    if found.unreadable:
        said.append(f"{len(found.unreadable)} of {found.images} files cannot be read, and are not counted:")
        said += [f"  {file}: {reason}" for file, reason in found.unreadable[:NAMED]]
        if len(found.unreadable) > NAMED:
            said.append(f"  … and {len(found.unreadable) - NAMED} more; --json has all")
    return said


FORMS: dict[str, Callable[..., Sequence[Part]]] = {
    "text": _as_text,
    "json": lambda result, found, verdicts: json_lines(result),  # noqa: ARG005
    "markdown": _as_markdown,
}

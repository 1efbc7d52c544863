"""What images show: `tomevit classify`."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from tomevit.cli import options, reports
from tomevit.cli.console import echo, json_lines
from tomevit.cli.options import Command, R
from tomevit.cli.reports import report_form
from tomevit.cli.running import DTYPES, card_of_argument, device_of, readers, trained
from tomevit.cli.tables import terminal_width, wrapped
from tomevit.data.class_names import ClassNames, class_names
from tomevit.data.images import read, search
from tomevit.errors import ImageError, printable
from tomevit.measure.timing import environment
from tomevit.models import VisionTransformer
from tomevit.output import check_outputs, new_file
from tomevit.progress import progress_bar
from tomevit.schedule import Schedule, format_schedule, schedule_to_json
from tomevit.tasks.classify import Answer, Guess, Summary, Tally, answers, check_classifiable
from tomevit.version import __version__

SCHEMA = 1
WIDTH = 80  # of text, at most
FEW = 10  # batches, whose times say little
BLOCKS = 10  # images that have several lines each; of more each has one
BESIDE_NAME = 46  # columns that the shares and the file have beside the class, where each image has one line


@click.command(cls=Command)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@options.model(default="vit_b16", show_default=True)
@click.option("--r", type=R(), help=f"How much merges; default: the model's own. An r: {options.FORMS_OF_R}.")
@click.option("--compare", is_flag=True, help="Show r = 0 beside r, and whether the answer changed.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes for each image.")
@click.option(
    "--upright/--no-upright",
    default=True,
    show_default=True,
    help="Turn photographs as their EXIF data says. Published accuracies were measured without.",
)
@click.option("--batch", type=options.BATCH, help="Images per call; default: 8, beyond a CPU 64.")
@click.option(
    "--workers",
    type=options.WORKERS,
    help="Processes that read images; default: none, beyond a CPU one per core, at most 8.",
)
@options.device
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: that of the weights.")
@options.img_size
@reports.form_flags(json="As JSON.", csv="As CSV, a row for each image and rank.")
@reports.out
@click.pass_context
def classify(
    ctx: click.Context,
    images: tuple[str, ...],
    model: str,
    r: Schedule | None,
    compare: bool,
    top: int,
    upright: bool,
    batch: int | None,
    workers: int | None,
    device: str,
    dtype: str | None,
    img_size: tuple[int, int] | None,
    flag: str | None,
    out: Path | None,
) -> None:
    """The likeliest classes of images: files, folders, patterns, and - for standard input.

    Standard input is an image, or a list of files, one per line. Of up to 10 images all classes are shown; of more the
    first, on one line each; --csv and --json have them all. Files that cannot be read are named on standard error: the
    status is then 1 at the end, and 2 if none can be read. A name that leads nowhere ends it before it begins.
    """
    place = device_of(device)
    check_classifiable(card_of_argument(model, img_size=img_size), r, compare=compare)  # before a download
    sources = _sources(images)
    check_outputs(out, inputs=[model, *(source for source in sources if isinstance(source, str))])
    form = FORMS[report_form(out, flag, FORMS)]
    loaded = trained(model, r, img_size).to(place, DTYPES[dtype] if dtype else None)

    on_cpu = place.type == "cpu"
    batch = batch or (8 if on_cpu else 64)
    if workers is None:
        workers = 0 if on_cpu else min(readers(place), len(sources) // batch)
    name = model if Path(model).exists() else loaded.card.full_name
    columns = min(WIDTH, (terminal_width() if out is None else None) or WIDTH)
    setting = _setting(loaded, name, len(sources), top, batch, compare=compare, upright=upright, columns=columns)
    run = answers(loaded, sources, top=top, compare=compare, batch=batch, workers=workers, upright=upright)
    with _reporting(out) as report:
        summary = _report_answers(run, sources, form, setting, report)
    if out is not None:
        echo(f"written to {out}", err=True)
    if summary.images + summary.unreadable < len(sources):
        raise KeyboardInterrupt
    if summary.unreadable == len(sources) > 1:
        echo(f"tomevit: none of {summary.unreadable} images can be read", err=True)
    ctx.exit(0 if not summary.unreadable else 2 if summary.unreadable == len(sources) else 1)


@contextmanager
def _reporting(out: Path | None) -> Iterator[Callable[[str], object]]:
    """What takes the lines of a report one by one: standard output, or a file that is put in place at the end."""
    if out is None:
        yield echo
        return
    with new_file(out) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape") as file:
        yield lambda line: file.write(f"{line}\n")


def _report_answers(
    run: Iterator[Answer],
    sources: Sequence[str | bytes],
    form: _Format,
    setting: _Setting,
    report: Callable[[str], object],
) -> Summary:
    """Report answers line by line as they come; there are fewer than sources if the keyboard interrupted that."""
    tally = Tally()
    kept: list[Answer] = []

    def report_all(lines: Iterable[str]) -> None:
        for line in lines:
            report(line)

    report_all(form.head(setting))
    with progress_bar(total=len(sources), unit="image") as bar, suppress(KeyboardInterrupt):
        for answer, source in zip(run, sources, strict=True):
            answer = answer._replace(image=source if isinstance(source, str) else "-")
            tally.add(answer)
            if form.keeps:
                kept.append(answer)
            with bar.external_write_mode():
                if answer.error:
                    echo(f"tomevit: {_file(answer)}: {answer.error}", err=True)
                else:
                    report_all(form.each(setting, answer))
            bar.update()
    report_all(form.foot(setting, tally.summary(), kept))
    return tally.summary()


# ---------------------------------------------------------------------------------------------------------------- input


def _sources(arguments: Sequence[str]) -> list[str | bytes]:
    """The files that arguments name, and what comes by standard input.

    Raises:
        ValueError: an argument names nothing, or standard input is empty or neither an image nor a list of files.
    """
    if arguments.count("-") > 1:
        raise ValueError("standard input, -, can be read only once")
    found: list[str | bytes] = []
    for argument in arguments:
        if argument == "-":
            found += _parse_standard_input(sys.stdin.buffer.read())
            continue
        files, _ = located = search([argument])
        found += files
        if passed_over := located.passed_over():
            echo(f"tomevit: {argument}: {passed_over}", err=True)
    return found


def _parse_standard_input(data: bytes) -> list[str | bytes]:
    """An image, or the files that are listed, one per line."""
    names = [os.fsdecode(line.removesuffix(b"\r")) for line in data.split(b"\n") if line.strip()]
    if not names:
        raise ValueError("standard input is empty: it must be an image, or a list of files, one per line")
    if _is_image(data):
        return [data]
    if re.search(rb"[\0-\x08\x0e-\x1f]", data):
        raise ValueError("standard input is neither an image of a known format nor a list of files, one per line")
    return [*names]


def _is_image(data: bytes) -> bool:
    """Whether it is meant to be one, however damaged."""
    from PIL import UnidentifiedImageError

    try:
        read(data)
    except ImageError as error:
        return not isinstance(error.__cause__, UnidentifiedImageError)
    return True


# --------------------------------------------------------------------------------------------------------------- output


class _Setting(NamedTuple):
    """What answers must be read with."""

    model: str
    r: Schedule
    tokens: tuple[int, ...]  # entering each block, and leaving the last
    classes: ClassNames
    compare: bool
    images: int
    one_line_each: bool  # of text
    columns: int  # of text
    width: int  # of the column of classes there
    upright: bool
    batch: int
    dtype: str
    machine: dict[str, str]


def _setting(
    model: VisionTransformer,
    name: str,
    images: int,
    top: int,
    batch: int,
    *,
    compare: bool,
    upright: bool,
    columns: int,
) -> _Setting:
    classes = class_names(model.card)
    return _Setting(
        model=name,
        r=model.r,
        tokens=model.token_counts(),
        classes=classes,
        compare=compare,
        images=images,
        one_line_each=images > BLOCKS or min(top, model.config.num_classes) == 1,
        columns=columns,
        width=_width(classes, compare, columns - BESIDE_NAME),
        upright=upright,
        batch=batch,
        dtype=str(model.dtype).removeprefix("torch."),
        machine=environment(model.device),
    )


class _Format(NamedTuple):
    """Lines before all answers, of each answer, and after all."""

    head: Callable[[_Setting], list[str]]
    each: Callable[[_Setting, Answer], list[str]]
    foot: Callable[[_Setting, Summary, Sequence[Answer]], list[str]]
    keeps: bool = False  # all answers, for the lines after them


def _file(answer: Answer) -> str:
    return "standard input" if answer.image == "-" else answer.image


def _short_name(setting: _Setting, index: int) -> str:
    """Of a class, as it can be printed."""
    return printable(setting.classes.short(index))


def _text_head(setting: _Setting) -> list[str]:
    source, before, left = setting.classes.source, setting.tokens[0], setting.tokens[-1]
    kinds = {"": "classes without names", "own": "the model's own classes"}
    said = (
        f"{printable(setting.model)}, r = {format_schedule(setting.r)}: "
        f"{left} of {before} tokens remain after the last block",
        kinds.get(source, f"classes of {source}, by the size of the head"),
        "",
    )
    lines = [line for sentence in said for line in wrapped(sentence, setting.columns)]
    if setting.one_line_each:
        columns = [f"{'r = 0':>8}"] * setting.compare + [f"{_heading_of_r(setting):>8}"]
        lines.append("  ".join([*columns, "class".ljust(setting.width), "image"]))
    return lines


def _text_each(setting: _Setting, answer: Answer) -> list[str]:
    return [_one_line(setting, answer)] if setting.one_line_each else [*_block(setting, answer), ""]


def _one_line(setting: _Setting, answer: Answer) -> str:
    best = answer.top[0]
    cells, name = [_percent(best.probability)], _short_name(setting, best.class_index)
    if answer.top_unmerged:
        plain = answer.top_unmerged[0]
        cells = [_percent(plain.unmerged), *cells]
        if answer.changed:
            half = (setting.width - 3) // 2
            name = f"{_shorten(_short_name(setting, plain.class_index), half)} → {_shorten(name, half)}"
    return "  ".join([*cells, _shorten(name, setting.width).ljust(setting.width), _file(answer)])


def _block(setting: _Setting, answer: Answer) -> list[str]:
    time, time_unmerged = _milliseconds(answer.seconds), _milliseconds(answer.seconds_unmerged)
    if answer.changed is None:
        lines = [f"{_file(answer)}, {time}"]
    else:
        verdict = "another answer" if answer.changed else "the same answer"
        lines = [
            _file(answer),
            f"{'r = 0':>8}  {_heading_of_r(setting):>8}  {verdict}",
            f"{time_unmerged:>8}  {time:>8}",
        ]
    known = {guess.class_index for guess in answer.top}
    for guess in (*answer.top, *(guess for guess in answer.top_unmerged if guess.class_index not in known)):
        before = [] if answer.changed is None else [_percent(guess.unmerged)]
        cells = [*before, _percent(guess.probability)]
        name = printable(guess.name) or _short_name(setting, guess.class_index)
        lines.append("  ".join([*cells, _shorten(name, setting.columns - 10 * len(cells))]))
    return lines


def _text_foot(setting: _Setting, found: Summary, _: Sequence[Answer]) -> list[str]:
    sentences = []
    if found.images:
        device, threads = setting.machine["device"], setting.machine.get("threads")
        in_batches = f", in batches of {setting.batch}" if found.images > setting.batch else ""
        cores = f", {threads} thread{'s' * (threads != '1')}" if threads else ""
        each = " each" if found.images > 1 else ""
        time = _milliseconds(found.seconds)
        sentences.append(
            f"{_count(found.images)}, {time}{each} in the model: {setting.dtype}{in_batches}, on {device}{cores}."
        )
    if found.kept is not None and found.speed_up:
        sentences.append(
            f"At r = {format_schedule(setting.r)} the answer is that of r = 0 for {found.kept} of "
            f"{_count(found.images)} ({100 * found.kept / found.images:.1f} %), {found.speed_up:.2f} times as fast."
        )
        batches = math.ceil(found.images / setting.batch)
        if batches < FEW:
            rough = "One batch is" if batches == 1 else f"{batches} batches are"
            sentences.append(f"{rough} a rough measure of speed: tomevit bench takes a good one.")
    if found.unreadable:
        sentences.append(f"Not read: {found.unreadable}.")
    if (done := found.images + found.unreadable) < setting.images:
        sentences.append(f"Interrupted after {done} of {_count(setting.images)}.")
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, setting.columns)]
    return ["", *lines] if setting.one_line_each and lines else lines


def _width(classes: ClassNames, compare: bool, most: int) -> int:
    """Of the column of classes, where each image has one line."""
    longest = max(len(printable(classes.short(index))) for index in range(len(classes.names)))
    return min(most, 2 * longest + 3 if compare else max(longest, 5))


def _heading_of_r(setting: _Setting) -> str:
    name = f"r = {format_schedule(setting.r)}"
    return name if len(name) <= 8 else "merged"


def _percent(probability: float | None) -> str:
    return f"{100 * (probability or 0):6.2f} %"


def _milliseconds(seconds: float | None) -> str:
    milliseconds = 1000 * (seconds or 0)
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f} ms"


def _count(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1].rstrip(' ,')}…"


COLUMNS = ("image", "rank", "class_index", "synset", "name", "probability")
COMPARED = ("probability_r0", "r0_class_index", "r0_synset", "r0_name", "r0_probability", "changed")


def _csv_head(setting: _Setting) -> list[str]:
    compared = [*COMPARED, "r0_seconds"] if setting.compare else []
    return [_row([*COLUMNS, "tokens", "seconds", *compared])]


def _csv_each(setting: _Setting, answer: Answer) -> list[str]:
    lines = []
    for rank, guess in enumerate(answer.top, 1):
        name = "standard input" if answer.image == "-" else answer.image
        cells = [name, rank, guess.class_index, guess.synset, guess.name, guess.probability]
        cells += [answer.tokens, answer.seconds]
        if setting.compare:
            other = answer.top_unmerged[rank - 1]
            cells += [guess.unmerged, other.class_index, other.synset, other.name, other.unmerged]
            cells += [str(answer.changed).lower(), answer.seconds_unmerged]
        lines.append(_row(cells))
    return lines


def _row(cells: Iterable[Any]) -> str:
    file = io.StringIO()
    csv.writer(file).writerow(cells)  # it quotes the characters that end its lines, and these are \r\n by default
    return file.getvalue().removesuffix("\r\n")


def _json_foot(setting: _Setting, found: Summary, said: Sequence[Answer]) -> list[str]:
    result = {
        "schema": SCHEMA,
        "model": setting.model,
        "r": schedule_to_json(setting.r),
        "tokens": setting.tokens,
        "classes": setting.classes.source,
        "upright": setting.upright,
        "batch": setting.batch,
        "dtype": setting.dtype,
        **setting.machine,
        "tomevit": __version__,
        "images": [_answer_as_json(answer) for answer in said if not answer.error],
        "unreadable": [{"image": answer.image, "reason": answer.error} for answer in said if answer.error],
        "summary": found._asdict() | {"speed_up": found.speed_up},
        "interrupted": len(said) < setting.images,
    }
    return json_lines(result)


def _answer_as_json(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"image": answer.image, "seconds": answer.seconds}
    found["top"] = [_guess_as_json(guess) for guess in answer.top]
    if answer.top_unmerged:
        found["changed"] = answer.changed
        found["r0"] = {
            "seconds": answer.seconds_unmerged,
            "top": [_guess_as_json(guess) for guess in answer.top_unmerged],
        }
    return found


def _guess_as_json(guess: Guess) -> dict[str, Any]:
    found = guess._asdict()
    unmerged = found.pop("unmerged")
    return found if unmerged is None else found | {"probability_r0": unmerged}


FORMS = {
    "text": _Format(_text_head, _text_each, _text_foot),
    "csv": _Format(_csv_head, _csv_each, lambda *_: []),
    "json": _Format(lambda _: [], lambda *_: [], _json_foot, keeps=True),
}

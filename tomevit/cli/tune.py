"""Schedules for a device, searched on images: `tomevit tune`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tomevit.cards import Card
from tomevit.cli import options, reports
from tomevit.cli.console import echo, json_lines
from tomevit.cli.options import Command, described, with_range
from tomevit.cli.plot import picture_kind
from tomevit.cli.reports import report_form
from tomevit.cli.running import DTYPES, card_of_argument, device_of, readers, trained
from tomevit.cli.tables import Column, Legend, Part, Table, show
from tomevit.data.images import reading, search, stream
from tomevit.data.labelled_images import Labelled, labelled, read_class_names
from tomevit.measure.bench import MODES
from tomevit.models import VisionTransformer
from tomevit.output import check_output, check_outputs, is_stream
from tomevit.progress import progress_bar
from tomevit.schedule import format_schedule
from tomevit.tasks.tune import Front, Point, tune
from tomevit.tasks.tune.front import promise_of
from tomevit.tasks.tune.setting import LEAST_IMAGES, SEARCHABLE, SEARCHED
from tomevit.transform import transform
from tomevit.weights import checkpoint

LEGEND = Legend(
    (
        ("", "Speed-up is over r = 0, by medians of calls that took turns, with the range of 95 % confidence."),
        ("ms", "ms is of a call, which is a batch."),
        ("", "It holds for this device, dtype, batch and mode alone."),
        ("agree %", "Agree: the same answer as at r = 0."),
        ("KL", "KL: how far the classes' probabilities moved from those of r = 0, in nats."),
    )
)
RANKS = {"KL": 2, "ms": 1}  # of columns that a narrow terminal has no room for
SHORT = 18  # characters that the r of a row may have; of a longer one the row has a name


class Latency(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on only
    """20ms or 0.02s, as seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?(ms|s)", value)
        if found is None:
            self.fail(f"{value!r} is no time with its unit, as in 20ms or 0.02s", param, ctx)
        return float(found[1]) / (1000 if found[2] == "ms" else 1)


@click.command("tune", cls=Command)
@click.argument("folder", type=options.FilePath())
@options.model(required=True)
@click.option(
    "--speed-up", type=float, metavar="TIMES", help="Choose the most faithful point so many times as fast as r = 0."
)
@click.option(
    "--max-drop",
    type=float,
    metavar="POINTS",
    help="Choose the fastest point that loses so many points at most: of accuracy with labels, else of agreement.",
)
@click.option(
    "--latency", type=Latency(), help="Choose the most faithful point whose call takes at most 20ms, or 0.02s."
)
@click.option(
    "-o",
    "--out",
    type=options.FilePath(dir_okay=False),
    help="Write the model, as it was measured, with the chosen point as its r: a new .safetensors for every command.",
)
@click.option(
    "--front",
    "front_file",
    type=options.FilePath(dir_okay=False),
    help="Keep all that is measured in a .json; a search that was interrupted goes on from it.",
)
@options.truth
@options.classes
@click.option(
    "--limit",
    "count",
    type=click.IntRange(128, 512),
    default=256,
    show_default=True,
    help="So many of the folder's, drawn by chance; all where there are fewer.",
)
@click.option("--batch", type=options.BATCH, default=8, show_default=True, help="Images per call that is timed.")
@click.option("--mode", type=click.Choice(list(MODES)), default="eager", show_default=True, help="As in bench.")
@click.option(
    "--matchings",
    type=click.Choice(SEARCHABLE),
    multiple=True,
    default=SEARCHED,
    show_default=True,
    help="By which tokens may merge; each makes the search longer.",
)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Timed calls of each schedule.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is drawn by chance.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: that of the weights.")
@options.device
@options.threads
@options.workers
@reports.form_flags(json="As JSON.")
@options.picture
def tune_command(
    folder: Path,
    model: str,
    speed_up: float | None,
    max_drop: float | None,
    latency: float | None,
    out: Path | None,
    front_file: Path | None,
    truth: Path | None,
    classes: Path | None,
    count: int,
    batch: int,
    mode: str,
    matchings: tuple[str, ...],
    rounds: int,
    seed: int,
    dtype: str | None,
    device: str,
    threads: int | None,
    workers: int | None,
    flag: str | None,
    picture: Path | None,
) -> None:
    """The front of speed against fidelity on this device, searched on the images of FOLDER.

    No labels are needed: answers are compared with those of r = 0. With a folder for each class, or --truth, accuracy
    is measured too. Half of the images are searched on, and all figures are of the others. --speed-up, --max-drop or
    --latency chooses a point; what cannot be had ends in status 2 and says what can.
    """
    # Whatever the user may have got wrong comes before a download.
    asked = {"speed_up": speed_up, "max_drop": max_drop, "latency": latency}
    promises = {name: value for name, value in asked.items() if value is not None}
    if len(promises) > 1:
        options_given = " and ".join(f"--{name.replace('_', '-')}" for name in promises)
        raise click.UsageError(f"give one of --speed-up, --max-drop or --latency, and not {options_given}")
    if promises:
        promise_of(**promises)
    _check_out(out, chosen=bool(promises))
    form = FORMS[report_form(None, flag, FORMS)]
    if picture is not None:
        picture_kind(picture)
    place = device_of(device)
    found = _find(folder, card_of_argument(model), truth, classes)
    check_outputs(out, front_file, picture, inputs=[model, *found.files, *filter(None, (truth, classes))])
    found = _draw(found, count, seed)
    if threads is not None:
        torch.set_num_threads(threads)

    subject = trained(model).to(place, DTYPES[dtype] if dtype else None)
    images, labels = _read(found, subject, readers(place) if workers is None else workers)
    with _progress(front_file) as tell:
        front = tune(
            subject,
            images,
            labels,
            batch=batch,
            mode=mode,
            matchings=matchings,
            rounds=rounds,
            seed=seed,
            file=front_file,
            progress=tell,
        )
    chosen, refusal = _choose(front, promises)
    if picture is not None:
        front.plot(picture)
        echo(f"written to {picture}", err=True)
    if out is not None and chosen is not None:
        subject.r = chosen.r
        checkpoint.save(subject, out)
        echo(f"written to {out}", err=True)
    show(form(front, chosen, model if Path(model).exists() else subject.card.full_name))
    if refusal is not None:
        raise refusal


def _check_out(out: Path | None, *, chosen: bool) -> None:
    """Raises ValueError where the model could not be written, or would take the place of a file."""
    if out is None:
        return
    if not chosen:
        raise ValueError("-o is for a chosen point: name --speed-up, --max-drop or --latency")
    check_output(out, endings=(".safetensors",))
    if out.exists() and not is_stream(out):
        raise ValueError(f"{out} is there already: name another file")


def _choose(front: Front, promises: dict[str, float]) -> tuple[Point | None, ValueError | None]:
    """The point that keeps what is asked for, if anything is; or why none does."""
    if not promises:
        return None, None
    try:
        return front.at(**promises), None
    except ValueError as error:
        return None, error


@contextmanager
def _progress(front_file: Path | None) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of `tomevit.tune`, and what to say when it is interrupted."""
    with progress_bar() as bar:

        def tell(stage: str, done: int, total: int) -> None:
            if done == 0:
                bar.reset(total)
                bar.set_description(stage)
            bar.update(done - bar.n)

        try:
            yield tell
        except KeyboardInterrupt:
            goes_on = "the same command goes on from there" if front_file else "with --front the next run would go on"
            echo(f"tomevit: {f'{front_file} has what was measured; ' if front_file else ''}{goes_on}", err=True)
            raise


# --------------------------------------------------------------------------------------------------------------- images


def _find(folder: Path, card: Card, truth: Path | None, classes: Path | None) -> Labelled:
    """The images of a folder, with labels where it is certain which; else without any.

    Raises:
        ValueError, OSError: there are too few, the model takes no such images, or the classes named do not fit.
    """
    config = card.config
    if config.in_chans not in (1, 3):
        raise ValueError(f"the model takes images of {config.in_chans} channels, and files have 1 or 3")
    names = read_class_names(classes, config.num_classes) if classes else card.class_names
    said = None
    try:
        found = labelled(folder, config.num_classes, names, truth=truth)
    except ValueError as error:
        if truth or classes:
            raise
        located = search([folder])
        found = Labelled(located.files, [], "none", passed_over=located.passed_over())
        if config.num_classes > 1:
            said = f"accuracy is not measured, but agreement with r = 0: {error}"
    if (count := len(found.files)) < LEAST_IMAGES:
        images = f"{count} image{'s' * (count != 1)}"
        raise ValueError(f"{folder} has {images}, too few to tell schedules apart: {LEAST_IMAGES} at least")
    for line in filter(None, (said, found.passed_over)):
        echo(f"tomevit: {line}", err=True)
    return found


def _draw(found: Labelled, count: int, seed: int) -> Labelled:
    """So many of them, drawn by chance: the first would be of the first classes alone."""
    order = torch.randperm(len(found.files), generator=torch.Generator().manual_seed(seed))
    chosen = order[:count].sort().values.tolist()
    labels = [found.labels[i] for i in chosen] if found.labels else []
    return found._replace(files=[found.files[i] for i in chosen], labels=labels)


def _read(found: Labelled, model: VisionTransformer, workers: int) -> tuple[Tensor, Tensor | None]:
    """The images, prepared, and their labels, without those that cannot be read, which are named.

    Raises:
        ValueError: too few can be read.
    """
    images, places = [], []
    bar = progress_bar(desc="reading images", total=len(found.files), unit="image")
    with bar, reading(), closing(stream(found.files, transform(model), workers=workers)) as parts:
        for part in parts:
            images.append(part.images)
            places.append(part.places)
            for place, reason in part.unreadable:
                echo(f"tomevit: left out: {found.files[place]}: {reason}", err=True)
            bar.update(len(part.places) + len(part.unreadable))
    read = torch.cat(places)
    if len(read) < LEAST_IMAGES:
        raise ValueError(
            f"{len(read)} of {len(found.files)} images can be read, and {LEAST_IMAGES} are needed at least"
        )
    return torch.cat(images), torch.tensor(found.labels)[read] if found.labels else None


# ----------------------------------------------------------------------------------------------------------------- text


def _as_text(front: Front, chosen: Point | None, name: str) -> list[Part]:
    where, points = front.setting, front.points
    names, long = _names(points)
    columns: dict[str, Callable[[Point], str]] = {
        "speed-up": lambda p: with_range(p.speed_up, p.speed_up_range, 2),
        "ms": lambda p: _milliseconds(p.seconds),
    }
    if points[0].kl is None:
        columns["cosine"] = lambda p: f"{p.cosine:.4f}"
    else:
        columns["agree %"] = lambda p: f"{p.agreement:.1f}"
        columns["KL"] = lambda p: f"{p.kl:.4f}"
    if points[0].top1 is not None:
        columns["top-1 %"] = lambda p: f"{p.top1:.1f}"
    rows = [
        [names[i] + " *" * (point is chosen), *(cell(point) for cell in columns.values())]
        for i, point in enumerate(points)
    ]
    lines: list[Part] = [
        described(where | {"model": name}),
        f"{where['dtype']}, batch {where['batch']}, {where['mode']}; {where['images']['search']} images searched on, "
        f"figures of {where['images']['held_back']} others",
        "",
        Table([Column("r"), *(Column(column, RANKS.get(column, 0)) for column in columns)], rows),
        "",
        *(f"{short}: r = {written}" for short, written in long.items()),
        front.note,
    ]
    if chosen is not None:
        lines.append(f"* chosen: r = {format_schedule(chosen.r)}")
    return [*lines, "", LEGEND]


def _milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{1000 * seconds:.{max(0, 3 - len(str(int(1000 * seconds))))}f}"


def _names(points: Sequence[Point]) -> tuple[list[str], dict[str, str]]:
    """What the row of each point is called: r as it is typed, or a short name; and the r of each such name."""
    names: list[str] = []
    long: dict[str, str] = {}
    for point in points:
        name = written = format_schedule(point.r)
        if len(written) > SHORT:
            name = f"{point.kind} {sum(short.startswith(point.kind) for short in long) + 1}"
            long[name] = written
        names.append(name)
    return names, long


def _as_json(front: Front, chosen: Point | None, name: str) -> list[str]:  # noqa: ARG001
    """The front, as its file has it, and the chosen point, or null."""
    found = front.to_json()
    return json_lines(found | {"chosen": None if chosen is None else found["points"][front.points.index(chosen)]})


FORMS: dict[str, Callable[..., Sequence[Part]]] = {"text": _as_text, "json": _as_json}

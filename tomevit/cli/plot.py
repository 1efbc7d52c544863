"""Stored results as pictures: `tomevit plot`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tomevit.cli.console import echo
from tomevit.cli.options import FilePath, described, machine
from tomevit.opening import read_small_file
from tomevit.output import check_outputs, new_file
from tomevit.schedule import Schedule, format_schedule, schedule_from_json
from tomevit.tasks import plots
from tomevit.tasks.plots import Point
from tomevit.tasks.plots import picture_kind as picture_kind


@click.command("plot")
@click.argument("files", metavar="RESULT.json...", nargs=-1, required=True, type=FilePath(exists=True))
@click.option(
    "-o",
    "--out",
    required=True,
    type=FilePath(dir_okay=False),
    help="The picture: .png, .svg or .pdf.",
)
def plot_command(files: tuple[Path, ...], out: Path) -> None:
    """Draw what eval --json and bench --json wrote, without measuring again.

    Evaluations: accuracy against throughput, a line for each. Benchmarks: speed-up over r. Both: the accuracy of the
    evaluations against the throughput of the benchmarks of the same models.
    """
    check_outputs(out, inputs=files)
    kind = picture_kind(out)
    names = (
        [str(file) for file in files] if len({file.stem for file in files}) < len(files) else [f.stem for f in files]
    )
    results = {name: _read_result(file) for name, file in zip(names, files, strict=True)}
    try:
        with new_file(out) as draft:
            draw(draft, kind, results)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        results_are = f"{files[0]} is" if len(files) == 1 else f"one of {', '.join(map(str, files))} is"
        raise ValueError(f"{results_are} damaged, or of another version: {error!r}") from error
    echo(f"written to {out}", err=True)


def _read_result(file: Path) -> dict[str, Any]:
    """What a command wrote as JSON.

    Raises:
        ValueError: none did.
        OSError: the file cannot be read.
    """
    content = read_small_file(file)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not ("comparisons" in found or found.get("command") == "eval"):
        raise ValueError(f"{file} is no result of tomevit eval --json or tomevit bench --json")
    return found


def draw(path: Path, suffix: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw results as JSON has them (`tomevit.tasks.evaluate.as_json`, `tomevit.measure.bench.as_json`).

    Args:
        path: the picture to write.
        suffix: its kind, as in ".png", whatever the path's.
        results: by a name for each, which tells apart those of one model.

    Raises:
        ValueError: there is nothing in them to draw.
    """
    benches = {name: found for name, found in results.items() if "comparisons" in found}
    evaluations = {name: found for name, found in results.items() if name not in benches}
    if not evaluations:
        _draw_speed_up(path, suffix, benches)
        return
    if benches:
        lines = _accuracy_over_benches(evaluations, benches)
    else:
        lines = {label: _points(evaluations[name]) for name, label in _labels(evaluations).items()}
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        raise ValueError("there is no r of which both accuracy and throughput are known")
    models = list(dict.fromkeys(map(_model, evaluations.values())))
    notes = dict.fromkeys(f"{found['evaluated']} images, {machine(found)}" for found in evaluations.values())
    notes |= dict.fromkeys(f"throughput: {machine(found)}" for found in benches.values())
    plots.accuracy_throughput(
        path,
        lines,
        f"Accuracy over throughput{f', {models[0]}' if len(models) == 1 else ''}",
        "\n".join(["Bars are intervals of 95 %.", *notes]),
        suffix=suffix,
    )


def _labels(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What to call each in a legend: by its model, or by its name too where several are of one."""
    count = Counter(map(_model, results.values()))
    return {
        name: _model(found) if count[_model(found)] == 1 else f"{_model(found)}, {name}"
        for name, found in results.items()
    }


def _model(found: Mapping[str, Any]) -> str:
    """The model's name; of a file without the folders it is in."""
    return Path(found["model"]).name


def _points(evaluation: Mapping[str, Any], throughput: Mapping[str, float] | None = None) -> list[Point]:
    """The rows of an evaluation, with its own throughput or another's."""
    points = []
    for row in evaluation["rows"]:
        r = format_schedule(schedule_from_json(row["r"]))
        rate = row["images_per_second"] if throughput is None else throughput.get(r)
        if rate is not None:
            top1 = row["top1"]
            interval = (top1["lower"], top1["upper"])
            points.append(Point(f"r = {r}", rate, top1["value"], row["gflops"], interval))
    return points


def _accuracy_over_benches(
    evaluations: Mapping[str, Mapping[str, Any]], benches: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[Point]]:
    """A line for each comparison of a benchmark: at each r the fastest way to run the model."""
    lines = {}
    models = {found["model"] for found in benches.values()}
    for name, label in _labels(evaluations).items():
        model = evaluations[name]["model"]
        if model not in models:
            raise ValueError(f"{name} is of {model}, and there is a benchmark of {', '.join(sorted(models))} alone")
        for bench in benches.values():
            for comparison in bench["comparisons"] if bench["model"] == model else ():
                fastest: dict[str, float] = {}
                for row in comparison["rows"]:
                    if row["implementation"] == "tomevit":
                        r = format_schedule(schedule_from_json(row["r"]))
                        fastest[r] = max(fastest.get(r, 0.0), row["images_per_second"])
                setting = f"{comparison['dtype']}, batch {comparison['batch']}"
                lines[f"{label}, {setting}"] = _points(evaluations[name], fastest)
    return lines


def _draw_speed_up(path: Path, suffix: str, benches: Mapping[str, Mapping[str, Any]]) -> None:
    """The speed-up over r, a panel for each dtype."""
    panels: dict[str, dict[str, list[tuple[Schedule, float, float]]]] = {}
    labels = _labels(benches)
    for name, bench in benches.items():
        for comparison in bench["comparisons"]:
            rows = sorted(comparison["rows"], key=lambda row: row["seconds"]["median"])
            best = next((row for row in rows if not row["merges"]), None)
            if best is None:
                continue
            fastest: dict[str, dict[str, Any]] = {}
            for row in rows:
                if row["merges"] or row is best:
                    fastest.setdefault(str(row["r"]), row)
            line = sorted(fastest.values(), key=lambda row: -row["gflops"])
            points = [(schedule_from_json(row["r"]), row["speed_up"], row["flop_ratio_computed"]) for row in line]
            label = f"batch {comparison['batch']}, {best['images_per_second']:.3g} images/s at r = 0"
            label = label if len(benches) == 1 else f"{labels[name]}, {label}"
            panels.setdefault(comparison["dtype"], {})[label] = points
    if not panels:
        raise ValueError("there is no row in what was measured: it was interrupted, or did not fit into memory")
    models = ", ".join(dict.fromkeys(map(_model, benches.values())))
    settings = dict.fromkeys(described(found) for found in benches.values())
    plots.speed_up(path, suffix, panels, f"{models} merging, against the fastest that does not", "; ".join(settings))

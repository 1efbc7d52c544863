"""What training with merging brings, on the digits: accuracy off the shelf, trained with merging, and time per step.

    pip install -e '.[train,plot]'
    python -m examples.merging_study --jobs 2        # writes merging_study.json, and merging_study.png beside it

For every r and every seed the model of train_digits.py is trained anew, with that script's hyper-parameters and a third
of its epochs. The models of r = 0 are then measured at each r, off the shelf, and the others at the r that they were
trained with, all on the held-out fifth of the images, which decides nothing. Models of one seed begin with the same
weights and see the same images in the same order, whatever their r. Steps are timed on one thread, all r in turn,
without the preparation of the images.

Each training is stored as soon as it is through: after an interruption the same command goes on, and --seeds may grow.

    python -m examples.merging_study --only time             # time the steps (again), on a quiet machine
    python -m examples.merging_study --readme docs/finetuning.md    # write the table between the marks there as well
    python -m examples.merging_study --check docs/finetuning.md     # exit with 1 if the table there is another
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import tomevit
from examples.train_digits import MODEL, accuracy, fresh, make_optimiser, train, train_step
from tomevit.measure.timing import environment, interleave
from tomevit.output import check_output, new_file
from tomevit.schedule import token_counts
from tomevit.tasks import plots
from tomevit.tasks.demo import held_out, one_thread
from tomevit.training.digits import Digits, load_split

START, END = "<!-- merging study: start -->", "<!-- merging study: end -->"
FIXED = ("model", "r", "epochs", "batch", "lr", "limit")  # the options that all trainings of a study share

Study = dict[str, Any]


# --- Measuring --------------------------------------------------------------------------------------------------------


def train_all(study: Study, seeds: int, jobs: int, path: Path) -> None:
    """Train what is missing, and store each training when it ends.

    Raises:
        ValueError: a process was killed.
    """
    done = {(run["r"], run["seed"]) for run in study["runs"]}
    missing = [(r, seed) for seed in range(seeds) for r in study["r"] if (r, seed) not in done]
    if not missing:
        return
    options = argparse.Namespace(**{name: study[name] for name in FIXED}, elastic=0.0, bfloat16=False)
    bar = tqdm(total=len(done) + len(missing), initial=len(done), desc="trainings", disable=None)
    with bar, ProcessPoolExecutor(jobs, get_context("spawn"), prepare_process) as pool:
        try:
            for future in as_completed(pool.submit(train_one, options, r, seed) for r, seed in missing):
                study["runs"] = sorted([*study["runs"], future.result()], key=lambda run: (run["seed"], run["r"]))
                store(study, path)
                bar.update()
        except BrokenProcessPool as error:
            raise ValueError("a training was killed; the same command goes on with those that are missing") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # else, after an error, it would train them all


def prepare_process() -> None:
    """A process that trains: on one thread, and never longer than the one that started it."""
    threading.Thread(target=follow, args=[parent_process()], daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback of its own
    torch.set_num_threads(1)


def follow(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def train_one(options: argparse.Namespace, r: int, seed: int) -> dict[str, Any]:
    """Train at r, and measure at every r of the study."""
    digits, measured_on = load_split()
    digits = Digits(digits.images[: options.limit], digits.labels[: options.limit])
    model = fresh(r, seed)
    train(model, digits, argparse.Namespace(**vars(options) | {"seed": seed}), quiet=True)
    # Rounded to what float32 leaves of it: one image is 0.2778.
    return {"r": r, "seed": seed, "accuracy": {str(at): round(accuracy(model, measured_on, at), 4) for at in options.r}}


def time_steps(study: Study, rounds: int) -> dict[str, Any]:
    """The median time of a training step at each r, in seconds."""
    digits, _ = load_split()
    labels = digits.labels[: study["batch"]]
    images = tomevit.transform(fresh(0, 0))(digits.images[: study["batch"]])

    def step(r: int) -> Callable[[], object]:
        model = fresh(r, seed=0).train()
        return partial(train_step, model, make_optimiser(model, study["lr"]), images, labels)

    with one_thread(), tqdm(total=len(study["r"]) * (rounds + 2), desc="timing", unit="step", disable=None) as bar:
        seconds = interleave({r: step(r) for r in study["r"]}, rounds=rounds, progress=bar.update)
        return {"rounds": rounds, "environment": versions(), "seconds": {str(r): seconds[r] for r in study["r"]}}


def versions() -> dict[str, str]:
    """Where it is measured, and with what.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        data = version("scikit-learn")
    except PackageNotFoundError as error:
        raise ValueError("the digits come from scikit-learn: pip install -e '.[train]'") from error
    return environment() | {"tomevit": tomevit.__version__, "scikit-learn": data}


# --- The file ---------------------------------------------------------------------------------------------------------


def load(path: Path) -> Study:
    """A study that was begun.

    Raises:
        ValueError: the file is none.
    """
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no study: {error}") from error
    if not (isinstance(study, dict) and {*FIXED, "environment", "runs"} <= study.keys()):
        raise ValueError(f"{path} is no study of this program; name another file with --out")
    return study


def begin(options: argparse.Namespace) -> Study:
    """A new study, or the one in --out.

    Raises:
        ValueError: that one has other settings.
    """
    wanted = {"model": MODEL} | {name: getattr(options, name) for name in FIXED if name != "model"}
    with one_thread():
        where = versions()
    if not options.out.exists():
        return wanted | {"held_out": len(held_out()[1]), "environment": where, "runs": []}
    study = load(options.out)
    # Where only times are measured, they say themselves where.
    pairs = [(name, study[name], value) for name, value in wanted.items()]
    if options.only != "time":
        pairs += [(name, study["environment"].get(name), value) for name, value in where.items()]
    for name, was, now in pairs:
        if was != now:
            raise ValueError(
                f"the study in {options.out} has {name} {was}, not {now}; go on with the same, or name another file "
                f"with --out"
            )
    return study


def store(study: Study, path: Path) -> None:
    with new_file(path) as unfinished:
        unfinished.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")


# --- The report -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One r; accuracies are in per cent, a mean over the seeds and their standard deviation (n - 1)."""

    r: int
    tokens: int  # leaving the last block
    flop_ratio: float  # r = 0 over this r, forward
    off_the_shelf: tuple[float, float]
    trained: tuple[float, float]
    seconds: float | None  # per training step
    speed_up: float | None  # over r = 0


def rows(study: Study) -> list[Row]:
    """What was measured at each r, over the seeds that are complete."""
    found = {(run["r"], run["seed"]): run["accuracy"] for run in study["runs"]}
    seeds = complete_seeds(study)
    seconds = study.get("time", {}).get("seconds", {})
    config = tomevit.card(study["model"]).config

    def spread(trained_at: int, r: int) -> tuple[float, float]:
        values = [found[trained_at, seed][str(r)] for seed in seeds]
        return mean(values), stdev(values) if len(values) > 1 else math.nan

    return [
        Row(
            r=r,
            tokens=token_counts(r, config.depth, config.num_tokens, config.num_prefix)[-1],
            flop_ratio=tomevit.flops(config) / tomevit.flops(config, r),
            off_the_shelf=spread(0, r),
            trained=spread(r, r),
            seconds=seconds.get(str(r)),
            speed_up=seconds["0"] / seconds[str(r)] if seconds else None,
        )
        for r in study["r"]
    ]


def complete_seeds(study: Study) -> list[int]:
    """Those with a training at every r."""
    seeds: dict[int, int] = {}
    for run in study["runs"]:
        seeds[run["seed"]] = seeds.get(run["seed"], 0) + 1
    return [seed for seed, trainings in seeds.items() if trainings == len(study["r"])]


def cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.r),
        str(row.tokens),
        f"{row.flop_ratio:.2f}",
        *(
            f"{middle:.2f}" if math.isnan(deviation) else f"{middle:.2f} ± {deviation:.2f}"
            for middle, deviation in (row.off_the_shelf, row.trained)
        ),
        f"{1000 * row.seconds:.1f}" if row.seconds else "–",
        f"{row.speed_up:.2f}" if row.speed_up else "–",
    )


HEADS = (
    "r",
    "remaining tokens",
    "FLOP ratio",
    "off the shelf, %",
    "trained with merging, %",
    "ms per step",
    "speed-up",
)


def notes(study: Study) -> list[str]:
    """What the figures must be read with: how they were measured, and where."""

    def count(number: int, what: str) -> str:
        return f"{number} {what}{'s' if number > 1 else ''}"

    def place(where: dict[str, str]) -> str:
        return f"{where['device']}, 1 thread, float32, torch {where['torch']}, Python {where['python']}"

    images, seeds, timed = study["held_out"], len(complete_seeds(study)), study.get("time")
    limit = f" on {count(study['limit'], 'image')}" if study["limit"] else ""
    how = (
        f"{study['model']}, {count(study['epochs'], 'epoch')}{limit} at every r, batch {study['batch']}, learning rate "
        f"{study['lr']:g}. Accuracy on {images} held-out images, each of them {100 / images:.2f} points: "
        + (f"mean and standard deviation (n − 1) over {seeds} seeds." if seeds > 1 else "one seed.")
    )
    if not timed:
        return [how, f"{place(study['environment'])}."]
    step = f"Time of a training step: median of {timed['rounds']}, all r in turn."
    if timed["environment"] == study["environment"]:
        return [how, f"{step} {place(timed['environment'])}."]
    return [how, f"{step} Trained on {place(study['environment'])}; timed on {place(timed['environment'])}."]


def as_text(study: Study) -> str:
    """The table for a terminal."""
    lines = [HEADS, *(cells(row) for row in rows(study))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*table, "", textwrap.fill(" ".join(notes(study)), 100)])


def as_markdown(study: Study, picture: str) -> str:
    """All that stands between the marks of a page; `picture` is a path relative to it.

    Raises:
        ValueError: no seed is complete.
    """
    if not complete_seeds(study):
        raise ValueError("the study has no seed with a training at every r yet")
    head, *body = [f"| {' | '.join(line)} |" for line in (HEADS, *(cells(row) for row in rows(study)))]
    image = f"![Accuracy and time of a training step against r]({picture})"
    return "\n".join(
        [head, "|---" * len(HEADS) + "|", *body, "", textwrap.fill(" ".join(notes(study)), 120), "", image]
    )


def split(readme: Path) -> tuple[str, str]:
    """What stands before the start mark, and after the end mark.

    Raises:
        ValueError: there are no marks.
    """
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{readme} has no line {START if not start else END}")
    return before, after


def insert(study: Study, picture: Path, readme: Path) -> str:
    """The text of a page, with the section between its marks as it should be."""
    before, after = split(readme)
    section = as_markdown(study, Path(os.path.relpath(picture, readme.parent)).as_posix())
    return f"{before}{START}\n{section}\n{END}{after}"


def draw(study: Study, path: Path) -> None:
    """The same as a picture."""
    found = rows(study)
    unfinished = path.with_name(f".{path.name}")
    plots.accuracy_and_time(
        unfinished,
        study["r"],
        {
            "merging off the shelf": [row.off_the_shelf for row in found],
            "trained with merging": [row.trained for row in found],
        },
        [row.seconds for row in found if row.seconds],
        f"Training with merging, measured on {study['held_out']} held-out digits",
        "\n".join(textwrap.fill(note, 125) for note in notes(study)),
    )
    unfinished.replace(path)


# --- The command ------------------------------------------------------------------------------------------------------


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """A type for argparse: finite, within limits."""
    limits = f"at least {least}" + (f", and at most {most}" if most < math.inf else "")

    def convert(text: str) -> Any:
        value = kind(text)
        if not (least <= value <= most and value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not possible; it must be {limits}")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="merging_study",
        usage="python -m examples.merging_study [options]",
        description="Merging off the shelf, training with merging, and the time of a training step, on the digits.",
    )

    def add(name: str, *, help: str, **kinds: Any) -> None:  # noqa: A002
        default = " (default: %(default)s)" if kinds.get("default") is not None else ""
        parser.add_argument(name, help=help + default, **kinds)

    positive, half = number(int, 1), tomevit.card(MODEL).config.num_patches // 2
    add("--r", type=number(int, 0, half), nargs="+", default=[0, 8, 16, 24], help="each r once; 0 is among them anyway")
    add("--seeds", type=positive, default=5, help="trainings at each r, with seeds from 0 on")
    add("--epochs", type=positive, default=40, help="of each training")
    add("--batch", type=positive, default=64, help="images per step")
    add("--lr", type=number(float, 0), default=3e-3, help="the highest learning rate")
    add("--limit", type=positive, help="train on so many images only")
    add("--jobs", type=positive, default=1, help="trainings at a time, each on one thread; no result depends on it")
    add("--rounds", type=positive, default=200, help="timed steps at each r")
    add("--out", type=Path, default=Path("merging_study.json"), help="the file to write, or to go on with")
    add("--only", choices=["train", "time"], help="one of the two; time is measured anew")
    add("--readme", type=Path, help="a file to write the table into, between its marks")
    add("--check", type=Path, help="a file whose table to compare with that of --out, and nothing else")
    options = parser.parse_args(arguments)
    options.r = sorted({0, *options.r})
    return options


def run(options: argparse.Namespace) -> str | None:
    """What went wrong with --check, if anything did.

    Raises:
        ValueError, OSError: an option does not fit, or a file cannot be read or written.
    """
    out, picture = options.out, options.out.with_suffix(".png")
    if out.suffix != ".json":
        raise ValueError(f"--out is {out}, and must end in .json; the picture goes beside it")
    if options.check:
        current = insert(load(out), picture, options.check)
        stale = options.check.read_text(encoding="utf-8") != current
        return f"{options.check} does not have the table of {out}; write it with --readme" if stale else None
    plots.require_matplotlib()
    check_output(out)
    if options.readme:
        split(options.readme)  # no marks: known before hours of training
    study = begin(options)
    if options.only != "time":
        train_all(study, options.seeds, options.jobs, out)
    if options.only == "time" or (options.only is None and "time" not in study):
        study["time"] = time_steps(study, options.rounds)
        store(study, out)
    if not complete_seeds(study):
        print(f"written: {out}; the table waits for the accuracies, which --only train measures")
        return None
    print(as_text(study))
    if "time" not in study:
        print(f"\nwritten: {out}; the picture waits for the times, which --only time measures")
        return None
    draw(study, picture)
    print(f"\nwritten: {out}, {picture}")
    if options.readme:
        text = insert(study, picture, options.readme)
        with new_file(options.readme) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    try:
        stale = run(options)
    except (ValueError, OSError) as error:
        print(f"merging_study: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("merging_study: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    if stale:
        sys.exit(stale)


if __name__ == "__main__":
    main()

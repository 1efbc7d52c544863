"""A model trained, or fine-tuned, on images: `tomevit train`."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from tomevit import private
from tomevit.cli import options
from tomevit.cli.console import echo
from tomevit.cli.options import Command, R
from tomevit.cli.running import device_of, readers
from tomevit.cli.tables import show
from tomevit.progress import Bar, progress_bar
from tomevit.schedule import format_schedule
from tomevit.tasks.train.checkpoints import read_checkpoint
from tomevit.tasks.train.loop import AMP, Progress, Trained, train
from tomevit.tasks.train.options import CHECKPOINT, FRESH, FRESH_LR, FRESH_WARMUP, Options, Record, complete
from tomevit.tasks.train.report import cost, cost_in_words, finish, summary
from tomevit.tasks.train.setup import Run, set_up
from tomevit.training.digits import DIGITS

F = TypeVar("F", bound=Callable[..., Any])


class Finite(click.FloatRange):
    """A float within limits, which inf and nan are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


COUNT, POSITIVE, RATE, SHARE = click.IntRange(0), click.IntRange(1), Finite(0), Finite(0, 1)
DECAY, FACTOR = Finite(0, 1, max_open=True), Finite(0, 1, min_open=True)


def _shown(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


FROM_FRESH = {name: _shown(value) for name, value in FRESH.items()} | {
    "lr": f"{_shown(FRESH_LR)} over the model's width",
    "warmup_epochs": f"{_shown(FRESH_WARMUP)} of --epochs",
}


def option(name: str, kind: Any = None, text: str = "", **kinds: Any) -> Callable[[F], F]:
    """An option of `Options`, which is None where it is not given; its help says what it is then."""
    field = name.removeprefix("--").replace("-", "_")
    usual = getattr(Options, field, None)
    if usual is not None and usual is not False:
        fresh = f"; from fresh weights {FROM_FRESH[field]}" if field in FROM_FRESH else ""
        text = f"{text} Default: {_shown(usual)}{fresh}.".strip()
    return click.option(name, type=kind, default=None, help=text, **kinds)


@click.command("train", cls=Command)
@click.argument("data", required=False)
@click.option("--model", metavar="NAME", help="A name of the zoo, as in `tomevit list`.")
@option(
    "--recipe",
    text="The weights whose recipe fills in options, as in mae_b16.tome_r16: how they were trained.",
    metavar="NAME",
)
@click.option(
    "--pretrained",
    is_flag=False,
    flag_value="true",
    metavar="[FILE|URL|NAME|none]",
    help="Begin with the model's weights, or with others, hf-hub:owner/repo too. Default: none, which are fresh ones.",
)
@option("--keep-head", text="The pretrained one, and not a fresh one for the data's classes.", is_flag=True)
@option("--r", R(), f"Tokens that merge; default: as the weights ask. An r: {options.FORMS_OF_R}.")
@option("--r-warmup", RATE, "Epochs in which r rises from 0.")
@option("--prop-attn/--no-prop-attn", text="Proportional attention, if otherwise than the weights ask.")
@option("--freeze", COUNT, "So many blocks keep their weights, and the embedding.")
@options.img_size
@option("--crop-pct", FACTOR, "Share of the image measured on, if another than the model's.")
@option("--limit", POSITIVE, "Train on so many images only.")
@option("--measure", POSITIVE, "Measure on so many images only.")
@option("--validate", text="Of the digits, measure on a part of those to train on.", is_flag=True)
@option("--epochs", POSITIVE)
@option("--batch", options.BATCH, "Images per step.")
@option("--accumulate", POSITIVE, "Parts in which a step's images pass, to save memory.")
@option("--lr", RATE, "The highest learning rate, of the head.")
@option("--lr-batch", COUNT, "Batch which --lr is for, and grows with; 0: it is for any.")
@option("--betas", DECAY, nargs=2)
@option("--weight-decay", RATE)
@option("--layer-decay", FACTOR, "Of the learning rate, from one block to that below it.")
@option("--warmup-epochs", RATE, "In which the learning rate rises.")
@option("--warmup-lr", RATE, "To begin with.")
@option("--min-lr", RATE, "To end with.")
@option("--clip", RATE, "The largest norm of all gradients; 0: any.")
@option("--drop-path", SHARE, "Stochastic depth of the last block.")
@option("--label-smoothing", SHARE)
@option("--mixup", RATE, "Alpha of its Beta distribution; 0: none.")
@option("--cutmix", RATE, "Alpha of its Beta distribution; 0: none.")
@option("--erasing", SHARE, "Probability of random erasing.")
@option("--randaugment", COUNT, "Operations, and their magnitude of 30.", nargs=2, metavar="N M")
@option("--repeats", POSITIVE, "Of an image in an epoch, which then has a part of the images.")
@option("--ema", DECAY, "Decay of a running average of the weights; 0: none.")
@click.option("--device", help="As in cpu, cuda, cuda:1 or mps. Default: an accelerator, if there is one.")
@options.threads
@options.workers
@option("--amp", click.Choice(["none", *AMP]), "Automatic mixed precision.")
@option("--compile", text="Block by block.", is_flag=True)
@option("--channels-last", text="Layout of images and kernels in memory.", is_flag=True)
@option("--grad-checkpointing", text="Less memory, more time.", is_flag=True)
@option("--seed", click.IntRange(0, 2**32 - 1))
@click.option(
    "-o",
    "--out",
    metavar="DIRECTORY",
    type=options.FilePath(path_type=str),
    help=f"Folder for all that is written. Default: {Options.out}.",
)
@option("--save-every", COUNT, "Steps between checkpoints, beside that after each epoch.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, with its options.")
@option("--steps", POSITIVE, "Stop after so many, in all; --resume goes on.")
@option("--dry-run", text="Two steps on generated images: does it fit, how long does it take?", is_flag=True)
def train_command(*, resume: bool, **given: Any) -> None:
    """Train a model on DATA, with merging: from fresh weights, or with --pretrained fine-tune it.

    DATA is a folder with train/ and val/ in it, and in each of them a folder for every class; or digits or mnist, small
    sets for digits_p1 and digits_p2. Into --out go model.safetensors, report.json, and a checkpoint from which --resume
    goes on to the same weights, to the bit, even after Ctrl-C or a power cut.

    Defaults depend on the start. From fresh weights they make a small model learn a small set: digits_p1 the digits, in
    minutes on a CPU. From pretrained ones they are gentler, and change little. A --recipe has its own.

    \b
    tomevit train digits --model digits_p1 --r 16
    tomevit train FOLDER --model vit_b16 --pretrained --r 13 --amp bf16 -o run
    tomevit train --resume -o run
    """  # noqa: D301  # click's mark for lines that stay as they are
    asked = {name: value for name, value in given.items() if value is not None}
    checkpoint = read_checkpoint(Path(asked.get("out", Options.out))) if resume else None
    chosen = complete(asked, checkpoint)
    place = device_of(chosen.device)
    if "workers" not in asked and checkpoint is None and not (chosen.dry_run or chosen.data in DIGITS):
        chosen = replace(chosen, workers=readers(place))
    run = set_up(chosen, checkpoint)
    if not chosen.dry_run:
        show([_describe(run)])
    with _finish_step_first() as stop, _bars() as tell:
        try:
            with private.allow_many_programs() if run.options.compile else nullcontext():
                trained = train(run, checkpoint, tell=tell, stop=stop)
            if chosen.dry_run:
                name, tokens = run.model.card.name, ", ".join(map(str, run.model.token_counts()))
                show([f"{name}, r = {format_schedule(run.model.r)}: {tokens} tokens"])
                show([cost_in_words(cost(run.options, trained))])
            elif len(trained.epochs) < chosen.epochs:
                show([f"stopped after {trained.steps} steps; {_go_on(chosen)}"])
            else:
                _show(run, trained, stop)
        except KeyboardInterrupt:
            if (Path(chosen.out) / CHECKPOINT).exists() and not chosen.dry_run:
                echo(f"tomevit: interrupted; {_go_on(chosen)}", err=True)
                raise click.exceptions.Exit(130) from None
            raise


def _show(run: Run, trained: Trained, stop: Callable[[], bool]) -> None:
    report = finish(run, trained, stop)
    if not trained.seconds:
        show(["the run had ended: nothing was left to train"])
    show(summary(report))
    if report["not_learned"]:
        echo(f"tomevit: {report['not_learned']}", err=True)


def _describe(run: Run) -> str:
    chosen, data = run.options, run.data
    start = {"none": "fresh weights", "true": "pretrained weights"}.get(chosen.pretrained, chosen.pretrained)
    counts = f"{len(data.train)} images to train on, {len(data.test)} to measure on, {len(data.classes)} classes"
    epochs = f"{chosen.epochs} epoch{'s' * (chosen.epochs != 1)} of {run.steps} steps"
    return f"{run.model.card.name} from {start}, r = {format_schedule(run.model.r)}, {epochs}; {counts}"


def _measured(epoch: Record) -> str:
    """What an epoch came to: accuracies in per cent, and the mean loss."""
    accuracies = (f"{name.replace('_', ' ')} {value:.2f} %" for name, value in epoch.items() if "accuracy" in name)
    return f"epoch {epoch['epoch']}: loss {epoch['loss']:.3f}, {', '.join(accuracies)}"


def _go_on(chosen: Options) -> str:
    return f"tomevit train --resume -o {shlex.quote(chosen.out)} goes on from there"


@contextmanager
def _finish_step_first() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which ends nothing at once, unless it is pressed again."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread sets handlers
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """A bar for each epoch, and below it a line of what was measured."""
    bar: Bar | None = None

    def tell(now: Progress) -> None:
        nonlocal bar
        if now.measured is not None:
            show([_measured(now.measured)])
            return
        if bar is None:
            bar = progress_bar(total=now.steps, initial=now.step - 1, desc=f"epoch {now.epoch}")
        bar.set_postfix(loss=f"{now.loss:.3f}", refresh=False)
        bar.update()
        if now.step == now.steps:
            bar.close()
            bar = None

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()

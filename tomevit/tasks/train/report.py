"""What a run leaves behind: the model, and a report of what it reached, what it cost, and how to repeat it."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tomevit.measure.timing import environment
from tomevit.models import VisionTransformer
from tomevit.opening import read_small_file
from tomevit.output import new_file
from tomevit.schedule import format_schedule
from tomevit.tasks.evaluate.statistics import wilson
from tomevit.tasks.train.loop import Accuracy, Trained, accuracy
from tomevit.tasks.train.options import Options, Record, command, overridden
from tomevit.tasks.train.setup import Run
from tomevit.version import __version__
from tomevit.weights import checkpoint

#: Of a report: what its steps took.
COSTS = ("steps_timed", "seconds_per_step", "images_per_second", "peak_memory_mib")


def finish(run: Run, trained: Trained, stop: Callable[[], bool] = lambda: False) -> Record:
    """Measure, and write model.safetensors, ema.safetensors and report.json.

    Args:
        stop: as of `train`.

    Returns:
        What the report has.

    Raises:
        ValueError: a weight is not finite.
        KeyboardInterrupt: `stop` said so; nothing was written.
    """
    model, data, options = run
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError("the last step made weights that are not finite; a lower --lr may help")
    out, models = Path(options.out), {"model": model}
    if trained.ema is not None:
        assert isinstance(trained.ema.module, VisionTransformer)
        models["ema"] = trained.ema.module
    values = [model.r] if model.r == 0 else [model.r, 0]
    found = {
        name: {f"r = {format_schedule(r)}": accuracy(each, data.test, r, options, stop) for r in values}
        for name, each in models.items()
    }
    best = max(trained.epochs, key=lambda epoch: epoch["accuracy"])
    report = {
        "accuracy": {name: {r: each.percent for r, each in at.items()} for name, at in found.items()},
        "not_learned": not_learned(next(iter(found["model"].values())), trained, run),
        "best_epoch": best["epoch"],
        "images": {"trained_on": len(data.train), "measured_on": len(data.test)},
        **(cost(options, trained) if trained.seconds else _cost_before(out)),
        "recipe": {"name": options.recipe, "overridden": overridden(options)} if options.recipe else None,
        "command": command(options),
        "options": asdict(options),
        "environment": environment(options.device) | {"tomevit": __version__},
        "epochs": trained.epochs,
    }
    card = replace(model.card, weights=None, sources=(), origin=None, figures=())
    card = replace(card, class_names=data.classes, notes=f"Trained with: {report['command']}")
    for name, each in models.items():
        checkpoint.save(each.cpu(), out / f"{name}.safetensors", card=card)
    with new_file(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def not_learned(measured: Accuracy, trained: Trained, run: Run) -> str | None:
    """What to say, and to try, if the model may be guessing for all that the images tell; None: it is not."""
    share, guess = wilson(measured.right, measured.images), 100 * measured.guessed / measured.images
    if share.lower > guess:
        return None
    loss, guessing = trained.epochs[-1]["loss"], math.log(len(run.data.classes))
    if loss < 0.9 * guessing:
        why = f"its training loss fell to {loss:.3g}, so it knows the images it was trained on, and no others"
        advice = "more images"
    else:
        why = f"its training loss is {loss:.3g}, and that of guessing {guessing:.3g}"
        advice = f"more --epochs, or another --lr than {run.options.lr:g}"
    if run.options.pretrained == "none":
        advice += ", or to begin with --pretrained weights"
    return (
        f"the model does no better than guessing, as far as {measured.images} images can tell: {share.value:.2f} % are "
        f"right ({share.lower:.1f} to {share.upper:.1f} with 95 % confidence), and the commonest class alone would "
        f"make {guess:.2f} %; {why}. Try {advice}"
    )


def cost(options: Options, trained: Trained) -> Record:
    """What a step of this process took, loading included; it took one at least."""
    peak = None
    if options.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(options.device) / 2**20
    elif sys.platform != "win32":
        import resource

        # Of the whole process; in KiB, on macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = statistics.median(trained.seconds)
    return dict(zip(COSTS, (len(trained.seconds), seconds, options.batch / seconds, peak), strict=True))


def _cost_before(out: Path) -> Record:
    """What the steps took, of a run that is resumed when nothing is left to do."""
    try:
        report = json.loads(read_small_file(out / "report.json"))
        return {name: report[name] for name in COSTS}
    except (OSError, ValueError, LookupError, TypeError):  # it was interrupted before there was one, or is damaged
        return dict.fromkeys(COSTS)


def cost_in_words(report: Record) -> str:
    """What a step took, and the memory."""
    if report["seconds_per_step"] is None:
        return "what its steps took is not known"
    peak = report["peak_memory_mib"]
    return (
        f"{report['seconds_per_step']:.3g} s per step, {report['images_per_second']:.4g} images/s"
        f"{'' if peak is None else f', {peak:.0f} MiB of memory at most'}"
    )


def summary(report: Record) -> list[str]:
    """What is worth reading of a report."""
    epochs, best = report["epochs"], report["best_epoch"]
    found = [
        f"{name}.safetensors: {', '.join(f'{value:.2f} % right at {r}' for r, value in at.items())}"
        for name, at in report["accuracy"].items()
    ]
    if best != len(epochs):
        found.append(
            f"The weights are those after the last epoch. The best was {best} of {len(epochs)}, with "
            f"{epochs[best - 1]['accuracy']:.2f} %"
        )
    if report["recipe"]:
        found.append(f"recipe {report['recipe']['name']}, except for {report['recipe']['overridden'] or 'nothing'}")
    return [
        *found,
        cost_in_words(report),
        f"written to {report['options']['out']}: report.json, "
        f"{', '.join(f'{name}.safetensors' for name in report['accuracy'])}",
    ]

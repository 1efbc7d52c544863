"""The options of `tomevit train`: what was given, what a recipe or an earlier run fills in, and what is usual."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tomevit import zoo
from tomevit.schedule import Schedule, format_schedule
from tomevit.training.digits import DIGITS
from tomevit.training.recipes import recipe

Record = dict[str, Any]

CHECKPOINT = "checkpoint.pt"
FREE = ("out", "steps", "save_every", "workers")  # may change when a run goes on: no weight depends on them


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run depends on, by the names of the command line, whose help explains them.

    The defaults are those for pretrained weights; see `usual_options`.
    """

    data: str = ""  # "": generated, for a dry run
    limit: int | None = None
    measure: int | None = None
    validate: bool = False
    recipe: str | None = None
    model: str = ""
    pretrained: str = "none"
    keep_head: bool = False
    img_size: tuple[int, int] | None = None
    crop_pct: float | None = None
    r: Schedule | None = None
    r_warmup: float = 0.0
    prop_attn: bool | None = None
    freeze: int = 0

    epochs: int = 10
    batch: int = 64
    accumulate: int = 1
    lr: float = 5e-4
    lr_batch: int = 256
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup_epochs: float = 0.5
    warmup_lr: float = 0.0
    min_lr: float = 1e-6
    clip: float = 0.0

    drop_path: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    randaugment: tuple[int, int] | None = None
    repeats: int = 1
    ema: float = 0.0

    device: str = field(default_factory=_accelerator)
    threads: int = field(default_factory=torch.get_num_threads)
    workers: int = 0
    amp: str = "none"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    seed: int = 0
    out: str = "trained"
    save_every: int = 0
    steps: int | None = None
    dry_run: bool = False


#: What suits fresh weights, and small sets of images, instead; further the two below.
FRESH: Record = {"epochs": 60, "lr_batch": 0, "weight_decay": 0.1, "betas": (0.9, 0.99), "clip": 1.0}
FRESH_WARMUP = 0.05  # share of the epochs
#: The learning rate at a batch of 64, times the width: 0.003 at 64, 0.00025 at 768. The wider a model, the smaller is
#: the step that its weights bear (arXiv:2203.03466).
FRESH_LR = 0.192


def usual_options(given: Record) -> Record:
    """What all options are unless they are given: of the recipe, if there is one, else what suits the start.

    Raises:
        ValueError: there is no such recipe or model.
    """
    usual = asdict(Options())
    filled = recipe_options(given["recipe"]) if given.get("recipe") else {}
    chosen = usual | filled | given
    if chosen["pretrained"] == "none" and chosen["model"]:
        usual |= FRESH | {"lr": FRESH_LR / zoo.card(chosen["model"]).config.embed_dim}
        usual["warmup_epochs"] = FRESH_WARMUP * (usual | filled | given)["epochs"]
    return usual | filled


def recipe_options(name: str) -> Record:
    """What a recipe says of the options that there are."""
    chosen = recipe(name)
    values = {f.name: getattr(chosen, f.name) for f in fields(Options) if hasattr(chosen, f.name)}
    return values | {"recipe": name, "model": chosen.model, "pretrained": chosen.start or "none"}


def overridden(options: Options) -> Record:
    """Where the options differ from the recipe: option to [recipe's value, ours]."""
    if not options.recipe:
        return {}
    wanted, ours = recipe_options(options.recipe), vars(options)
    return {name: [value, ours[name]] for name, value in wanted.items() if value != ours[name]}


def complete(given: Record, checkpoint: Record | None = None) -> Options:
    """All options of a run. What is given wins over the recipe, and that over what is usual.

    Args:
        given: those that were.
        checkpoint: to go on from, with the options of its run.

    Raises:
        ValueError: there is no such recipe or model, options do not fit each other, or the run began with others.
    """
    if checkpoint is None:
        if given.get("dry_run"):
            given = given | {"steps": 2, "pretrained": "none", "keep_head": False}
        options = Options(**usual_options(given) | given)
        _check_recipe(options)
        if not options.model:
            raise ValueError("name a model with --model, as in --model vit_b16, or a recipe with --recipe")
        if not (options.data or options.dry_run):
            raise ValueError("name the data: a folder with train/ and val/ in it, or digits, or mnist")
        if not options.dry_run and (Path(options.out) / CHECKPOINT).exists():
            raise ValueError(
                f"{options.out} has a run in it already: go on with --resume, or name another folder with --out"
            )
    else:
        began = checkpoint["options"] | {"steps": None}
        for name, value in given.items():
            if name not in FREE and value != began[name]:
                had, has = flag(name, began[name]), flag(name, value)
                raise ValueError(
                    f"the run in {given.get('out', Options.out)} began with {had}, and cannot go on with {has}"
                )
        options = Options(**began | {"out": Options.out} | given)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; name a folder")
    if options.validate and options.data not in DIGITS:
        raise ValueError("--validate is for the digits; a folder's val/ is what is measured on")
    if options.batch % options.accumulate:
        raise ValueError(f"--batch {options.batch} does not divide into {options.accumulate} parts (--accumulate)")
    if options.warmup_epochs >= options.epochs:
        raise ValueError(f"--warmup-epochs {options.warmup_epochs:g} leaves nothing of --epochs {options.epochs}")
    return options


def _check_recipe(options: Options) -> None:
    if options.recipe:
        model = recipe(options.recipe).model
        if zoo.architecture(options.model).name != model:
            raise ValueError(f"the recipe {options.recipe} is for {model}, and --model is {options.model}")


def command(options: Options) -> str:
    """A command line that asks for the same weights."""
    usual = usual_options({name: getattr(options, name) for name in ("recipe", "model", "pretrained", "epochs")})
    usual |= {"threads": None, "device": None}  # of this machine
    if not options.recipe:
        usual["model"] = None
    usual["recipe"] = None
    flags = [
        flag(name, value)
        for name, value in vars(options).items()
        if name not in (*FREE, "data") and value != usual[name]
    ]
    return " ".join(["tomevit train", *([shlex.quote(options.data)] if options.data else []), *flags])


def flag(name: str, value: Any) -> str:
    """An option as it would be given, or "no --option"."""
    option = f"--{name.replace('_', '-')}"
    if name == "data":
        return str(value)
    if value is None or value is False:
        return f"--no-{option[2:]}" if name == "prop_attn" and value is False else f"no {option}"
    if value is True:
        return option
    if name == "r":
        return f"{option} {shlex.quote(format_schedule(value))}"
    if name == "img_size":
        return f"{option} {'x'.join(map(str, value))}"
    return " ".join([option, *(shlex.quote(str(part)) for part in (value if isinstance(value, tuple) else [value]))])

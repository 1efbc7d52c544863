"""The options of finetune.py, and the model and data that they ask for."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import torch

import tomevit
from examples.data import DIGITS, Data, augmentation, check_source, init_small, load_data, noise_data
from tomevit import zoo
from tomevit.cli.options import R
from tomevit.models import VisionTransformer
from tomevit.schedule import resolve_schedule
from tomevit.training.recipes import recipe

FREE = ("out", "resume", "steps", "save_every", "workers")  # may change when a run goes on: no weight depends on them
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
Record = dict[str, Any]


def set_up(options: argparse.Namespace, checkpoint: Record | None) -> tuple[VisionTransformer, Data]:
    """Model and data.

    Raises:
        ValueError, OSError: they cannot be had, or do not fit each other or the options.
    """
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # as the backend has it
        raise ValueError(f"there is no device {options.device!r} here") from error
    if not options.dry_run:
        check_source(options.data)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pretrained = {"none": False, "true": True}.get(options.pretrained, options.pretrained)
    run = {"r": options.r, "prop_attn": options.prop_attn, "drop_path": options.drop_path}
    model = tomevit.create(options.model, pretrained=pretrained, img_size=options.img_size, **run)
    model.freeze(options.freeze)
    options.r = model.r
    check_r(model, options)

    preprocess = model.card.preprocess
    preprocess = replace(preprocess, crop_pct=options.crop_pct or preprocess.crop_pct)
    model.card = replace(model.card, preprocess=preprocess)
    prepare, digits = tomevit.transform(model), options.data in DIGITS and not options.dry_run
    if digits:
        _check_digits(model, options)
    augment = augmentation(
        "digits" if digits else "folder", prepare, randaugment=options.randaugment, erasing=options.erasing
    )
    seed, repeats = options.seed, options.repeats
    if options.dry_run:
        data = noise_data(prepare, augment, length=options.steps * options.batch, seed=seed, repeats=repeats)
    else:
        subset = {"validate": options.validate, "limit": options.limit, "measure": options.measure}
        data = load_data(options.data, prepare, augment, seed=seed, repeats=repeats, **subset)
    if options.batch > len(data.train):
        raise ValueError(
            f"--batch {options.batch} is larger than the data: there are {len(data.train)} images to train on"
        )
    taken = 0
    if checkpoint:
        taken = checkpoint["done"]["epoch"] * (len(data.train) // options.batch) + checkpoint["done"]["step"]
    if options.steps and options.steps <= taken:
        raise ValueError(f"--steps {options.steps} counts from the beginning, and {taken} are done")
    if checkpoint and checkpoint["data"] != describe(data):
        raise ValueError(f"{options.data} has changed since the run in {options.out} began: other images or classes")
    fit_head(model, data.classes, options)
    if options.pretrained == "none" and digits:
        init_small(model)
    return model, data


def _check_digits(model: VisionTransformer, options: argparse.Namespace) -> None:
    (height, width), taker = DIGITS[options.data]
    config = model.config
    if (config.in_chans, config.img_size) == (1, (height, width)):
        return
    instead = "leave out --img-size" if options.img_size and config.in_chans == 1 else f"--model {taker} takes them"
    raise ValueError(
        f"the {options.data} have 1 channel and {height}x{width} pixels, and {model.card.name} takes {config.in_chans} "
        f"and {config.img_size[0]}x{config.img_size[1]}; {instead}"
    )


def check_r(model: VisionTransformer, options: argparse.Namespace) -> None:
    config, r = model.config, model.r
    if options.r_warmup and not isinstance(r, int):
        raise ValueError(f"--r-warmup raises an int from 0 on, and --r is {r}")
    fits = isinstance(r, float) or (isinstance(r, list) and "grid" in r)  # it was made for this number of patches
    asked = 0 if fits else max(resolve_schedule(r, config.depth, 10**9, 0))
    if asked > config.num_patches // 2:
        raise ValueError(
            f"--r {r} asks for {asked} tokens to merge in one block, and {model.card.name} has {config.num_patches} "
            f"patches, of which half can: give {config.num_patches // 2} at most"
        )


def fit_head(model: VisionTransformer, classes: tuple[str, ...], options: argparse.Namespace) -> None:
    have, names = model.config.num_classes, model.card.class_names
    if not options.keep_head:
        model.reset_classifier(len(classes))
    elif options.pretrained == "none":
        raise ValueError("--keep-head keeps a pretrained head, and --pretrained is none")
    elif have != len(classes):
        raise ValueError(
            f"the head has {have} classes, and the data {len(classes)}; without --keep-head it is replaced"
        )
    elif names and names != classes:
        ours, theirs = next(pair for pair in zip(names, classes, strict=True) if pair[0] != pair[1])
        raise ValueError(f"the head has a class {ours}, and the data {theirs}; without --keep-head it is replaced")


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


def schedule(text: str) -> Any:
    try:
        return R().convert(text, None, None)
    except click.BadParameter as error:
        raise argparse.ArgumentTypeError(error.message) from error


def make_parser() -> argparse.ArgumentParser:
    count, positive, share = number(int, 0, 2**62), number(int, 1), number(float, 0, 1)
    rate, decay = number(float, 0), number(float, 0, 0.999999)
    parser = argparse.ArgumentParser(
        prog="finetune",
        usage="python -m examples.finetune [options]",
        description="Fine-tune a vision transformer, with merging.",
    )

    def add(name: str, *, help: str = "", **kinds: Any) -> None:  # noqa: A002
        default = " (default: %(default)s)" if kinds.get("default") is not None else ""
        parser.add_argument(name, help=help + default, **kinds)

    add(
        "--data",
        default="digits",
        help="digits, mnist, or a folder with train/ and val/ in it, a folder per class in each",
    )
    add("--limit", type=positive, help="train on so many images only")
    add("--measure", type=positive, help="measure on so many images only")
    add("--validate", action="store_true", help="of the digits, measure on a part of those to train on")
    add("--recipe", help="the weights whose recipe fills in options, as in mae_b16.tome_r16")
    add("--model", default="digits_p1", help="a name as in `tomevit list`")
    add(
        "--pretrained",
        default="none",
        help="none, true, a file, a URL, hf-hub:owner/repo, or the name of other weights",
    )
    add("--keep-head", action="store_true", help="and not a fresh one for the data's classes")
    add("--img-size", type=positive, help="pixels, if others than the model's")
    add("--crop-pct", type=number(float, 0.01, 1), help="share of the image measured on, if another than the model's")
    add("--r", type=schedule, help="tokens to merge: 8, or 8,-1, or [20,0,7], or 0.08, or words such as 2x")
    add("--r-warmup", type=rate, default=0.0, help="epochs in which r rises from 0")
    add("--prop-attn", action=argparse.BooleanOptionalAction, help="if otherwise than the weights ask")
    add("--freeze", type=count, default=0, help="so many blocks keep their weights, and the embedding")

    add("--epochs", type=positive, default=10)
    add("--batch", type=positive, default=64, help="images per step")
    add("--accumulate", type=positive, default=1, help="parts in which a step's images pass, to save memory")
    add("--lr", type=rate, default=5e-4, help="the highest, of the head")
    add("--lr-batch", type=count, default=256, help="batch which --lr is for, and grows with; 0: it is for any")
    add("--betas", type=decay, nargs=2, default=[0.9, 0.999])
    add("--weight-decay", type=rate, default=0.05)
    add(
        "--layer-decay",
        type=number(float, 1e-6, 1),
        default=1.0,
        help="of the learning rate, from one block to that below it",
    )
    add("--warmup-epochs", type=rate, default=0.5)
    add("--warmup-lr", type=rate, default=0.0, help="to begin with")
    add("--min-lr", type=rate, default=1e-6, help="to end with")
    add("--clip", type=rate, default=0.0, help="the largest norm of all gradients; 0: any")

    add("--drop-path", type=share, default=0.0, help="stochastic depth of the last block")
    add("--label-smoothing", type=share, default=0.1)
    add("--mixup", type=rate, default=0.0, help="alpha of its Beta distribution; 0: none")
    add("--cutmix", type=rate, default=0.0, help="alpha of its Beta distribution; 0: none")
    add("--erasing", type=share, default=0.0, help="probability of random erasing")
    add("--randaugment", type=count, nargs=2, metavar=("N", "M"), help="operations, and their magnitude of 30")
    add("--repeats", type=positive, default=1, help="of an image in an epoch, which then has a part of the images")
    add("--ema", type=decay, default=0.0, help="decay of a running average of the weights; 0: none")

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    add("--device", default=accelerator.type if accelerator else "cpu")
    add("--threads", type=positive, default=torch.get_num_threads())
    add("--workers", type=count, default=0, help="processes that load images")
    add("--amp", choices=["none", *AMP], default="none", help="automatic mixed precision")
    add("--compile", action="store_true")
    add("--channels-last", action="store_true")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")
    add("--seed", type=count, default=0)
    add("--out", default="finetuned", help="folder for all that is written")
    add("--save-every", type=count, default=0, help="steps between checkpoints, beside that after each epoch")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--steps", type=positive, help="stop after so many, in all; --resume goes on")
    add("--dry-run", action="store_true", help="two steps on generated images: does it fit, how long does it take?")
    return parser


def read_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Record | None]:
    """The options, and the checkpoint to go on from. What is given wins over the recipe, and that over the defaults.

    Raises:
        ValueError: there is no such recipe or checkpoint, or it is of another model or configuration.
    """
    parser, unset = make_parser(), object()
    defaults = vars(parser.parse_args([]))
    parsed = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in parsed.items() if value is not unset}
    out, checkpoint = Path(given.get("out", defaults["out"])), None
    filled: Record = {}
    if "resume" in given:
        checkpoint = read_checkpoint(out)
        filled = {
            name: value for name, value in checkpoint["options"].items() if name not in ("out", "resume", "steps")
        }
        for name, value in given.items():
            if name in filled and name not in FREE and value != filled[name]:
                had, has = flag(name, filled[name]), flag(name, value)
                raise ValueError(f"the run in {out} began with {had}, and cannot go on with {has}")
    elif "dry_run" not in given and (out / "checkpoint.pt").exists():
        raise ValueError(f"{out} has a run in it already: go on with --resume, or name another folder with --out")
    elif "recipe" in given:
        filled = recipe_options(given["recipe"], defaults)
        if zoo.architecture(str(given.get("model", filled["model"]))).name != filled["model"]:
            raise ValueError(f"the recipe {given['recipe']} is for {filled['model']}, and --model is {given['model']}")
    options = argparse.Namespace(**defaults | filled | given)
    if options.dry_run:
        options.steps, options.pretrained, options.keep_head = 2, "none", False
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; name a folder")
    if options.validate and options.data not in DIGITS:
        raise ValueError("--validate is for the digits; a folder's val/ is what is measured on")
    if options.batch % options.accumulate:
        raise ValueError(f"--batch {options.batch} does not divide into {options.accumulate} parts (--accumulate)")
    if options.warmup_epochs >= options.epochs:
        raise ValueError(f"--warmup-epochs {options.warmup_epochs:g} leaves nothing of --epochs {options.epochs}")
    return options, checkpoint


def read_checkpoint(out: Path) -> Record:
    path = out / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"there is nothing to resume: {path} does not exist; without --resume a new run begins")
    for unfinished in out.glob(".checkpoint.pt.*"):  # the run was killed while it wrote
        unfinished.unlink()
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on the bytes that it finds
        raise ValueError(f"{path} is no checkpoint of this program") from error
    parts = {"options", "data", "done", "generators", "model", "optimizer", "scaler"}
    if not (isinstance(found, dict) and parts <= found.keys()):
        raise ValueError(f"{path} is no checkpoint of this program")
    return found


def describe(data: Data) -> Record:
    """What must not have changed when a run goes on."""
    return {"images": len(data.train), "classes": list(data.classes)}


def recipe_options(name: str, defaults: Record) -> Record:
    """What a recipe says of the options that there are."""
    chosen = recipe(name)
    values: Record = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.name in defaults}
    values |= {option: list(value) for option, value in values.items() if isinstance(value, tuple)}
    return values | {"recipe": name, "model": chosen.model, "pretrained": chosen.start or "none"}


def overridden(options: argparse.Namespace) -> Record:
    """Where the options differ from the recipe: option to [recipe's value, ours]."""
    if not options.recipe:
        return {}
    ours = vars(options)
    return {
        option: [value, ours[option]]
        for option, value in recipe_options(options.recipe, ours).items()
        if value != ours[option]
    }


def command(options: argparse.Namespace) -> str:
    """A command line that asks for the same weights."""
    usual = vars(make_parser().parse_args([]))
    usual |= recipe_options(options.recipe, usual) | {"recipe": None} if options.recipe else {}
    usual |= {"threads": None, "device": None}  # of this machine
    flags = [flag(name, value) for name, value in vars(options).items() if name not in FREE and value != usual[name]]
    return " ".join(["python -m examples.finetune", *flags])


def flag(name: str, value: Any) -> str:
    """An option as it would be given, or "no --option"."""
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"--no-{option[2:]}" if name == "prop_attn" and value is False else f"no {option}"
    if value is True:
        return option
    if name == "r":  # a tuple is one word with a comma, a list one with brackets
        return f"{option} {shlex.quote(','.join(map(str, value)) if isinstance(value, tuple) else str(value))}"
    return " ".join([option, *(shlex.quote(str(part)) for part in (value if isinstance(value, list) else [value]))])

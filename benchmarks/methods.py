"""How faithful each way to merge is, on handwritten digits: every matching and shape at equal FLOPs.

    python -m benchmarks.methods                           # the models that ship
    python -m benchmarks.methods --without-class-token     # and one that has none, trained here first: some minutes
    python -m benchmarks.methods --r 4 1.5x --store

At each budget, for each way to merge and each ranking by importance that DiffRate's way could have: how far the answers
move from r = 0 (KL divergence of the classes, in nats), how many stay the same, and how many are right, all on the
held-out images. Nothing is timed here. FLOPs are equal, or as near as whole tokens allow.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import tomevit
from benchmarks.arguments import number_or_words
from examples import train_digits
from tomevit.layers import block
from tomevit.layers.matching import unlikeness
from tomevit.measure.timing import environment
from tomevit.models import VisionTransformer, build
from tomevit.training.digits import Digits, init_small, load_split

RESULTS = Path(__file__).parent / "results"
WAYS = ("bipartite", "importance", "diffrate", "redundant", "pitome", "random", "late", "late redundant", "deferred")

#: What DiffRate's way to merge could rank patches by, of the tokens behind attention and what attention added to them.
RANKINGS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "unlike the other patches": lambda x, _, num_prefix: unlikeness(x, num_prefix),
    "norm of the update": lambda _, update, __: update.norm(dim=-1),
    "norm of the token": lambda x, _, __: x.norm(dim=-1),
    "random": lambda x, _, __: torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)),
}


class Fidelity(NamedTuple):
    """How near the answers are to those at r = 0."""

    kl: float  # nats, mean over the images
    agreement: float  # per cent
    top1: float  # per cent
    flop_ratio: float  # as computed


@torch.inference_mode()
def fidelity(model: VisionTransformer, images: Tensor, labels: Tensor, r: str | int) -> Fidelity:
    """Of prepared images (N, C, H, W)."""
    torch.manual_seed(0)  # of the random matching
    exact, merged = (F.log_softmax(model(images, r=each), 1) for each in (0, r))
    whole, less = (tomevit.flops(model.config, each, computed=True) for each in (0, model.plain(r)))
    return Fidelity(
        F.kl_div(merged, exact, reduction="batchmean", log_target=True).item(),
        100 * (merged.argmax(1) == exact.argmax(1)).float().mean().item(),
        100 * (merged.argmax(1) == labels).float().mean().item(),
        whole / less,
    )


@contextmanager
def ranked_by(name: str) -> Iterator[None]:
    """Another importance, as long as it lasts."""
    look = block._look

    def looked(need: str, tokens: Any, attended: Any, step: Any, num_prefix: int) -> object:
        if need == "importance":
            return RANKINGS[name](tokens.x, attended.x, num_prefix)
        return look(need, tokens, attended, step, num_prefix)

    block._look = looked
    try:
        yield
    finally:
        block._look = look


def without_class_token(digits: Digits, epochs: int) -> VisionTransformer:
    """The small digits model, reading the mean patch, trained as those that ship."""
    card = tomevit.card(train_digits.MODEL)
    config = replace(card.config, class_token=False, pool="avg")
    torch.manual_seed(0)
    model = build(config)
    model.card = replace(card, config=config, weights="without_class_token")
    init_small(model)
    train_digits.train(model, digits, argparse.Namespace(epochs=epochs, batch=64, lr=3e-3, seed=0))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="fidelity of every way to merge, at equal FLOPs")
    parser.add_argument("--r", type=number_or_words, nargs="+", default=[2, 4, 6, "1.5x", "2x"])
    parser.add_argument("--without-class-token", action="store_true")
    parser.add_argument("--epochs", type=int, default=60, help="of that one's training")
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()

    torch.set_num_threads(1)
    digits, held_out = load_split()
    models = {name: tomevit.create(name, pretrained=True) for name in ("digits_p1.plain", "digits_p1.tome_r16")}
    if args.without_class_token:
        model = without_class_token(digits, args.epochs)
        models[model.card.full_name] = model
    found = []
    for name, model in models.items():
        images = tomevit.transform(model)(held_out.images)
        for r in args.r:
            for way, measure in _ways(model, images, held_out.labels, r):
                try:
                    row = {"model": name, "r": r, "way": way} | measure()._asdict()
                except ValueError as error:  # a budget that this shape cannot reach
                    print(f"{name:30}  {error}")
                    continue
                found.append(row)
                print(
                    f"{name:30}  {r!s:5}  {way:38}  KL {row['kl']:.4f}  agree {row['agreement']:5.1f} %  "
                    f"top-1 {row['top1']:5.2f} %  {row['flop_ratio']:.2f} times fewer FLOPs"
                )
    if args.store:
        about = {"images": len(held_out.labels), "environment": environment() | {"tomevit": tomevit.__version__}}
        (RESULTS / "methods_digits_p1.json").write_text(json.dumps(about | {"rows": found}, indent=2) + "\n")


def _ways(
    model: VisionTransformer, images: Tensor, labels: Tensor, r: int | str
) -> Iterator[tuple[str, Callable[[], Fidelity]]]:
    for way in WAYS:
        yield way, partial(fidelity, model, images, labels, f"{r} {way}")
    for ranking in RANKINGS:

        def measure(ranking: str = ranking) -> Fidelity:
            with ranked_by(ranking):
                return fidelity(model, images, labels, f"{r} diffrate")

        yield f"diffrate, by: {ranking}", measure


if __name__ == "__main__":
    main()

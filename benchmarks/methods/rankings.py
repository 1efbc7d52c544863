"""What DiffRate's way to merge could rank patches by, and a model without the class token that it asks otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tomevit
from benchmarks.methods.ways import Candidate
from examples import train_digits
from tomevit.layers import block
from tomevit.layers.matching import unlikeness
from tomevit.models import VisionTransformer, build
from tomevit.training.digits import init_small, load_split

EPOCHS = 60

#: Of the tokens behind attention, what attention added to them, and the number of prefix tokens.
RANKINGS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "unlike the other patches": lambda x, _, num_prefix: unlikeness(x, num_prefix),
    "norm of the update": lambda _, update, __: update.norm(dim=-1),
    "norm of the token": lambda x, _, __: x.norm(dim=-1),
    "random": lambda x, _, __: torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(0)),
}


def ranked(those: list[Candidate]) -> list[Candidate]:
    """Each schedule of DiffRate's way, by each ranking."""
    return [
        each._replace(way=f"diffrate, by: {name}", ranking=name)
        for each in those
        if each.way == "diffrate"
        for name in RANKINGS
    ]


@contextmanager
def ranked_by(name: str | None) -> Iterator[None]:
    """Another importance, as long as it lasts; None: that of the model."""
    look = block._look

    def looked(need: str, tokens: Any, attended: Any, step: Any, num_prefix: int) -> object:
        if need == "importance" and name is not None:
            return RANKINGS[name](tokens.x, attended.x, num_prefix)
        return look(need, tokens, attended, step, num_prefix)

    block._look = looked
    try:
        yield
    finally:
        block._look = look


def without_class_token(path: Path) -> Path:
    """The small digits model, reading the mean patch, trained as those that ship, in a file, unless it is there."""
    if not path.exists():
        card = tomevit.card(train_digits.MODEL)
        config = replace(card.config, class_token=False, pool="avg")
        torch.manual_seed(0)
        model: VisionTransformer = build(config)
        init_small(model)
        options = argparse.Namespace(epochs=EPOCHS, batch=64, lr=3e-3, seed=0, elastic=0.0, bfloat16=False)
        train_digits.train(model, load_split()[0], options)
        tomevit.save(model, path, card=replace(card, config=config, weights="without_class_token"))
    return path

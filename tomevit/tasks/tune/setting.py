"""What a search is asked for: the arguments checked, and what its figures must be read with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tomevit.config import Config
from tomevit.errors import check_type, join_with_or
from tomevit.layers.embed import check_images
from tomevit.measure.bench import MODES, subject
from tomevit.models import VisionTransformer
from tomevit.tasks.tune.costs import num_merging
from tomevit.weights.checkpoint import digest_of
from tomevit.words import MATCHING_NAMES

#: Matchings of which a block may merge any number of tokens, and the same ones each time.
SEARCHABLE = tuple(name for name in MATCHING_NAMES if name not in ("grid", "random"))
#: Those that are searched where nothing else is said.
SEARCHED = ("bipartite", "diffrate", "redundant", "pitome")
#: Images that a search takes at least.
LEAST_IMAGES = 32
#: Half of the images are searched on, but so many at most: more make the search slow, and the result better known.
MOST_SEARCHED = 128


def num_searched(images: int) -> int:
    """Of so many images, those to search on; all others are held back."""
    return min(images // 2, MOST_SEARCHED)


def choices(config: Config, matchings: Sequence[str]) -> tuple[str, tuple[str | None, ...]]:
    """What the model's own matching is called, and those to choose from, None for the model's own."""
    own = config.matching if isinstance(config.matching, str) else getattr(config.matching, "__name__", "own")
    check_type("matchings", matchings, (str, list, tuple), f"some of {', '.join(SEARCHABLE)}")
    if isinstance(matchings, str) or not (matchings or callable(config.matching)):
        raise ValueError(f"matchings is {matchings!r}, and must list some of {', '.join(SEARCHABLE)}")
    if wrong := [name for name in matchings if name not in SEARCHABLE]:
        raise ValueError(f"matchings has {wrong[0]!r}, which cannot be searched; there is {join_with_or(SEARCHABLE)}")
    names: list[str | None] = [None] if callable(config.matching) else []
    return own, tuple(dict.fromkeys(names + [None if name == config.matching else name for name in matchings]))


def check_arguments(
    model: VisionTransformer, images: Tensor, labels: Tensor | None, batch: int, mode: str, rounds: int
) -> None:
    """Raises ValueError where an argument is wrong, before anything is measured."""
    config = model.config
    check_images(images, (config.in_chans, *config.img_size))
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"{len(images)} images are too few to tell schedules apart: give {LEAST_IMAGES} at least")
    if labels is not None:
        if not config.num_classes:
            raise ValueError("labels are for a model with a head, and this one has none")
        check_type("labels", labels, Tensor, "torch.int64: one class for each image")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}, and must be torch.int64 of "
                f"{(len(images),)}: one class for each image"
            )
        if labels.min() < 0 or labels.max() >= config.num_classes:
            raise ValueError(f"labels must lie between 0 and {config.num_classes - 1}: the model's classes")
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}; there is {join_with_or(MODES)}")
    for name, value in (("batch", batch), ("rounds", rounds)):
        check_type(name, value, Integral, "a number")
        if value < 1:
            raise ValueError(f"{name} is {value}, and must be at least 1")
    if config.num_patches < 2 or num_merging(config) < 1:
        raise ValueError("nothing can merge in this model, of one patch or of one block whose class token is read")


def describe(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor | None,
    batch: int,
    mode: str,
    matchings: Sequence[str],
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """What the figures must be read with, and a search goes on under: as `Front.to_json` has it."""
    config = model.config
    own = config.matching
    return subject(model, model.device) | {
        "tokens": config.num_tokens,
        "prefix": config.num_prefix,
        "depth": config.depth,
        "matching": own if isinstance(own, str) else getattr(own, "__qualname__", type(own).__name__),
        "prop_attn": config.prop_attn,
        "weights": digest_of(model.state_dict()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "precision": torch.get_float32_matmul_precision(),
        "batch": batch,
        "mode": mode,
        "rounds": rounds,
        "matchings": list(matchings),
        "seed": seed,
        "images": {
            "count": len(images),
            "search": num_searched(len(images)),
            "held_back": len(images) - num_searched(len(images)),
            "sha256": _digest(images),
            "labels": None if labels is None else _digest(labels),
        },
    }


def _digest(values: Tensor) -> str:
    """The sha256 of a tensor's shape, dtype and values."""
    sha = hashlib.sha256(f"{list(values.shape)} {values.dtype}".encode())
    for part in torch.split(values, 256):
        sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

"""How published weights were trained, as data: the recipes read from configs/recipes/.

One TOML file per family of recipes:

    title, notes            what it is, and where it differs from what is published
    [GROUP]                 fields of Recipe that all share, and `source`, which says where these values are published
    [recipes.NAME.GROUP]    fields of one recipe, likewise; NAME is the set of weights that it makes
    [recipes.NAME]          `like`: another recipe, which this one differs from
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tomevit import zoo
from tomevit.errors import check_type, join_with_or, nearest


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training on ImageNet-1k needs to be told.

    The learning rate rises in a line from warmup_lr to lr · batch / lr_batch, and falls from there to min_lr in half a
    cosine.
    """

    name: str  # the set of weights that it makes, as in `tomevit.card`
    title: str
    notes: str
    sources: Mapping[str, str]  # where each value is published, by field

    start: str | None  # the set of weights it begins with; None: fresh ones
    r: int
    prop_attn: bool
    crop_pct: float  # of the images measured on, as in Preprocess

    optimizer: Literal["adamw"]
    betas: tuple[float, float]
    lr: float  # of the head, for lr_batch images per step
    lr_batch: int
    batch: int  # images per step
    weight_decay: float
    layer_decay: float
    clip: float  # norm of all gradients; 0: as they are
    epochs: int
    warmup_epochs: float
    warmup_lr: float
    min_lr: float  # of the head

    drop_path: float
    label_smoothing: float
    mixup: float  # α of the Beta distribution; with cutmix one of the two is drawn for each batch
    cutmix: float  # α
    erasing: float  # probability
    randaugment: tuple[int, int]  # number of operations, magnitude of 30
    repeats: int  # how often an image comes in one pass over a part of the images (repeated augmentation)
    ema: float  # decay of the running average of the weights, per step; 0: none is kept
    loss: Literal["cross-entropy"]
    distillation: Literal["none"]

    @property
    def model(self) -> str:
        """The architecture's name."""
        return self.name.partition(".")[0]


@cache
def _recipes() -> Mapping[str, Recipe]:
    found: dict[str, Recipe] = {}
    for file in sorted((zoo.configs() / "recipes").glob("*.toml")):
        found |= _read_family(tomllib.loads(file.read_text(encoding="utf-8")))
    return found


def _read_family(data: dict[str, Any]) -> dict[str, Recipe]:
    entries, text = data.pop("recipes"), {"title": data.pop("title"), "notes": data.pop("notes").strip()}
    family = {}
    for name, entry in entries.items():
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for groups in (data, entries.get(entry.get("like"), {}), entry):
            for group in (group for group in groups.values() if isinstance(group, dict)):
                fields = {field: value for field, value in group.items() if field != "source"}
                values |= {field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()}
                sources |= dict.fromkeys(fields, group["source"])
        values["start"] = values["start"] or None  # TOML has no None
        family[name] = Recipe(name=zoo.card(name).full_name, sources=sources, **text, **values)
    return family


def list_recipes(pattern: str = "*") -> list[str]:
    """The names of all recipes that match a pattern with the shell's wildcards, as in "mae*"."""
    check_type("pattern", pattern, str, "a text, as in 'mae*'")
    return fnmatch.filter(_recipes(), pattern)


def recipe(name: str) -> Recipe:
    """A recipe by the name of the weights that it makes, as in "mae_b16.tome_r16".

    Raises:
        ValueError: no such recipe; the message has the nearest names.
    """
    check_type("name", name, str, "a recipe's name, as in 'mae_b16.tome_r16'")
    if name not in _recipes():
        raise ValueError(
            f"there is no recipe {name!r}; {nearest(name, _recipes(), f'there are {join_with_or(_recipes())}')}"
        )
    return _recipes()[name]

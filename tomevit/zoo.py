"""What models there are: the cards read from configs/, and the models made from them.

Everything is data in configs/, one TOML file per family:

    title, papers           what the family is, and where it is defined
    [config]                fields of Config that the whole family shares
    [preprocess]            fields of Preprocess, likewise
    [models.SIZE]           fields of Config for one size; `resolutions`, of which the first needs no suffix in the
                            name; `timm`, timm's names for them
    [[weights]]             model, tag, sources, licence, figures; what they were trained with (r, prop_attn,
                            num_classes, preprocess); the first of a model are its default
    [weights_defaults]      what the weights share
    [aliases]               other names, with the weights they stand for
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from os import PathLike, fspath
from typing import Any, NamedTuple

from tomevit.config import ARCHITECTURE, Card, Config, Figure, Pool, Preprocess, Schedule, Source
from tomevit.models import VisionTransformer, build
from tomevit.weights.native import assemble, read


class _Zoo(NamedTuple):
    cards: Mapping[str, tuple[Card, ...]]  # by model name; the default weights first
    aliases: Mapping[str, str]


@cache
def _zoo() -> _Zoo:
    cards: dict[str, tuple[Card, ...]] = {}
    aliases: dict[str, str] = {}
    for file in sorted(resources.files("tomevit.configs").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            family = tomllib.loads(file.read_text(encoding="utf-8"))
            _read_family(file.name.removesuffix(".toml"), family, cards, aliases)
    return _Zoo(cards, aliases)


def _read_family(
    family: str, data: dict[str, Any], cards: dict[str, tuple[Card, ...]], aliases: dict[str, str]
) -> None:
    weights: dict[str, list[dict[str, Any]]] = {}
    for entry in data.get("weights", []):
        weights.setdefault(entry.pop("model"), []).append(data.get("weights_defaults", {}) | entry)
    for size, fields in data["models"].items():
        resolutions, timm = fields.pop("resolutions"), fields.pop("timm", [])
        for resolution, timm_name in itertools.zip_longest(resolutions, timm):
            key = size if resolution == resolutions[0] else f"{size}_{resolution}"
            plain = Card(
                name=f"{family}_{key}",
                timm=timm_name,
                title=data["title"],
                papers=tuple(data["papers"]),
                config=Config(img_size=(resolution, resolution), **data.get("config", {}) | fields),
                preprocess=_preprocess(data["preprocess"]),
            )
            cards[plain.name] = tuple(
                _with_weights(plain, data["preprocess"], entry) for entry in weights.pop(key, [])
            ) or (plain,)
            if plain.timm:
                aliases[plain.timm] = plain.name
    assert not weights, f"{family}.toml has weights for unknown models: {sorted(weights)}"
    aliases.update(data.get("aliases", {}))


def _with_weights(card: Card, preprocess: dict[str, Any], entry: dict[str, Any]) -> Card:
    config = {name: entry[name] for name in ("num_classes", "prop_attn") if name in entry}
    return replace(
        card,
        weights=entry["tag"],
        config=replace(card.config, **config),
        preprocess=_preprocess(preprocess | entry.get("preprocess", {})),
        r=entry.get("r", 0),
        licence=entry["licence"],
        sources=tuple(Source(**source) for source in entry["sources"]),
        figures=tuple(Figure(**figure) for figure in entry.get("figures", [])),
        class_names=tuple(entry.get("class_names", [])),
        notes=entry.get("notes", ""),
    )


def _preprocess(fields: dict[str, Any]) -> Preprocess:
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Preprocess(**plain)


def list_models(pattern: str = "*", *, weights: bool = False) -> list[str]:
    """The names of all models that match a pattern.

    Args:
        pattern: with the shell's wildcards, as in "deit*".
        weights: name every set of weights ("vit_b16.augreg_in1k"), instead of every architecture.
    """
    names = []
    for name, cards in _zoo().cards.items():
        names += [card.full_name for card in cards] if weights else [name]
    return fnmatch.filter(names, pattern)


def cards(name: str) -> tuple[Card, ...]:
    """The cards of every set of weights for one architecture, the default first.

    Raises:
        ValueError: no such model; the message has the nearest names.
    """
    return _zoo().cards[card(name).name]


def card(name: str) -> Card:
    """What there is to know about a model: architecture, preprocessing, weights, licence, published figures.

    Args:
        name: family_size[_resolution][.weights], or timm's name for the same model; without weights, the default ones.

    Raises:
        ValueError: no such model or weights; the message has the nearest names.
    """
    zoo = _zoo()
    model, _, tag = zoo.aliases.get(name, name).partition(".")
    model = model if tag == "" else zoo.aliases.get(model, model).partition(".")[0]
    if model not in zoo.cards:
        known = [*zoo.cards, *zoo.aliases]
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
        hint = f"did you mean {_either(near)}?" if near else "tomevit.list_models() has all names"
        raise ValueError(f"there is no model {name!r}; {hint}")
    if tag == "":
        return zoo.cards[model][0]
    for found in zoo.cards[model]:
        if found.weights == tag:
            return found
    tags = [found.weights for found in zoo.cards[model] if found.weights]
    raise ValueError(f"{model} has no weights {tag!r}; it has {_either(tags) if tags else 'none'}")


def _either(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def create(
    name: str,
    *,
    r: Schedule | None = None,
    pretrained: bool | str | PathLike[str] = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    prop_attn: bool | None = None,
    pool: Pool | None = None,
    matching: str | Callable[..., Any] | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    attn_dropout: float = 0.0,
) -> VisionTransformer:
    """A model by name, in evaluation mode, on the CPU, in float32, ready to use.

    Args:
        name: family_size[_resolution][.weights], as in "vit_b16", "deit_s16.tome_r13", or timm's name for the same.
        r: tokens to merge in each block: an int, (r, inflection), a list with one int per block, or a float up to 0.5,
            the share of the patches entering each block. None: what the weights were trained with, 0 for most.
        pretrained: False: fresh weights from torch's default generator. True: the name's weights. A path: a file that
            `tomevit.save` wrote.
        num_classes: outputs of the head; 0 leaves it out.
        img_size: pixels, one number or (height, width), divisible by the patch size.
        in_chans: image channels.
        prop_attn: proportional attention; None: as the weights ask.
        pool: what the head reads, the class token or the mean patch.
        matching: a name in `tomevit.layers.MATCHINGS`, or a function (key, r, num_prefix) -> Merge.
        drop_path, dropout, attn_dropout: probabilities, for training.

    Raises:
        ValueError: there is no such model, or an argument does not fit; the message says what would.
        NotImplementedError: pretrained=True for weights that do not ship with tomevit.
    """
    chosen = card(name)
    changes: dict[str, Any] = {
        "num_classes": num_classes,
        "img_size": tuple(img_size) if isinstance(img_size, list) else img_size,
        "in_chans": in_chans,
        "prop_attn": prop_attn,
        "pool": pool,
        "matching": matching,
    }
    if isinstance(img_size, int):
        changes["img_size"] = (img_size, img_size)
    changes = {field: value for field, value in changes.items() if value is not None}
    changes |= {"drop_path": drop_path, "dropout": dropout, "attn_dropout": attn_dropout}

    if pretrained is False:
        model = build(replace(chosen.config, **changes), chosen.r)
        model.card = replace(chosen, config=model.config, preprocess=_for_channels(chosen.preprocess, in_chans))
    elif pretrained is True:
        model = _from_file(chosen, changes, _shipped_file(chosen))
    elif isinstance(pretrained, str | PathLike):
        model = _from_file(chosen, changes, fspath(pretrained))
    else:
        raise ValueError(f"pretrained is {pretrained!r}, and must be True, False or a path")
    if r is not None:
        model.r = r
    return model.eval()


def _for_channels(preprocess: Preprocess, channels: int | None) -> Preprocess:
    """Other channels than those the statistics were taken of map to [-1, 1]."""
    if channels in (None, len(preprocess.mean)):
        return preprocess
    return replace(preprocess, mean=(0.5,) * channels, std=(0.5,) * channels)


def _shipped_file(chosen: Card) -> str:
    for source in chosen.sources:
        if source.package:
            return str(resources.files("tomevit") / source.package)
    raise NotImplementedError(
        f"{chosen.full_name} does not ship with tomevit, and downloading weights is not built yet; "
        f"pretrained='file.safetensors' loads a file that tomevit.save wrote"
    )


def _from_file(chosen: Card, changes: dict[str, Any], path: str) -> VisionTransformer:
    found, tensors = read(path)
    # Weights may have another head, another resolution or other channels than the name's, and bring their own.
    differ = [
        f"{field} {getattr(found.config, field)} where {chosen.name} has {getattr(chosen.config, field)}"
        for field in ARCHITECTURE
        if field not in ("num_classes", "img_size", "in_chans")
        and getattr(found.config, field) != getattr(chosen.config, field)
    ]
    if differ:
        raise ValueError(f"{path} holds {found.full_name}, with {'; '.join(differ)}")
    return assemble(replace(found, config=replace(found.config, **changes)), tensors, path)

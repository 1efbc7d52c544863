"""What models there are: the cards read from configs/.

Everything is data in configs/, one TOML file per family:

    title, papers           what the family is, and where it is defined
    [config]                fields of Config that the whole family shares
    [preprocess]            fields of Preprocess, likewise
    [models.SIZE]           fields of Config for one size; `resolutions`, of which the first needs no suffix in the
                            name; `timm`, timm's names for them; `preprocess`, where it is not the family's
    [[weights]]             model, tag, sources, licence, figures; what they were trained with (r, preprocess, and of
                            Config what is in OF_WEIGHTS); the first of a model are its default
    [weights_defaults]      what the weights share
    [[presets]]             published schedules, as r by name: model, name (the matching, and the budget in GFLOPs that
                            they were found for), source, and block by block the tokens that are left, prefix included:
                            `pruned` after some are dropped, `merged` after others merge; where one has more than there
                            still are, nothing happens
    [presets_defaults]      what the presets share
    [aliases]               other names, with the weights they stand for
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tomevit.cards import Card
from tomevit.config import Config, Figure, Preprocess, Preset, Source
from tomevit.errors import check_type, join_with_or, nearest
from tomevit.schedule import Step

#: How the names of checkpoints end.
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".torch", ".tar", ".ckpt", ".npz", ".msgpack", ".onnx", ".pt2")

#: The names that a repository of the hub has for its weights, the preferred first; an index lists several files.
HUB_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

#: How the addresses of checkpoints begin.
ADDRESSES = ("http://", "https://", "hf-hub:")


#: The fields of Config in which sets of weights for one model may differ.
OF_WEIGHTS = ("num_classes", "prop_attn", "act", "pool", "proj_dim")


class _Zoo(NamedTuple):
    architectures: Mapping[str, Card]  # by model name, without weights
    cards: Mapping[str, tuple[Card, ...]]  # by model name; the default weights first
    aliases: dict[str, str]  # other names, timm's among them
    repositories: dict[str, str]  # of the hub, with the weights that are published there


def configs() -> Path:
    """The folder of families and recipes: in the package where it was built, beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


@cache
def _zoo() -> _Zoo:
    architectures: dict[str, Card] = {}
    cards: dict[str, tuple[Card, ...]] = {}
    aliases: dict[str, str] = {}
    for file in sorted(configs().glob("*.toml")):
        _read_family(file.stem, tomllib.loads(file.read_text(encoding="utf-8")), architectures, cards, aliases)
    published = ((card, source) for card in itertools.chain.from_iterable(cards.values()) for source in card.sources)
    repositories: dict[str, str] = {}
    for card, source in published:
        if source.hub:
            repositories.setdefault(source.hub, card.full_name)
    return _Zoo(architectures, cards, aliases, repositories)


def _read_family(
    family: str,
    data: dict[str, Any],
    architectures: dict[str, Card],
    cards: dict[str, tuple[Card, ...]],
    aliases: dict[str, str],
) -> None:
    weights, presets = _by_model(data, "weights"), _by_model(data, "presets")
    for size, fields in data["models"].items():
        resolutions, timm = fields.pop("resolutions"), fields.pop("timm", [])
        preprocess = data["preprocess"] | fields.pop("preprocess", {})
        for resolution, timm_name in itertools.zip_longest(resolutions, timm):
            key = size if resolution == resolutions[0] else f"{size}_{resolution}"
            config = Config(img_size=(resolution, resolution), **data.get("config", {}) | fields)
            plain = Card(
                name=f"{family}_{key}",
                timm=timm_name,
                title=data["title"],
                papers=tuple(data["papers"]),
                config=config,
                preprocess=_preprocess(preprocess),
                presets=tuple(_preset(config.num_tokens, entry) for entry in presets.pop(key, [])),
            )
            architectures[plain.name] = plain
            cards[plain.name] = tuple(_with_weights(plain, preprocess, entry) for entry in weights.pop(key, [])) or (
                plain,
            )
            if plain.timm:
                aliases[plain.timm] = plain.name
    for table, left in (("weights", weights), ("presets", presets)):
        assert not left, f"{family}.toml has {table} for unknown models: {sorted(left)}"
    aliases.update(data.get("aliases", {}))


def _by_model(data: dict[str, Any], table: str) -> dict[str, list[dict[str, Any]]]:
    """The entries of a family's table, with what they share."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in data.get(table, []):
        found.setdefault(entry.pop("model"), []).append(data.get(f"{table}_defaults", {}) | entry)
    return found


def _preset(num_tokens: int, entry: dict[str, Any]) -> Preset:
    matching, tokens, blocks = entry["name"].rpartition("-")[0], num_tokens, []
    for pruned, merged in zip(entry["pruned"], entry["merged"], strict=True):
        kept = min(tokens, pruned)
        left = min(kept, merged)
        blocks.append(Step(kept - left, tokens - kept, matching).entry)
        tokens = left
    return Preset(name=entry["name"], r=tuple(blocks), num_tokens=num_tokens, source=entry["source"])


def _with_weights(card: Card, preprocess: dict[str, Any], entry: dict[str, Any]) -> Card:
    config = {name: entry[name] for name in OF_WEIGHTS if name in entry}
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
    """The names of all models that match a pattern; where none does, of those whose timm's or repository's name does.

    Args:
        pattern: with the shell's wildcards, as in "deit*" or "vit_base*".
        weights: name every set of weights ("vit_b16.augreg_in1k"), instead of every architecture.
    """
    check_type("pattern", pattern, str, "a text, as in 'deit*'")
    zoo = _zoo()
    if weights:
        models = {found.full_name: model for model, those in zoo.cards.items() for found in those}
    else:
        models = {model: model for model in zoo.cards}
    own = [name for name, model in models.items() if fnmatch.filter((name, model), pattern)]
    if own:
        return own
    every = [found for those in zoo.cards.values() for found in those if found.weights]
    names = zoo.aliases | zoo.repositories | {f"{found.timm}.{found.weights}": found.full_name for found in every}
    meant = {names[other] for other in fnmatch.filter(names, pattern)}
    if not weights:
        meant = {name.partition(".")[0] for name in meant}
    return [name for name, model in models.items() if meant & {name, model}]


def cards(name: str) -> tuple[Card, ...]:
    """The cards of every set of weights for one architecture, the default first.

    Raises:
        ValueError: no such model; the message has the nearest names.
    """
    return _zoo().cards[card(name).name]


def card(name: str) -> Card:
    """What there is to know about a model: architecture, preprocessing, weights, licence, published figures.

    Args:
        name: family_size[_resolution][.weights], or timm's name for the same model, or the repository on the hub that
            its weights are published in; without weights, the default ones.

    Raises:
        ValueError: no such model or weights; the message has the nearest names.
    """
    check_type("name", name, str, "a model's name, as in 'vit_b16'")
    zoo = _zoo()
    known = zoo.repositories.get(name, name)
    model, _, tag = zoo.aliases.get(known, known).partition(".")
    model = model if tag == "" else zoo.aliases.get(model, model).partition(".")[0]
    if model not in zoo.cards:
        hint = nearest(
            model,
            [*zoo.cards, *zoo.aliases, *zoo.repositories],
            "tomevit list, or tomevit.list_models(), has all names",
        )
        raise ValueError(f"there is no model {name!r}; {hint}")
    if tag == "":
        return zoo.cards[model][0]
    for found in zoo.cards[model]:
        if found.weights == tag:
            return found
    tags = [found.weights for found in zoo.cards[model] if found.weights]
    raise ValueError(f"{model} has no weights {tag!r}; it has {join_with_or(tags) if tags else 'none'}")


def is_elsewhere(name: str) -> bool:
    """Whether it is an address, or a name that is no file's, rather than a file or directory here.

    A directory hides the model of its name only if it has weights under one of `HUB_FILES`: else it may be where that
    one's results are written.
    """
    path = Path(name)
    if not name or name.startswith(ADDRESSES) or not path.exists():
        return True
    return path.is_dir() and not any((path / file).is_file() for file in HUB_FILES) and names_model(name)


def names_model(name: str) -> bool:
    try:
        card(name)
    except ValueError:
        return False
    return True


def card_of_no_file(name: str) -> Card:
    """The card of what was found to be no file.

    Raises:
        FileNotFoundError: there is no such model either, and the name looks like a file's.
        ValueError: there is no such model.
    """
    try:
        return card(name)
    except ValueError as error:
        if Path(name).suffix in CHECKPOINTS or "/" in name or os.sep in name:
            raise FileNotFoundError(f"there is no file {name}") from None
        raise ValueError(f"there is no file {name}, and {str(error).removeprefix('there is ')}") from error


def names_weights(name: str) -> bool:
    """Whether a name of `card` is that of one set of weights, rather than of an architecture."""
    zoo = _zoo()
    known = zoo.repositories.get(name, name)
    return "." in zoo.aliases.get(known, known)


def architecture(name: str) -> Card:
    """The card of an architecture alone, whatever weights there are.

    Raises:
        ValueError: as `card`.
    """
    return _zoo().architectures[card(name).name]


def families() -> dict[str, tuple[str, ...]]:
    """The names of each family's models, by the name of its file in configs/."""
    found: dict[str, list[str]] = {file.stem: [] for file in sorted(configs().glob("*.toml"))}
    for name in _zoo().architectures:
        found[max((family for family in found if name.startswith(f"{family}_")), key=len)].append(name)
    return {family: tuple(names) for family, names in found.items()}


def architectures() -> tuple[Card, ...]:
    """The cards of all architectures, without weights."""
    return tuple(_zoo().architectures.values())


def published_sources() -> Iterator[tuple[Card, Source]]:
    """Every source of every set of weights."""
    for found in itertools.chain.from_iterable(_zoo().cards.values()):
        for source in found.sources:
            yield found, source

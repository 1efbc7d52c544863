"""Cards: what there is to know about a model and its weights, and how a file says it.

A file of tomevit's own has it in the metadata of its safetensors header, in one entry, `tomevit`, in JSON:

    version   of this format
    card      the Card with the whole Config, so that nothing else is needed to build, feed and understand the model
    sha256    of the tensors, as `tomevit.weights.checkpoint.digest` has it, so that damage shows
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tomevit.config import MOST_TEXT, Config, Figure, Preprocess, Preset, Source
from tomevit.errors import CheckpointError, check_type, printable
from tomevit.flops import count_parameters, flops, format_flops, plain_schedule
from tomevit.headers import MOST_BYTES, read_header
from tomevit.notebook import html_table
from tomevit.opening import open_file
from tomevit.schedule import Schedule, schedule_from_json, schedule_to_json
from tomevit.typed import conform, parse_json

KEY = "tomevit"
VERSION = 2
#: What a card says of itself in a line.
SHORT = ("parameters", "image", "tokens", "FLOPs", "r", "accuracy", "licence")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What there is to know about a model and its weights. It travels in every file that tomevit writes.

    Its preprocessing has as many channels as its config: see `Preprocess.for_channels`.
    """

    name: str  # family_size[_resolution]
    weights: str | None = None  # the tag of one set of weights
    timm: str | None = None  # timm's name for the same architecture
    title: str = ""
    papers: tuple[str, ...] = ()  # where the architecture is defined
    config: Config = Config()
    preprocess: Preprocess = Preprocess()
    r: Schedule = 0  # what the weights were trained with; words become plain numbers
    licence: str | None = None
    sources: tuple[Source, ...] = ()  # where these weights are published, the first preferred
    origin: Source | None = None  # the very file that these tensors were read from, with its whole sha256
    figures: tuple[Figure, ...] = ()
    presets: tuple[Preset, ...] = ()  # published schedules, as r by name
    class_names: tuple[str, ...] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        check_type("name", self.name, str, "a text")
        check_type("config", self.config, Config, "a Config")
        check_type("preprocess", self.preprocess, Preprocess, "a Preprocess")
        object.__setattr__(self, "r", plain_schedule(self.r, self.config, self.presets))
        names = [preset.name for preset in self.presets]
        if unknown := [figure.r for figure in self.figures if isinstance(figure.r, str) and figure.r not in names]:
            raise ValueError(f"a figure is of r = {reprlib.repr(unknown[0])}, which is none of the presets {names}")
        object.__setattr__(self, "preprocess", self.preprocess.for_channels(self.config.in_chans))
        if len(self.class_names) > (classes := self.config.num_classes):
            raise ValueError(f"class_names has {len(self.class_names)} names, and the model {classes} classes")
        said = (self.name, self.weights or "", self.timm or "", self.title, self.licence or "", self.notes)
        if (length := sum(map(len, (*said, *self.papers, *self.class_names)))) > MOST_TEXT:
            raise ValueError(f"class_names, notes and the like have {length:,} characters, more than any model's")

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.weights}" if self.weights else self.name

    def __repr__(self) -> str:
        facts = {name: value for name, value in self._facts().items() if name in SHORT}
        return f"<Card {printable(self.full_name)}: {printable(', '.join(facts.values()))}>"

    def _repr_html_(self) -> str:
        return html_table(self.full_name or "a model without a name", (), self._facts().items(), self.notes)

    def _facts(self) -> dict[str, str]:
        """What people ask first, in words."""
        config, presets = self.config, ", ".join(preset.name for preset in self.presets)
        height, width = config.img_size
        # Of two at one r the later, which is of the table that has those with merging.
        figures = {figure.r: figure for figure in self.figures}
        best = [f"{figure.top1:g} {figure.unit} top-1 at r = {r}" for r, figure in figures.items()]
        facts = {
            "model": self.title,
            "parameters": f"{count_parameters(config) / 1e6:.3g} M parameters",
            "image": f"{height}x{width} pixels",
            "tokens": f"{config.num_tokens} tokens",
            "FLOPs": format_flops(flops(config)),
            "FLOPs at its r": format_flops(flops(config, self.r)) if self.r else "",
            "r": f"r = {self.r}",
            "classes": f"{config.num_classes} classes" if config.num_classes else "no head",
            "accuracy": "; ".join(best),
            "licence": self.licence or "",
            "timm": self.timm or "",
            "presets": presets,
            "papers": ", ".join(self.papers),
        }
        return {name: value for name, value in facts.items() if value}


class Header(NamedTuple):
    """What a file says of itself."""

    card: Card
    sha256: str | None  # what the digest of the tensors must be; None in files of version 1


def encode_header(header: Header) -> dict[str, str]:
    """The metadata of a file."""
    return {KEY: json.dumps({"version": VERSION, "card": card_to_json(header.card), "sha256": header.sha256})}


def decode_header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Header:
    """The inverse of `encode_header`, of files of earlier versions too.

    Raises:
        CheckpointError: tomevit did not write it, or a newer one, or it is damaged.
    """
    path = os.fspath(path)
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by tomevit: its metadata has no entry {KEY!r}; tomevit convert reads other formats"
        )
    try:
        described = parse_json(metadata[KEY], make_constant=_refuse_constant)
        if not isinstance(described, dict) or "version" not in described:
            raise ValueError(f"its metadata is {reprlib.repr(described)}, and must have a version")
        version = described["version"]
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"it is of format version {reprlib.repr(version)}, and this tomevit reads up to {VERSION}: upgrade it"
            )
        if missing := [name for name in ("card", "sha256")[:version] if name not in described]:
            raise ValueError(f"its metadata has no {missing[0]}")
        # Version 1 had neither the tensors' digest nor the card's origin, and a Source had neither revision nor file.
        sha256 = conform(str, described["sha256"], "sha256") if version > 1 else None
        return Header(card_from_json(described["card"]), sha256)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


class Contents(NamedTuple):
    """All that a file says of itself, beside its values."""

    path: Path
    card: Card
    sha256: str | None  # what the digest of the tensors must be, where it is recorded
    size: int  # bytes
    format: str  # in words
    dtypes: dict[str, int]  # how many tensors are of each
    left_out: dict[str, str]  # what is no weight of the model, and why


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """What a file of tomevit's own says of itself. No tensor is read.

    Raises:
        CheckpointError: it is damaged, or another kind of file.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            metadata, tensors = read_header(file)
            size = os.fstat(file.fileno()).st_size
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: it is damaged, or of another format ({error})") from error
    header, dtypes = decode_header(path, metadata), Counter(tensor.dtype for tensor in tensors.values())
    words = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    named = {words.get(dtype, dtype): count for dtype, count in dtypes.items()}
    return Contents(path, header.card, header.sha256, size, "tomevit's own format", named, {})


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that tomevit wrote it, as far as its header can be read."""
    try:
        with open_file(path) as file:
            length, first = int.from_bytes(file.read(8), "little"), file.read(1)
            # Of others' files the header, which may be long, is not parsed for this.
            if first != b"{" or f'"{KEY}"'.encode() not in file.read(min(length, MOST_BYTES)):
                return False
            file.seek(0)
            return KEY in read_header(file)[0]
    except (OSError, ValueError):
        return False


def card_to_json(card: Card) -> dict[str, Any]:
    return asdict(card) | {"r": schedule_to_json(card.r)}


def card_from_json(data: Any) -> Card:
    """A card from what JSON has of it.

    Raises:
        ValueError: it is none; the message says where it is wrong.
    """
    if not isinstance(data, dict) or not {"config", "r"} <= data.keys():
        raise ValueError(f"card is {reprlib.repr(data)}, and must have config and r")
    preprocess = conform(Preprocess, data.get("preprocess", {}), "card.preprocess")
    fields = {name: value for name, value in data.items() if name != "r"} | {"preprocess": preprocess}
    card: Card = conform(Card, fields, "card")
    if (means := len(preprocess.mean)) != card.config.in_chans and "preprocess" in data:
        raise ValueError(
            f"card.preprocess.mean has {means} values, and the model takes {card.config.in_chans} channels"
        )
    if callable(card.config.matching):
        raise ValueError(f"card.config.matching is {card.config.matching!r}, and must be a name")
    if isinstance(data["r"], str):
        raise ValueError(f"card.r is {reprlib.repr(data['r'])}, and files hold plain numbers")
    return replace(card, r=schedule_from_json(data["r"], card.config.depth))


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its metadata has a number that is {name}")


def by_pattern(names: Iterable[str]) -> list[str]:
    """Each name once, however many blocks have it."""
    return list(dict.fromkeys(re.sub(r"(?<=[._])\d+(?=[./])", "{i}", name, count=1) for name in names))


def lines_left_out(left_out: Mapping[str, str]) -> list[str]:
    """What is left out of a checkpoint: one line for each reason, with the names that it holds of."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(by_pattern(names))}: {reason}" for reason, names in reasons.items()]

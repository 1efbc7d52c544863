"""What the modules of all libraries share: rows of tables, JSON objects that nothing is trusted of, and limits."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import GenericAlias
from typing import Any, NamedTuple, get_args, get_origin

from tomevit.config import LEAST, MOST, MOST_PIXELS, Config
from tomevit.opening import open_file
from tomevit.typed import conform, parse_json

MOST_BYTES = 2**24  # the largest config.json of google's repositories, with 21843 class names, has 1.1 MB
MOST_CHARACTERS = 256  # of a name
#: By our fields, what files may say; of what is not named here, 65536.
_MOST: Mapping[str, int] = MOST | {"img_size": MOST_PIXELS, "mlp_hidden": 2**20}
_LEAST: Mapping[str, float] = LEAST | {"img_size": 1, "mlp_hidden": 1, "mean": -(2**16), "std": 1e-6}

PAIR = tuple[int, int]  # height and width: a list, one int for both, or an object with these names
PER_CHANNEL = tuple[float, ...]  # a list of as many as there are channels, or one for all

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]


class Row(NamedTuple):
    """A field of a library's file, and the field of `Config` or `Preprocess` that it stands for.

    Attributes:
        kind: what the file has: as `tomevit.typed.conform` takes it; or its choices, each with what it is here, of
            which the first is written.
        default: what the library takes where the file is silent; None: what the caller of `JsonObject.read` knows.
    """

    theirs: str
    ours: str
    kind: Any
    default: Any = None


class JsonObject(dict[str, Any]):
    """A JSON object of which nothing is trusted: null counts as missing, and each value is asked for by its kind.

    All methods raise ValueError where the file is wrong.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.where = where  # before a field's name, in messages

    @classmethod
    def of_file(cls, path: Path) -> JsonObject:
        """The object that a file holds."""
        with open_file(path) as file:
            content = file.read(MOST_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, and is no description of a model")
        try:
            values = parse_json(content)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"it holds {reprlib.repr(values)}, and should hold an object")
        return cls(values)

    @classmethod
    def of_memory(cls, values: Mapping[str, Any]) -> JsonObject:
        """What a library has in memory of such a file: its lists may be tuples there."""
        return cls({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})

    def refusal(self, name: str, wanted: str) -> ValueError:
        """The error that says what a field is, and what it must be."""
        shown = f"{self.where}{name[:MOST_CHARACTERS]} is {reprlib.repr(self.get(name))}"
        return ValueError(f"{shown}, and must be {wanted}")

    def unknown(self, name: str) -> ValueError:
        """The error that says that a field makes another model of it."""
        return self.refusal(name, "left out: tomevit has nothing like it")

    def check_names(self, known: Collection[str], idle: re.Pattern[str], only: Mapping[str, Any]) -> None:
        """Raises ValueError at a field that is not known, not idle by its name, and has not the only value we have."""
        for name, value in self.items():
            passed = name in known or (len(name) <= MOST_CHARACTERS and idle.fullmatch(name))
            if not passed and (name, value) not in only.items():
                raise self.unknown(name)

    def part(self, name: str) -> JsonObject:
        """An object within this one, empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refusal(name, "an object")
        return JsonObject(value, f"{self.where}{name}.")

    def take(self, name: str, kind: Any, default: Any = None, ours: str = "") -> Any:
        """One value, of a `Row.kind`, within the limits of a field of ours; None where file and default have none."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(kind, dict):
            for theirs, found in kind.items():
                if theirs == value and isinstance(value, bool) == isinstance(theirs, bool):
                    return found
            raise self.refusal(name, f"one of {', '.join(map(str, kind))}")
        where = f"{self.where}{name}"
        if kind == PAIR and isinstance(value, dict) and {"height", "width"} <= value.keys():
            value = [value["height"], value["width"]]
        elif get_origin(kind) is tuple and not isinstance(value, list):
            value = [conform(get_args(kind)[0], value, where)] * len(get_args(kind))
        value = conform(kind, value, where)
        if kind is str and len(value) > MOST_CHARACTERS:
            raise self.refusal(name, f"a text of at most {MOST_CHARACTERS} characters")
        if kind is not str and (limits := _limits_beyond(value, ours)):
            raise self.refusal(name, limits)
        return value

    def read(self, rows: Iterable[Row], known: Mapping[str, Any], channels: int = 0) -> dict[str, Any]:
        """Our fields of a table; of those that neither the file nor a default has, what is known of them beforehand."""
        fields = dict(known)
        for row in rows:
            kind = row.kind
            if kind == PER_CHANNEL:
                # Libraries keep the three of RGB in files of models that take other channels.
                stated = self.get(row.theirs, row.default)
                count = 3 if isinstance(stated, list) and len(stated) == 3 else channels
                kind = GenericAlias(tuple, (float,) * count)
            value = self.take(row.theirs, kind, row.default, row.ours)
            if value is not None:
                fields[row.ours] = value
        return fields


def _limits_beyond(value: Any, ours: str) -> str:
    """The limits of a field of ours, if a value, or one of several, is beyond them."""
    least, most = _LEAST.get(ours, 0), _MOST.get(ours, 2**16)
    within = all(least <= x <= most for x in (value if isinstance(value, tuple) else (value,)))
    return "" if within else f"from {least} to {most}"


def write_rows(rows: Iterable[Row], fields: Mapping[str, Any], known: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The inverse of `JsonObject.read`: what a file says of our fields, but for those that are as known beforehand.

    Raises:
        ValueError: a value is beyond what is read.
    """
    said = {}
    for row in rows:
        value = fields[row.ours]
        if not isinstance(row.kind, dict) and value is not None and (limits := _limits_beyond(value, row.ours)):
            raise ValueError(f"{row.theirs} is {reprlib.repr(value)}, and must be {limits} to be written")
        if row.ours in known and known[row.ours] == value:
            continue
        if isinstance(row.kind, dict):
            theirs = next((theirs for theirs, ours in row.kind.items() if ours == value), None)
            if theirs is None:
                raise ValueError(f"{row.theirs} has no word for {row.ours}={value!r}")
            value = theirs
        elif isinstance(value, tuple):
            value = value[0] if row.kind == PAIR and value[0] == value[1] else list(value)
        said[row.theirs] = value
    return said


def check_unchanged(config: JsonObject) -> None:
    """Raises ValueError if a config.json describes a model that was changed after it was built."""
    for name in ("quantization_config", "pruned_heads"):
        if config.get(name):
            raise config.unknown(name)


def check_fixed(config: Config, library: str, fixed: Mapping[str, Any]) -> None:
    """Raises ValueError at the first field that is not as a library has it in all its models."""
    for name, wanted in fixed.items():
        if (value := getattr(config, name)) != wanted:
            raise ValueError(f"{library} cannot hold {name}={value!r}, only {name}={wanted!r}")


def mlp_ratio_for(dim: int, hidden: int) -> float:
    """The `Config.mlp_ratio` by which an MLP has exactly so many channels within."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)

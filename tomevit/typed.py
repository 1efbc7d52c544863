"""Values checked against what a dataclass's fields are annotated with, and made plain: for configs, cards and JSON."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

#: Of a JSON text, at most: a checkpoint's files name far fewer, and each takes up to a few hundred bytes of memory.
MOST_VALUES = 2**19
_PLAIN = {bool: "True or False", int: "an int", float: "a finite number", str: "a text"}


def parse_json(
    content: bytes | str,
    *,
    make_object: Callable[[list[tuple[str, Any]]], Any] | None = None,
    make_constant: Callable[[str], Any] | None = None,
) -> Any:
    """What a JSON text says, in work and memory that are in proportion to it.

    Args:
        content: of a few MB at most; the caller bounds it.
        make_object, make_constant: as `json.loads` takes them: `object_pairs_hook`, and `parse_constant` for NaN.

    Raises:
        ValueError: it is not JSON, or nested too deep, or has more than `MOST_VALUES` values.
    """
    text = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        return json.loads(content, object_pairs_hook=make_object, parse_constant=make_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def normalise_fields(instance: Any) -> None:
    """Make the fields of a frozen dataclass what they are annotated with: for its `__post_init__`.

    Raises:
        ValueError: as `conform`; the message begins with the field's name.
    """
    for name, kind in field_kinds(instance.__class__).items():
        object.__setattr__(instance, name, conform(kind, getattr(instance, name), name))


def conform(kind: Any, value: Any, where: str) -> Any:
    """A value as an annotation asks for it, in plain Python: numpy's numbers become int and float, lists tuples, and
    dicts dataclasses.

    Args:
        kind: bool, int, float, str, a tuple, a Literal, a dataclass, a function, or one of several of these.
        value: of Python's, of numpy's, or of JSON.
        where: what to call it in a message.

    Raises:
        ValueError: it is something else; the message says where, what it is, and what it must be.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        kinds = [one for one in args if one is not NoneType]
        for one in kinds[:-1]:
            try:
                return conform(one, value, where)
            except ValueError:
                continue
        return conform(kinds[-1], value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        return _tuple(args, value, where)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return str(value)
        raise ValueError(f"{where} is {reprlib.repr(value)}, and must be one of {', '.join(args)}")
    if kind in _PLAIN:
        plain = _plain(kind, value)
        if plain is not None:
            return plain
    elif kind is Any or (origin is Callable and callable(value)):
        return value
    wanted = _PLAIN.get(kind, "a function")
    raise ValueError(f"{where} is {reprlib.repr(value)}, and must be {wanted}")


def _plain(kind: type, value: Any) -> bool | int | float | str | None:
    """A value as bool, int, float or str; None if it is no such thing."""
    truth = isinstance(value, bool) or (type(value).__module__, type(value).__name__.rstrip("_")) == ("numpy", "bool")
    if kind is bool:
        return bool(value) if truth else None
    if kind is str:
        return value if isinstance(value, str) else None
    if truth or not isinstance(value, Integral if kind is int else Real) or not _is_finite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {reprlib.repr(value)}, and must be a {kind.__name__}")
    known = field_kinds(kind)
    if unknown := [name for name in value if name not in known]:
        raise ValueError(f"{where} has {reprlib.repr(unknown[0])}, and no {kind.__name__} has")
    return kind(**{name: conform(known[name], part, f"{where}.{name}") for name, part in value.items()})


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{where} is {reprlib.repr(value)}, and must be a list")
    each = kinds[:1] * len(value) if kinds[-1] is ... else kinds
    if len(each) != len(value):
        raise ValueError(f"{where} is {reprlib.repr(value)}, and must have {len(each)} values")
    return tuple(conform(one, part, f"{where}[{i}]") for i, (one, part) in enumerate(zip(each, value, strict=True)))


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond any float
        return False


@cache
def field_kinds(kind: type) -> dict[str, Any]:
    """What the fields of a dataclass are annotated with."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}

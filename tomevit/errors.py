"""What can go wrong with weights, beside wrong arguments (ValueError), and how messages name choices."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Callable, Iterable
from importlib import import_module
from types import UnionType
from typing import Any


class CheckpointError(ValueError):
    """A file is damaged, hostile, or not what it was taken for. Nothing of it was loaded, nothing written."""


class UnreadableError(CheckpointError):
    """A file is damaged, hostile, or no checkpoint, whatever the user says of it."""


class MissingOptionError(CheckpointError):
    """A file can be read, if the user says one thing more.

    Attributes:
        option: what to say: "format", "model", "key", "prefix" or "num_classes".
    """

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


class AmbiguousCheckpointError(MissingOptionError):
    """A file can be read in several ways, and only the user knows which is meant.

    Attributes:
        choices: the values that the option can have.
    """

    def __init__(self, message: str, option: str, choices: list[str]) -> None:
        super().__init__(message, option)
        self.choices = choices


class NotRegularFileError(OSError):
    """What should be read is a pipe, a device or a socket: it may wait for ever, or have no end."""


class DownloadError(OSError):
    """A file could not be had, from the network or from the cache."""


class ImageError(ValueError):
    """A file is no image, or a damaged one, or cannot be read.

    Attributes:
        path: the file.
        reason: what is wrong with it, without its name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives the way from a worker process
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class UploadError(OSError):
    """A model could not be brought to the hub: it cannot be reached, or refuses."""


class OutputError(OSError):
    """A result cannot be written: the disk is full, or nothing may be written there. Nothing was."""

    def __init__(self, number: int, path: str | os.PathLike[str]) -> None:
        super().__init__(number, os.strerror(number), os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"

    def __reduce__(self) -> tuple[type[OutputError], tuple[int | None, str]]:
        return OutputError, (self.errno, self.filename)


class OtherProcessError(ValueError):
    """What is wrong, in one of several processes that need not say so: another does."""


def import_extra(module: str, what: str) -> Any:
    """A module of a package that only training needs.

    Args:
        what: needs it, in the plural.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, of one that was built for another torch
        package = {"sklearn": "scikit-learn"}.get(found := module.partition(".")[0], found)
        if isinstance(error, ModuleNotFoundError):
            raise ValueError(f"{what} need {package}: pip install 'tomevit[train]'") from error
        raise ValueError(
            f"{what} need {package}, and the one that is installed cannot be imported ({str(error).splitlines()[0]}): "
            f"install one that is built for this torch, as pip install --force-reinstall torch {package} does"
        ) from error


def why_no_device(error: BaseException) -> str:
    """Why torch has no such device, in a clause; "": what it says is of its operators."""
    why = str(error).splitlines()[0]
    return "" if "Could not run 'aten::" in why else f": {why}"


def join_with_or(names: Iterable[str]) -> str:
    """Names as "a, b or c"; there must be one at least."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def check_type(name: str, value: object, kinds: type | UnionType | tuple[type, ...], right: str) -> None:
    """Raises ValueError, in a sentence, unless an argument is of one of these kinds.

    Args:
        name: the argument's.
        value: what was given.
        kinds: as `isinstance` takes them.
        right: what it must be, in words.
    """
    if not isinstance(value, kinds):
        plain = value is None or isinstance(value, str | bytes | int | float)
        given = reprlib.repr(value) if plain else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {given}, and must be {right}")


def check_path(name: str, value: object, right: str = "a path") -> None:
    """Raises ValueError, in a sentence, unless an argument names a file."""
    check_type(name, value, (str, os.PathLike), right)


def printable(text: str, shown: Callable[[str], bool] = str.isprintable) -> str:
    """A text from a file as a terminal may have it: line breaks, control characters and the like are escaped.

    Args:
        shown: whether a character can be as it is.
    """
    if all(map(shown, text)):
        return text
    return "".join(c if shown(c) else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The known names that a wrong one may have meant, whatever its case, as a question; or what to say instead."""
    by_lower = {one.lower(): one for one in reversed(list(known))}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f"did you mean {join_with_or(by_lower[one] for one in near)}?" if near else otherwise

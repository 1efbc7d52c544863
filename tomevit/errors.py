"""What can go wrong with weights, beside wrong arguments (ValueError), and how messages name choices."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A file is damaged, hostile, or not what it was taken for. Nothing of it was loaded, nothing written."""


class AmbiguousCheckpointError(CheckpointError):
    """A file can be read in several ways, and only the user knows which is meant.

    Attributes:
        option: what to say: "format", "model" or "key".
        choices: the values it can have.
    """

    def __init__(self, message: str, option: str, choices: list[str]) -> None:
        super().__init__(message)
        self.option = option
        self.choices = choices


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


def either(names: Iterable[str]) -> str:
    """Names as "a, b or c"; there must be one at least."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The known names that a wrong one may have meant, as a question; or else what to say instead."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {either(near)}?" if near else otherwise


#: What a terminal would obey rather than show, by its category: control characters, and what ends a line.
_OBEYED = ("Cc", "Zl", "Zp")
#: What turns the direction of writing, and so may show a name as another.
_TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """Text from a file, a name say, as a terminal can show it in one line: what it would obey stands as an escape.

    What cannot be encoded, as a byte of a file's name that is no UTF-8, becomes U+FFFD.
    """
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    if category in _OBEYED or character in _TURNING:
        return character.encode("unicode_escape").decode("ascii")
    return character

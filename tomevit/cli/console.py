"""What commands say, whoever reads it: a terminal, which names must not command, or a pipe, in any encoding.

Commands print by `echo`. All else that is printed while one runs, such as warnings and progress, goes by the same
streams, those of `open_console`.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from tomevit.errors import OutputError, printable

#: What our own signs are where an encoding has none of them.
STAND_INS = {"→": "->", "×": "x", "…": "...", "–": "-", "—": "-", "²": "2", "√": "sqrt "}
_ERRORS = "tomevit.stand_in"  # the name under which Python's codecs know `_stand_in`


def echo(*lines: str, err: bool = False) -> None:
    """Print lines. On a terminal each is one, whatever it has; elsewhere names of files are as they are on disk.

    Raises:
        OutputError: standard output takes no more.
    """
    stream = sys.stderr if err else sys.stdout
    shown = map(printable, lines) if is_terminal(stream) else lines
    stream.write("".join(f"{line}\n" for line in shown))
    stream.flush()


def echo_json(value: Any) -> None:
    """Print what JSON has, indented; it is ASCII."""
    echo(*json_lines(value))


def json_lines(value: Any) -> list[str]:
    """What JSON has, indented, line by line."""
    return json.dumps(value, indent=2).splitlines()


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError, OSError):  # it is closed, or another program's
        return False


@contextmanager
def open_console() -> Iterator[None]:
    """Standard input, output and error for a command, whatever this process was given; as before, afterwards.

    Those that are closed are there, and lead nowhere: a file that is opened could take their numbers.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    opened = [_null(mode) if stream is None else None for stream, mode in zip(before, "rww", strict=True)]
    there = [cast(TextIO, stream or null) for stream, null in zip(before, opened, strict=True)]
    out, err = Console(there[1], "standard output"), Console(there[2], None)
    sys.stdin, sys.stdout, sys.stderr = there[0], cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        for console in (err, out):  # they may be of one stream
            console.hand_back()
        sys.stdin, sys.stdout, sys.stderr = before
        for null in filter(None, opened):
            null.close()


def _null(mode: str) -> TextIO:
    return cast(TextIO, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123


class Console:
    """A stream that refuses no character, and on a terminal lets none through that moves the cursor or hides others.

    It has no `buffer`, by which click would go round it where the encoding is ASCII.

    Args:
        stream: the one behind it.
        name: of what must not get lost; None: what cannot be written is left out, such as a warning.
    """

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream, self._name = stream, name
        self._terminal = is_terminal(stream)
        self._failed = False
        self._errors = getattr(stream, "errors", None)
        self._reconfigure(_ERRORS)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._terminal:
            # A progress bar begins at the left of its line anew; a carriage return within a line is of a name.
            rest = text.lstrip("\r")
            text = text[: len(text) - len(rest)] + "\n".join(map(printable, rest.split("\n")))
        with self._explained():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._explained():
            self._stream.flush()

    def hand_back(self) -> None:
        """Leave the stream as it was; if it cannot be written to, what it still holds is given up."""
        with suppress(OSError, ValueError):
            self._stream.flush()
        if self._failed and self._stream in (sys.__stdout__, sys.__stderr__):
            # Python would write it at its end, and say that it cannot.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        self._reconfigure(self._errors)

    def _reconfigure(self, errors: str | None) -> None:
        if errors is not None and hasattr(self._stream, "reconfigure"):
            with suppress(OSError, ValueError):
                self._stream.reconfigure(errors=errors)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._failed = True
            if self._name is not None:
                raise OutputError(getattr(error, "errno", None) or errno.EBADF, self._name) from error


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for a character that the encoding has not: of a file's name that is no text, its very byte."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff" and not error.encoding.lower().startswith(("utf-16", "utf-32")):
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return STAND_INS.get(char) or printable(char.encode("ascii", "backslashreplace").decode()), error.start + 1


codecs.register_error(_ERRORS, _stand_in)

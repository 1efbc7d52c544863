"""Files that are to be read: regular ones, that neither wait for a writer nor have no end, opened once.

What was looked at is what is read: whoever checks a file reads on in the same open file, and asks it for its size.
"""

from __future__ import annotations

import io
import os
import stat
from os import PathLike
from pathlib import Path

from tomevit.errors import NotRegularFileError, check_path

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def open_file(path: str | PathLike[str]) -> io.BufferedReader:
    """A regular file, or a link to one, open for reading; a pipe, a device or a socket is never waited for.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it is not ours to read.
        NotRegularFileError: it is a pipe, a device or a socket.
    """
    check_path("path", path)
    path = os.fspath(path)
    mode = Path(path).stat().st_mode  # a device may act when it is opened
    _check(path, mode)
    opened = io.FileIO(path, opener=lambda name, _: os.open(name, _FLAGS))  # which keeps its name
    file: io.BufferedReader = io.BufferedReader(opened)
    try:
        _check(path, os.fstat(file.fileno()).st_mode)  # another may lie there by now
    except OSError:
        file.close()
        raise
    return file


def read_small_file(path: str | PathLike[str], most: int = 2**26) -> bytes:
    """The content of a file that people write or read: a list, a report, a configuration.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: as `open_file`.
        ValueError: it has more.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{os.fspath(path)} has more than {most:,} bytes, which no such file has")
    return content


def special_kind(mode: int) -> str:
    """What is no regular file, by its mode, as in "a pipe"."""
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def _check(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a directory, not a file")
    if not stat.S_ISREG(mode):
        raise NotRegularFileError(f"{path} is {special_kind(mode)}, not a regular file")

"""What lies under a file's name and is no file: opening it waits for ever, or reading it never ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest


def _socket(path: Path) -> None:
    # Its address is bounded: it is bound from within the folder, under the name alone.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)


#: By what they are called in messages; each makes one at a path.
SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _socket,
}
each_special = pytest.mark.parametrize("special", SPECIAL)

"""A real pseudo-terminal, at which commands of this process print."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
import threading

import pytest

from tomevit import cli


def run_at_terminal(*arguments: str, encoding: str = "utf-8", columns: int = 80) -> tuple[int, str]:
    """Exit status of `tomevit ARGUMENTS`, and all that its terminal got."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 2**16):
                shown.append(data)
        except OSError:  # Linux says so that nobody writes any longer
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", encoding=encoding, closefd=True) as terminal:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert (sys.stdout, sys.stderr) == (terminal, terminal)
        assert terminal.errors == "strict"
    reader.join()
    os.close(ours)
    status = stop.value.code or 0
    assert isinstance(status, int)
    return status, b"".join(shown).decode(encoding, "surrogateescape").replace("\r\n", "\n")


def rendered(shown: str) -> list[str]:
    """The lines that are left to see of what a terminal got: a carriage return goes back, and what follows covers."""
    lines = []
    for line in shown.split("\n"):
        left = ""
        for part in line.split("\r"):
            left = part + left[len(part) :]
        lines.append(left.rstrip())
    return lines

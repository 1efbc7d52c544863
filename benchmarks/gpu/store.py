"""What was measured so far: a file of rows for each setting, which holds every row from the moment that it is there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tomevit.measure.timing import environment
from tomevit.output import new_file
from tomevit.version import __version__

ROWS = "rows.jsonl"
PACKAGES = ("timm", "triton", "onnxruntime")


def setting_of(device: torch.device, *, small: bool) -> dict[str, str]:
    """Device, driver and versions: figures of another setting are not compared with these."""
    found = environment(device) | {"tomevit": __version__}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "driver": _driver()}
    found |= {name: _version_of(name) for name in PACKAGES}
    return found | ({"size": "small, to try the programme: no figures"} if small else {})


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.strip().partition("\n")[0] or "unknown"


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


class Store:
    """The rows of one setting, in a folder of their own.

    rows.jsonl has the setting in its first line, and in each other one what became of a row: `key`, `status` (done,
    failed, skipped, or unfinished: time ended while it was measured), `took` seconds, `reason`, and what was measured.
    """

    def __init__(self, folder: Path, setting: dict[str, str]) -> None:
        self.folder = folder
        self.setting = setting
        self.rows: dict[str, dict[str, Any]] = {}
        if (folder / ROWS).exists():
            _, *rows = _read(folder / ROWS)
            self.rows = {row["key"]: row for row in rows}

    def put(self, row: dict[str, Any]) -> None:
        """Store a row, in place of an earlier one of its key; whoever kills the process later takes nothing away."""
        self.rows[row["key"]] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        with new_file(self.folder / ROWS) as unfinished:
            lines = [json.dumps(each) for each in ({"setting": self.setting}, *self.rows.values())]
            unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


def open_store(out: Path, setting: dict[str, str]) -> tuple[Store, str]:
    """The store of a setting: in `out` itself, or in `out`/2, `out`/3, … if others have their rows there.

    Returns:
        The store, and a sentence on why it is another folder, or "".
    """
    told = ""
    for folder in _folders(out):
        theirs = _read(folder / ROWS)[0]["setting"] if (folder / ROWS).exists() else setting
        if theirs == setting:
            return Store(folder, setting), told and f"{told}: these go to {folder}"
        other = next(name for name in {**theirs, **setting} if theirs.get(name) != setting.get(name))
        told = f"{folder} has rows of {other} {theirs.get(other)}, and this is {setting.get(other)}"
    raise AssertionError


def _folders(out: Path) -> Iterator[Path]:
    yield out
    number = 2
    while True:
        yield out / str(number)
        number += 1


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""What a search has measured so far, and the file that keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tomevit.output import check_output, is_stream, new_file
from tomevit.tasks.tune.front import SCHEMA, Front, read_json
from tomevit.typed import conform


class Moved(NamedTuple):
    """How a schedule's answers differ from those of r = 0, on the mean over some images."""

    drift: float  # KL divergence in nats; without a head 1 less the cosine
    agreement: float  # per cent of equal classes; without a head the cosine, in per cent
    top1: float | None  # per cent of right classes, where there are labels


@dataclass
class Record:
    """All that was measured; of one setting."""

    setting: dict[str, Any]
    path: Path | None = None
    blocks: list[list[Any]] = field(default_factory=list)  # the fields of each BlockRun, and its seconds
    whole: float | None = None  # seconds of a forward that merges nothing
    search: dict[str, Moved] = field(default_factory=dict)  # by r in JSON
    held_back: dict[str, Moved] = field(default_factory=dict)
    forwards: dict[str, list[float]] = field(default_factory=dict)  # by r in JSON, seconds round by round
    front: Front | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, setting: dict[str, Any]) -> Record:
        """What a file has of an earlier call with the same setting; where there is none yet, an empty record.

        Raises:
            ValueError: the file is something else, or of another setting; the message says in what.
            OSError: it cannot be read, or written.
        """
        if path is None:
            return cls(setting)
        path = check_output(path, endings=(".json",), writable=True)
        if is_stream(path):
            raise ValueError(
                f"{path} is a pipe or device, and a search goes on from a file: name one, as in front.json"
            )
        if not path.exists():
            return cls(setting, path)
        data = read_json(path)
        if isinstance(data, dict) and isinstance(data.get("setting"), dict) and data.get("schema") == SCHEMA:
            _check_same(path, data["setting"], setting)
        if not isinstance(data, dict) or data.get("finished") is not False:
            return cls(setting, path, front=Front.from_json(data, os.fspath(path)))
        try:
            measured = data["measured"]
            record = cls(setting, path)
            record.whole = conform(float | None, measured["whole"], "measured.whole")
            kinds = tuple[int, int, str | None, bool, float]
            record.blocks = [list(conform(kinds, run, "measured.blocks")) for run in measured["blocks"]]
            moved = tuple[float, float, float | None]
            record.search, record.held_back = (
                {r: Moved(*conform(moved, each, f"measured.{part}")) for r, each in measured[part].items()}
                for part in ("search", "held_back")
            )
            times = tuple[float, ...]
            record.forwards = {
                r: list(conform(times, each, "measured.forwards")) for r, each in measured["forwards"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): name another file") from error
        return record

    def write(self) -> None:
        """Put what is known into the file, if there is one."""
        if self.path is None:
            return
        if self.front is not None:
            self.front.save(self.path)
            return
        names = ("blocks", "whole", "search", "held_back", "forwards")
        measured = {name: getattr(self, name) for name in names}
        content = {"schema": SCHEMA, "finished": False, "setting": self.setting, "measured": measured}
        with new_file(self.path, endings=(".json",)) as draft:
            draft.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _check_same(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError where two settings differ."""
    theirs, ours = (setting | setting.get("images", {}) for setting in (theirs, ours))
    what = {"sha256": "images", "weights": "weights", "labels": "labels"}  # digests, which nobody reads
    for name, value in ours.items():
        if name == "images" or theirs.get(name) == value:
            continue
        if name in what:
            raise ValueError(f"{path} was measured with other {what[name]}: name another file")
        raise ValueError(
            f"{path} was measured with {name} = {theirs.get(name)!r}, and this call has {value!r}: name another file"
        )

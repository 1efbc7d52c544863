"""The table on docs/promises.md is what the tests of faults found."""

from __future__ import annotations

import json
from importlib import import_module

from tests.outcomes import Fault, rows_of
from tests.project.test_docs import ROOT

STORED = json.loads((ROOT / "docs" / "promises.json").read_text(encoding="utf-8"))


def rows_of_tests() -> set[Fault]:
    """What the tests say that they try, but those that `make soak` alone runs."""
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "survives" in file.read_text(encoding="utf-8")]
    found: set[Fault] = set()
    for file in files:
        module = import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        everywhere = getattr(module, "pytestmark", [])
        for name, test in vars(module).items():
            if name.startswith("test_"):
                marks = [
                    *(everywhere if isinstance(everywhere, list) else [everywhere]),
                    *getattr(test, "pytestmark", []),
                ]
                if "soak" not in {mark.name for mark in marks}:
                    found |= {
                        row for row in rows_of(getattr(mark, "mark", mark) for mark in marks) if isinstance(row, Fault)
                    }
    return found


def test_every_fault_has_its_row() -> None:
    assert {Fault(row["kind"], row["how"], row["promise"]) for row in STORED} == rows_of_tests(), "stale: make faults"


def test_nothing_failed() -> None:
    assert {row["outcome"] for row in STORED} <= {"passed", "skipped"}
    assert all(row["why"] for row in STORED if row["outcome"] == "skipped")


def test_the_page_shows_every_row() -> None:
    shown = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    assert [row["how"] for row in STORED if f"| {row['how']} | {row['promise']} | " not in shown] == []

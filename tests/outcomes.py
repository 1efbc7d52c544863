"""What a test tries, as a row of a table in docs/, and what came of it when it ran.

`--store FILE` writes the rows of all tests that run, for docs/tables.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from packaging.version import Version


class Client(NamedTuple):
    """Of docs/works_with.md."""

    package: str  # as it is called where it is installed from
    tried: str


class Fault(NamedTuple):
    """Of docs/promises.md."""

    kind: str  # one of KINDS
    how: str  # what is done to tomevit: "a pipe, a device or a socket with an image's name"
    promise: str  # what it does then: "is no image: passed over in a folder, refused by name, never waited for"


#: What faults are of, in the order of docs/promises.md.
KINDS = ("images", "checkpoints", "cache and network", "machine", "text from files")

Row = Client | Fault
ROWS: dict[str, type[Row]] = {"clients": Client, "faults": Fault}  # by the name of the mark


def works_with(package: str, tried: str) -> pytest.MarkDecorator:
    """Of a test: the package that it is skipped without, and what it tries. Tests with the same two are one row."""
    return pytest.mark.clients(package, tried)


def survives(kind: str, how: str, promise: str) -> pytest.MarkDecorator:
    """Of a test: the fault that it makes, and what is promised then. Tests with the same three are one row."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {KINDS}")
    return pytest.mark.faults(kind, how, promise)


def rows_of(marks: Iterable[pytest.Mark]) -> list[Row]:
    return [ROWS[mark.name](*mark.args) for mark in marks if mark.name in ROWS and mark.args]


class Outcome(NamedTuple):
    outcome: str  # passed, failed, skipped, or xfailed: known not to work
    why: str

    @classmethod
    def of(cls, report: pytest.TestReport) -> Outcome:
        if hasattr(report, "wasxfail"):
            return cls("xfailed" if report.skipped else "failed", report.wasxfail)
        return cls(report.outcome, "" if report.passed else str(report.longrepr).strip().splitlines()[-1])

    @classmethod
    def worst(cls, outcomes: Sequence[Outcome]) -> Outcome:
        return min(outcomes, key=lambda each: ("failed", "xfailed", "skipped", "passed").index(each.outcome))


class Store:
    """Writes what came of the tests that ran, in whichever process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Row, list[Outcome]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            for name, value in report.user_properties:
                if name == "row":
                    mark, *args = cast("list[str]", value)
                    self.outcomes.setdefault(ROWS[mark](*args), []).append(Outcome.of(report))

    def pytest_sessionfinish(self) -> None:
        found = [
            self._described(row) | {"tests": len(outcomes)} | Outcome.worst(outcomes)._asdict()
            for row, outcomes in sorted(self.outcomes.items())
        ]
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def _described(row: Row) -> dict[str, Any]:
        return row._asdict() | ({"version": version_of(row.package)} if isinstance(row, Client) else {})


def version_of(package: str) -> str | None:
    try:
        return Version(version(package)).public
    except PackageNotFoundError:
        return None

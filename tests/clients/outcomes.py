"""What a test with another package tried, and what came of it: a row of the table on docs/works_with.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    package: str  # as it is called where it is installed from
    tried: str


def works_with(package: str, tried: str) -> pytest.MarkDecorator:
    """Of a test: the package that it is skipped without, and what it tries. Tests with the same two are one row."""
    return pytest.mark.clients(package, tried)


def rows_of(marks: Iterable[pytest.Mark]) -> list[Row]:
    return [Row(*mark.args) for mark in marks if mark.args]


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

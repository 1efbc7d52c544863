"""The table on docs/works_with.md is what the tests with other packages found."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

from tests.outcomes import Client, Row, rows_of
from tests.project.test_docs import ROOT

STORED = json.loads((ROOT / "docs" / "works_with.json").read_text(encoding="utf-8"))


def rows_of_tests() -> set[Row]:
    """What the tests say that they try. They import the packages only when they run."""
    files = (ROOT / "tests" / "clients").glob("test_*.py")
    modules = [import_module(f"tests.clients.{file.stem}") for file in files]
    marks = [mark for module in modules for test in vars(module).values() for mark in getattr(test, "pytestmark", [])]
    return set(rows_of(mark for mark in marks if mark.name == "clients"))


def test_every_trial_has_its_row() -> None:
    assert {Client(row["package"], row["tried"]) for row in STORED} == rows_of_tests(), "stale: make clients"


def test_nothing_failed_or_was_left_out() -> None:
    assert {row["outcome"] for row in STORED} <= {"passed", "xfailed"}
    assert all(row["why"] for row in STORED if row["outcome"] == "xfailed")


def test_versions_are_those_that_make_clients_installs() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-clients.txt"))
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    assert {row["package"]: row["version"] for row in STORED if row["package"] not in pinned} == {}
    assert {row["package"]: row["version"] for row in STORED} == {
        row["package"]: pinned[row["package"]] for row in STORED
    }


def test_the_page_shows_every_row() -> None:
    shown = (ROOT / "docs" / "works_with.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (?:yes|no) \| ([^|]+) \| ", shown, re.MULTILINE)
    assert rows == [row["tried"] for row in STORED]


def test_only_make_clients_runs_them() -> None:
    options = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "-m 'not site and not clients and not soak'" in options
    assert re.search(
        r"^clients:.*\n\t.*-m clients tests/clients --store docs/works_with.json$",
        Path(ROOT / "Makefile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )

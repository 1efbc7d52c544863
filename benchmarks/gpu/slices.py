"""A plugin for pytest that runs tests in slices: it goes on where the last one ended, and stops when its time is over.

`device_tests` starts pytest with it, and tells it in the environment variable SLICE, as JSON: `records`, a file of what
became of each test; `slice`, a name of this slice; and `seconds`, how long it may take.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

SLICE = "TOMEVIT_GPU_SLICE"


def read_records(path: Path) -> list[dict[str, Any]]:
    """`test`, `slice`, `outcome` (started, passed, failed, skipped) and `seconds`, in the order in which they came."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the process was killed while it wrote this line
            continue
    return found


class Slices:
    """The plugin's hooks, for one run."""

    def __init__(self, path: Path, name: str, seconds: float) -> None:
        self.path, self.name = path, name
        self.end = time.monotonic() + seconds
        self.session: pytest.Session | None = None
        self.parent = os.getppid()
        self.outcome, self.seconds, self.lost = "passed", 0.0, False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Before the tests are collected."""
        self.session = session

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed, and what this slice has tried; what went wrong before comes last."""
        records = read_records(self.path)
        over = {each["test"] for each in records if each["outcome"] == "passed" or each["slice"] == self.name}
        last = {each["test"]: each["outcome"] for each in records}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in over])
        items[:] = sorted(
            (item for item in items if item.nodeid not in over),
            key=lambda item: last.get(item.nodeid) in ("started", "failed"),
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Of a test that ends the process this record stays."""
        self.outcome, self.seconds = "passed", 0.0
        self._record(nodeid, "started", 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's setup, call and teardown."""
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome = report.outcome
        self.seconds += report.duration
        # After such an error every call in this process fails.
        self.lost = self.lost or (report.failed and "CUDA error" in report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """When a test is over."""
        self._record(nodeid, self.outcome, self.seconds)
        reasons = {
            "the device is lost": self.lost,
            "the time of this slice is over": time.monotonic() > self.end,
            "the process that started it was killed": os.getppid() != self.parent,
        }
        if self.session is not None and any(reasons.values()):
            self.session.shouldstop = next(reason for reason, holds in reasons.items() if holds)

    def _record(self, test: str, outcome: str, seconds: float) -> None:
        record = {"test": test, "slice": self.name, "outcome": outcome, "seconds": round(seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest."""
    told = json.loads(os.environ[SLICE])
    config.pluginmanager.register(Slices(Path(told["records"]), told["slice"], told["seconds"]))

"""What the tests with other packages share. They run by `make clients`, in an environment that has those packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

# Before anything else imports torchvision, which beside a CPU torch fails without this.
import benchmarks.peers  # noqa: F401
from tests.clients.outcomes import Outcome, Row, rows_of

OUTCOMES = pytest.StashKey[dict[Row, list[Outcome]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", type=Path, help="write the outcomes of the tests with other packages into this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clients")
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the packages' own


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    for row in rows_of(request.node.iter_markers("clients")):
        try:
            version(row.package)
        except PackageNotFoundError:
            pytest.skip(f"{row.package} is not installed")


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report = yield
    if call.when == "call" or report.outcome == "skipped":
        for row in rows_of(item.iter_markers("clients")):
            item.config.stash[OUTCOMES].setdefault(row, []).append(Outcome.of(report))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--store")
    if path is not None:
        found = [
            {"package": row.package, "version": _version(row.package), "tried": row.tried}
            | Outcome.of_all(outcomes)._asdict()
            for row, outcomes in session.config.stash[OUTCOMES].items()
        ]
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None

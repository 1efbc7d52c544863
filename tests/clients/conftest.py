"""What the tests with other packages share. They run by `make clients`, in an environment that has those packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

# Before anything else imports torchvision, which beside a CPU torch fails without this.
import benchmarks.peers  # noqa: F401
from tests.clients.outcomes import Outcome, Row, rows_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", type=Path, help="write the outcomes of the tests with other packages into this file")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--store")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Store(path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.user_properties += [("row", list(row)) for row in rows_of(item.iter_markers("clients"))]
            item.add_marker("clients")
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the packages' own


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    for row in rows_of(request.node.iter_markers("clients")):
        if version_of(row.package) is None:
            pytest.skip(f"{row.package} is not installed")


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)


class Store:
    """Writes what came of the tests that ran, in whichever process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Row, list[Outcome]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            for name, value in report.user_properties:
                if name == "row":
                    self.outcomes.setdefault(Row(*value), []).append(Outcome.of(report))

    def pytest_sessionfinish(self) -> None:
        found = [
            {"package": row.package, "version": version_of(row.package), "tried": row.tried}
            | Outcome.worst(outcomes)._asdict()
            for row, outcomes in sorted(self.outcomes.items())
        ]
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def version_of(package: str) -> str | None:
    try:
        return Version(version(package)).public
    except PackageNotFoundError:
        return None

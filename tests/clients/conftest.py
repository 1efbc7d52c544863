"""What the tests with other packages share. They run by `make clients`, in an environment that has those packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before anything else imports torchvision, which beside a CPU torch fails without this.
import benchmarks.peers  # noqa: F401
from tests.outcomes import Client, rows_of, version_of


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clients")
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the packages' own


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    for row in rows_of(request.node.iter_markers("clients")):
        if isinstance(row, Client) and version_of(row.package) is None:
            pytest.skip(f"{row.package} is not installed")


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    grad = torch.is_grad_enabled()
    yield
    torch.set_grad_enabled(grad)

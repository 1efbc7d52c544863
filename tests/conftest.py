from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.outcomes import ROWS, Store
from tests.server import ENVIRONMENT, Server

settings.register_profile("tomevit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tomevit")

#: This process's share: workers that run beside it have theirs.
THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--store", type=Path, help="write what came of the tests with rows (tests/outcomes.py) into a file"
    )


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--store")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Store(path))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [mark for mark in item.iter_markers() if mark.name in ROWS and mark.args]
        item.user_properties += [("row", [mark.name, *mark.args]) for mark in marks]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The models are tiny: on a busy machine threads that wait for each other cost ten times what they save.
    torch.set_num_threads(1)


@pytest.fixture
def all_threads() -> Iterator[None]:
    """For models at full size."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Hypothesis is called back by it, where Python swallows what torch's signal handler raises of a dead reader."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    """Caches of the test's own, and the server for a hub."""
    return {
        "TOMEVIT_HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
    }


@pytest.fixture
def set_environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Call it to change variables during a test: huggingface_hub reads them when it is imported."""
    import huggingface_hub.constants

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        importlib.reload(huggingface_hub.constants)

    for name in os.environ:
        if name.upper().startswith(ENVIRONMENT):
            monkeypatch.delenv(name)
    change(**environment)
    yield change
    monkeypatch.undo()
    importlib.reload(huggingface_hub.constants)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; they are cut short."""
    asked: list[float] = []
    sleep = time.sleep

    def nap(seconds: float) -> None:
        asked.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(time, "sleep", nap)
    return asked

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("tomevit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tomevit")

THREADS = torch.get_num_threads()


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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

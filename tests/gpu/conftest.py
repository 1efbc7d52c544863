"""What the tests on a device share.

They run without this project's other fixtures too: `python -m benchmarks.gpu` leaves those out, since they need
packages that may not be there.
"""

from __future__ import annotations

import os

import pytest
import torch

#: Another device to run the tests on, such as cpu, to try the tests themselves.
CHOSEN = os.environ.get("TOMEVIT_GPU_TESTS_DEVICE", "cuda")


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """The device that the test is about; without one it is skipped."""
    if CHOSEN == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    return torch.device(CHOSEN, torch.cuda.current_device()) if CHOSEN == "cuda" else torch.device(CHOSEN)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, for what a CPU does not have: graphs, memory of its own, several devices."""
    if device.type != "cuda":
        pytest.skip("of CUDA alone")
    return device

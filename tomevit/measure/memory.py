"""Batches that do not fit into memory, told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tomevit.private import lacks_memory


class BatchTooLargeError(ValueError):
    """A batch does not fit into the memory of its device."""


@contextmanager
def explain_out_of_memory(batch: int, device: torch.device) -> Iterator[None]:
    """Where torch runs out of memory, on a GPU or a CPU, the batch and the device are named.

    Args:
        batch: images in the call that the block makes.
        device: where it is made.

    Raises:
        BatchTooLargeError: in place of torch's own error. Other errors stay as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise BatchTooLargeError(f"a batch of {batch} does not fit into the memory of {device}") from error

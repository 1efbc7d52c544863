"""Processes that read images, and how what they read comes to the one that asked, whatever the machine has for it."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

log = logging.getLogger("tomevit")


def load_batches(
    dataset: Dataset[Any], workers: int, collate: Callable[[Any], Any] | None = None, **options: Any
) -> Generator[Any]:
    """The batches of a DataLoader, which are named tuples with tensors in them.

    Where the system has no semaphores for other processes, as without /dev/shm, this one reads.

    Args:
        dataset: what to read.
        workers: processes that read; 0: this one.
        collate: makes a batch of samples; None: they are batches.
        options: of the DataLoader.

    Raises:
        OSError: the system does not start so many processes.
    """
    try:
        multiprocessing.Semaphore()
    except (OSError, ImportError) as error:
        if workers:
            log.warning("images are read in one process, others cannot be started here: /dev/shm: %s", error)
        workers = 0
    # Torch draws a seed for the workers, on its default device. Nothing is random, so its generator is left alone.
    options |= {"generator": torch.Generator(), "collate_fn": partial(_collate_and_pack, collate)}
    loader = DataLoader(dataset, num_workers=workers, **options)
    try:
        with torch.device("cpu"):
            batches = iter(loader)
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread, which each process needs
        if workers and (isinstance(error, OSError) or "new thread" in str(error)):
            raise OSError(f"{workers} processes to read images cannot be started ({error}): ask for fewer") from error
        raise
    for batch in batches:
        arrays = {name: value for name, value in batch._asdict().items() if isinstance(value, np.ndarray)}
        yield batch._replace(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _collate_and_pack(collate: Callable[[Any], Any] | None, samples: Any) -> Any:
    """A batch as a process hands it over: in shared memory, or where that is full as arrays, which are copied.

    Torch itself would share it in a thread, whose failure nobody hears of: this process would wait for ever.
    """
    batch = collate(samples) if collate else samples
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    if get_worker_info() is None:
        return batch
    try:
        for tensor in tensors.values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return batch
    except RuntimeError:  # Docker's /dev/shm has 64 MB
        return batch._replace(**{name: tensor.numpy() for name, tensor in tensors.items()})

"""Batches that a device computes while the host reads the next and looks at the answers of the one before.

On a GPU the host only launches work, so that one batch may be in flight. On a CPU nothing would go on by itself: there
each batch is done before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from tomevit.measure import timing

B = TypeVar("B")
T = TypeVar("T")


def batches_in_flight(device: torch.device) -> int:
    """Batches that had better be launched before the answers of the one before them are read."""
    return 1 if device.type == "cuda" else 0


def launch_ahead(batches: Iterable[B], launch: Callable[[B], Callable[[], T]], *, in_flight: int) -> Iterator[T]:
    """The answers to batches, in order, each read when the next ones have been launched.

    Where a batch cannot be had or launched, those before it are answered first. An interrupt loses what is in flight.

    Args:
        batches: what to launch; one more than `in_flight` are in memory.
        launch: starts the work of a batch, and returns what waits for its answer.
        in_flight: batches that were launched and are not yet read; 0: each is read at once.
    """
    source = iter(batches)
    launched: list[Callable[[], T]] = []
    ended: Exception | None = None
    while ended is None or launched:
        try:
            if ended is None:
                launched.append(launch(next(source)))
        except (StopIteration, OSError, RuntimeError, ValueError) as error:
            ended = error
        if launched and (ended is not None or len(launched) > in_flight):
            yield launched.pop(0)()
    if not isinstance(ended, StopIteration):
        raise ended


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """A batch on its way to where the model is; from pinned memory to a GPU, so that the host goes on meanwhile."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)


def read_back(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Start to copy tensors of one device to the CPU, and return what waits until they are there.

    It waits for what was launched until now, and not for what is launched after.
    """
    if tensors[0].device.type != "cuda":
        copies = [tensor.cpu() for tensor in tensors]
        return lambda: copies
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[Tensor]:
        done.synchronize()
        return copies

    return wait


def launch_timed(call: Callable[[], T], device: torch.device) -> tuple[T, Callable[[], float]]:
    """What a call returns, and what says how many seconds of the device it took, once it is done."""
    if device.type != "cuda":
        result, seconds = timing.timed(call, device)
        return result, lambda: seconds
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record(stream)
    result = call()
    end.record(stream)

    def seconds_of_device() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return result, seconds_of_device

"""Several processes at one task, as torchrun starts them: who they are, and how they agree.

What they tell each other is small and in the CPU's memory, wherever they compute. Without a process group a process is
alone, and everything here is as if it were not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from tomevit.errors import OtherProcessError

T = TypeVar("T")


def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are in the group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def on_this_machine() -> tuple[int, int]:
    """As `processes`, among those on this machine, as torchrun says; (0, 1) where what is said cannot be."""
    rank, world = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    there = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
    return (int(rank), int(world)) if there else (0, 1)


@contextmanager
def join_process_group() -> Iterator[None]:
    """Be one of several processes while the block runs, if torchrun started this one.

    Raises:
        ValueError: what torchrun sets is there in part only.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    for variable in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not (value := os.environ.get(variable, "")).isdecimal():
            raise ValueError(
                f"{variable} is {value!r}, where torchrun sets a number: start this with torchrun, or unset "
                f"TORCHELASTIC_RUN_ID"
            )
    # The first process waits for the last, which may need hours longer.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def fail_together(call: Callable[[], T]) -> T:
    """What a call returns in this process. If it fails in any of them, it does in all.

    Raises:
        ValueError, NotImplementedError, OSError: in the first process, as the call; if it failed in others only, a
            ValueError that names one of them.
        OtherProcessError: in all others.
    """
    rank, world = processes()
    if world == 1:
        return call()
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(call())
    except (ValueError, NotImplementedError, OSError) as raised:
        error = raised
    said: list[str | None] = [None] * world
    dist.all_gather_object(said, None if error is None else str(error))
    failed = [number for number, message in enumerate(said) if message is not None]
    if failed and rank:
        raise OtherProcessError(said[failed[0]]) from error
    if failed:
        raise error or ValueError(f"process {failed[0]}: {said[failed[0]]}")
    return result[0]


def broadcast_from_rank0(call: Callable[[], T]) -> T:
    """What a call returns in the first process, in all of them; only there is it made. Raises: as `fail_together`."""
    rank, world = processes()
    if world == 1:
        return call()
    result: list[Any] = fail_together(lambda: [call() if rank == 0 else None])
    dist.broadcast_object_list(result, src=0)
    found: T = result[0]
    return found


def require_same(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, as `fail_together` does, if those of another process differ from those of the first."""
    first = broadcast_from_rank0(lambda: dict(settings))

    def compare() -> None:
        if wrong := [name for name in settings if settings[name] != first[name]]:
            raise ValueError(f"other {' and '.join(wrong)} than in the first process")

    fail_together(compare)


def wait_for_all() -> None:
    """Return when all processes are here.

    Raises:
        OtherProcessError: one of them ended instead.
    """
    if processes()[1] == 1:
        return
    try:
        dist.barrier()
    except RuntimeError as error:  # its connection is closed
        raise OtherProcessError("another process ended before its work was done") from error

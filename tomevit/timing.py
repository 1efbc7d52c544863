"""Timing that survives a noisy machine: candidates take turns, and medians are compared."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def interleave(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] | None = None,
) -> dict[Key, float]:
    """The median time of each candidate, in seconds.

    In every round each candidate runs once, so that whatever slows the machine for a while slows all of them. The
    order is drawn anew each round, since what ran before decides what memory is at hand.

    Args:
        candidates: what to time, without arguments.
        rounds: timed runs of each.
        warmup: untimed runs of each, before.
        device: waited for after every run.
        progress: called after every run, warm-up included.
    """
    draw = random.Random(0)
    seconds: dict[Key, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name in draw.sample(list(candidates), len(candidates)):
            _wait_for(device)
            start = time.perf_counter()
            candidates[name]()
            _wait_for(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
            if progress is not None:
                progress()
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wait_for(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a figure must be read with: device, threads, versions."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = {} if device.type != "cpu" else {"threads": str(torch.get_num_threads())}
    return {"device": name, **threads, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    """The processor, with the widest vector unit that torch uses, which decides more than the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"

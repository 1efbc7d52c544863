"""Timing that survives a noisy machine: candidates take turns, and medians are compared."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")
WARMUP = 2
RESAMPLES = 400


class Turn(NamedTuple, Generic[Key]):
    """One run of one candidate."""

    key: Key
    seconds: float
    counts: bool  # False: it was warm-up


class Quartiles(NamedTuple):
    """The middle of many times and their spread, in seconds: half of them lie between lower and upper."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Quartiles:
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
        return cls(lower, median, upper)


def ratio_interval(firsts: Sequence[Sequence[float]], second: Sequence[float]) -> tuple[float, float] | None:
    """Between what the least median(first) / median(second) lies, with 95 % confidence, as far as the rounds tell.

    By the bootstrap: rounds are drawn anew, the same for all, since what slowed one in a round may have slowed the
    others; and the first of the least median is chosen anew among those drawn.

    Args:
        firsts, second: times of candidates, round by round; of an unfinished last round some may be missing.

    Returns:
        None for fewer than 6 rounds: all of 5 are on one side of the true median once in 16 times.
    """
    rounds, draw = range(min(map(len, (*firsts, second)))), random.Random(0)
    if len(rounds) < 6:
        return None
    ratios = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(rounds, k=len(rounds))
        least, median = (
            min(statistics.median(times[i] for i in drawn) for times in each) for each in (firsts, [second])
        )
        ratios.append(least / median)
    ratios.sort()
    outside = RESAMPLES // 40
    return ratios[outside], ratios[-1 - outside]


def turns(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = WARMUP,
    device: torch.device | str = "cpu",
) -> Iterator[Turn[Key]]:
    """Every run of every candidate, as it ends.

    In every round each candidate runs once, so that whatever slows the machine for a while slows all of them. The
    order is drawn anew each round, since what ran before decides what memory is at hand.

    Args:
        candidates: what to time, without arguments.
        rounds: timed runs of each.
        warmup: runs of each before, which do not count.
        device: waited for after every run.
    """
    draw = random.Random(0)
    for turn in range(warmup + rounds):
        for key in draw.sample(list(candidates), len(candidates)):
            yield Turn(key, seconds(candidates[key], device), turn >= warmup)


def interleave(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = WARMUP,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] | None = None,
) -> dict[Key, float]:
    """The median time of each candidate, in seconds. Arguments as `turns`.

    Args:
        progress: called after every run, warm-up included.
    """
    times: dict[Key, list[float]] = {key: [] for key in candidates}
    for turn in turns(candidates, rounds=rounds, warmup=warmup, device=device):
        if turn.counts:
            times[turn.key].append(turn.seconds)
        if progress is not None:
            progress()
    return {key: statistics.median(found) for key, found in times.items()}


def seconds(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long a call takes, until the device has finished what it was given."""
    return timed(call, device)[1]


def timed(call: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, float]:
    """What a call returns, and how many seconds it takes, until the device has finished what it was given."""
    _wait_for(device)
    start = time.perf_counter()
    result = call()
    _wait_for(device)
    return result, time.perf_counter() - start


def seconds_of_host(call: Callable[[], object], device: torch.device | str) -> float:
    """How long a call keeps the host busy, which hands work to the device and does not wait for it."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    _wait_for(device)
    return taken


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

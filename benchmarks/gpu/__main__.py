"""Tests and figures on a GPU, as many as there are minutes; called again, it goes on where it ended.

    python -m benchmarks.gpu --minutes 9 --out build/gpu
    python -m benchmarks.gpu --minutes 9 --out build/gpu --part tables
    python -m benchmarks.gpu --out build/gpu --device cpu --small        # tries the programme itself, on a CPU

It needs a checkout, and of Python's packages what is there: torch and what tomevit needs; what else is missing it says
in one line, and goes on without. In the folder are then, all of them put in place whole:

    rows.jsonl    every row of the tables, from the moment that it was measured
    page.md       the tables: merge efficiency against the fastest unmerged model, and all else
    tests.jsonl   what became of each test; those that passed are not run again
    tests.txt     what pytest said

Another device or version has its own rows, in a folder within. A row is begun only if rows of its kind have taken less
time so far than is left; one that time ended in is tried again, once. docs/gpu.md has more.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device_tests
from benchmarks.gpu.page import write_page
from benchmarks.gpu.rows import Row, Skipped, clear, first_line, guess, is_lasting, key_of, model_of, queue
from benchmarks.gpu.store import Store, open_store, setting_of
from tomevit.output import new_file

if TYPE_CHECKING:
    from types import FrameType

#: Seconds that the page and the end of the process take.
RESERVE = 8.0
HELPFUL = ("pytest", "timm", "torchvision", "triton", "PIL", "onnx", "onnxscript", "onnxruntime")
#: What is not measured again.
OVER = ("done", "failed", "skipped")


class OutOfTimeError(BaseException):
    """Raised by an alarm in the midst of a row; no Exception, which torch's compiler would catch."""


class DeviceLostError(Exception):
    """The process can no longer use its device; another one can."""


def main() -> None:
    """See above."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="tests and figures on a GPU, in slices of some minutes")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which it has ended (default 9)")
    parser.add_argument("--out", type=Path, required=True, help="the folder; one that is there is gone on with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the programme")
    parser.add_argument("--part", choices=["tests", "tables", "page", "all"], default="all")
    parser.add_argument("--again", action="store_true", help="rows that failed or were skipped are measured anew")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: torch.cuda.is_available() is False")
    until = started + 60 * args.minutes - min(RESERVE, 6 * args.minutes)
    if args.small:
        torch.set_num_threads(1)
    prepare(device)
    store, told = open_store(args.out, setting_of(device, small=args.small))
    if told:
        print(told, flush=True)
    if missing := [name for name in HELPFUL if find_spec(name) is None]:
        print(f"not installed here, and gone on without: {', '.join(missing)}", flush=True)
    rows = queue(small=args.small)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        if args.part in ("tests", "all"):
            half = until if args.part == "tests" else (time.monotonic() + until) / 2
            print(device_tests.run_tests(store.folder, half), flush=True)
        if args.part in ("tables", "all"):
            print(run_rows(rows, store, device, until, small=args.small, again=args.again), flush=True)
    except DeviceLostError as error:
        print(f"{error}: going on in a new process", flush=True)
        put_page(store, rows)
        left = args.minutes - (time.monotonic() - started) / 60
        options = [*sys.argv[1:], "--part", "tables", "--minutes", f"{max(0.0, left):.3f}"]  # the last one counts
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *(o for o in options if o != "--again")])
    finally:
        put_page(store, rows)


def prepare(device: torch.device) -> None:
    """What every row finds."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from benchmarks import peers  # noqa: F401  # the way to import timm beside a CPU torch


def put_page(store: Store, rows: Sequence[Row]) -> None:
    """Write page.md, from all that is stored."""
    store.folder.mkdir(parents=True, exist_ok=True)
    page = write_page(store.setting, rows, store.rows, device_tests.told_of_tests(store.folder))
    with new_file(store.folder / "page.md") as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(f"written to {store.folder / 'page.md'}", flush=True)


def run_rows(
    rows: Sequence[Row], store: Store, device: torch.device, until: float, *, small: bool = False, again: bool = False
) -> str:
    """Measure what is not stored yet, in order, and store each row at once.

    Args:
        rows: the queue.
        store: where they go.
        device: to measure on.
        until: of time.monotonic(); a row that would take longer, as far as is known, is left for the next time.
        small: few rounds.
        again: those too that failed or were skipped.

    Returns:
        A sentence.

    Raises:
        DeviceLostError: after the row in which that happened was stored as failed.
    """
    over, left = ("done",) if again else OVER, 0
    for row in rows:
        key = key_of(row)
        before = store.rows.get(key, {"status": "", "tries": 0})
        if before["status"] in over:
            continue
        now = time.monotonic()
        if now + expected(row, store) > until:
            left += 1
            continue
        found: dict[str, Any] = {"key": key, "kind": row.kind, "tries": before["tries"] + 1, "reason": ""}
        lost = False
        try:
            with alarm(until - now):
                found |= row.measure(device, small=small) | {"status": "done"}
        except Skipped as reason:
            found |= {"status": "skipped", "reason": str(reason)}
        except OutOfTimeError:
            # Twice, the second time begun with as much time as it was known to need: it fits into no slice.
            status = "failed" if found["tries"] > 1 else "unfinished"
            found |= {"status": status, "reason": f"not finished in {time.monotonic() - now:.0f} s"}
        # Whatever goes wrong in a row, out of memory or in a compiler, the others are still to be measured.
        except Exception as error:
            found |= {"status": "failed", "reason": first_line(error)}
            lost = is_lasting(error)
        if found["status"] != "done":
            model_of.cache_clear()
        found["took"] = round(time.monotonic() - now, 2)
        store.put(found)
        print(f"{found['status']:10} {found['took']:7.1f} s  {key}  {found['reason']}", flush=True)
        if lost:
            raise DeviceLostError(found["reason"])
        if "torch._dynamo" in sys.modules or device.type == "cuda":
            clear()
    return f"{sum(key_of(row) in store.rows for row in rows)} of {len(rows)} rows are there" + (
        f"; {left} would take longer than is left" if left else ""
    )


def expected(row: Row, store: Store) -> float:
    """Seconds that a row may take: as long as the longest of its kind so far, or as it took when time ended in it."""
    alike = [each for each in store.rows.values() if each["kind"] == row.kind and each["status"] == "done"]
    longest = max((each["took"] for each in alike), default=guess(row.kind))
    before = store.rows.get(key_of(row))
    if before is not None and before["status"] == "unfinished":
        longest = max(longest, 1.5 * before["took"])
    return 1.1 * longest


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the block when so many seconds are over, where the system has such alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise OutOfTimeError

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

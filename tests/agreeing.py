"""Run by torchrun, in two processes: what each gets where they agree, and where they do not, one JSON file for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tomevit.data.distributed import (
    broadcast_from_rank0,
    fail_together,
    join_process_group,
    processes,
    require_same,
    wait_for_all,
)


def outcome(call: Callable[[], Any]) -> list[Any]:
    try:
        return ["", call()]
    except (ValueError, OSError) as error:
        return [type(error).__name__, str(error)]


def main() -> None:
    found: dict[str, Any] = {}
    with join_process_group():
        rank, world = processes()

        def fails(*ranks: int, of: str = "no folder") -> Callable[[], str]:
            def call() -> str:
                if rank in ranks:
                    raise ValueError(of)
                return f"ready {rank}"

            return call

        for of in ("no folder", ""):
            for name, failing in (("none", ()), ("first", (0,)), ("second", (1,)), ("both", (0, 1))):
                found[f"{name} {of}"] = outcome(lambda of=of, failing=failing: fail_together(fails(*failing, of=of)))
        calls: list[int] = []
        found["broadcast"] = outcome(lambda: broadcast_from_rank0(lambda: calls.append(rank) or "of the first"))
        found["calls"] = calls
        found["same"] = outcome(lambda: require_same({"weights": "abc", "r": 8}))
        found["other"] = outcome(lambda: require_same({"weights": f"abc{rank}", "r": 8, "data": f"x{rank}"}))
        wait_for_all()
        found["world"] = world
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

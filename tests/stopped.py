"""The command line, in which a real signal comes when a batch is about to be answered.

    python -m tests.stopped SIGNAL N ARGUMENTS…

The state is written after every batch. With N = 0 no signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import tomevit.tasks.evaluate
from tomevit.cli import main


def run() -> None:
    name, call, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
    calls, answer = 0, tomevit.tasks.evaluate._launch_batch

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(call):
            os.kill(os.getpid(), signal.Signals[name])
        return answer(*args)

    tomevit.tasks.evaluate._launch_batch = counted
    tomevit.tasks.evaluate.evaluate.__kwdefaults__["every"] = 0.0
    main(arguments)


if __name__ == "__main__":
    run()

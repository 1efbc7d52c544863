"""The command line, in which a real signal comes when a part of embeddings is written, and has not its name yet.

    python -m tests.stopped_embed SIGNAL N OF_SHARD ARGUMENTS…

The signal comes in the N-th part, with N = 0 never; to all processes of its group if this one leads it, as Ctrl-C in a
terminal does. Parts of shards are of OF_SHARD samples.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tomevit.cli import main
from tomevit.tasks import embed
from tomevit.tasks import embedding_files as embeddings


def run() -> None:
    name, call, of_shard, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
    calls, write = 0, embeddings.write_part

    def counted(*args: Any, **more: Any) -> None:
        nonlocal calls
        write(*args, **more)
        calls += 1
        if calls == int(call) and os.environ.get("RANK", "0") == "0":  # torchrun then ends the others too
            os.kill(0 if os.getpgid(0) == os.getpid() else os.getpid(), signal.Signals[name])

    embed.OF_SHARD, embeddings.write_part = int(of_shard), counted
    main(arguments)


if __name__ == "__main__":
    run()

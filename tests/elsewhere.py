"""Functions called in other processes.

They are forked from one that has imported nearly everything, so that they start in no time, but not huggingface_hub, so
that they read the environment as a fresh process does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.server import ENVIRONMENT

FORK = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    FORK.set_forkserver_preload(["tomevit.weights.cache", "hypothesis", "numpy", "pytest", "safetensors.numpy"])


class Elsewhere:
    """A function called in another process."""

    def __init__(self, environment: dict[str, str], function: Callable[..., Any], *args: Any) -> None:
        self.receiver, sender = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self.main, args=(sender, environment, function, args), daemon=True)
        self.process.start()
        sender.close()

    @staticmethod
    def main(sender: Connection, environment: dict[str, str], function: Callable[..., Any], args: Any) -> None:
        for name in list(os.environ):
            if name.upper().startswith(ENVIRONMENT):
                del os.environ[name]
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
        try:
            sender.send((function(*args), None))
        except BaseException as error:
            sender.send((None, error))

    def result(self) -> Any:
        with self.receiver:
            assert self.receiver.poll(60), "the other process hangs"
            value, error = self.receiver.recv()
        self.process.join(10)
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.receiver.close()

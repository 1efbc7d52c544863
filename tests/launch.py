"""Run by torchrun: an example in float64, which may be killed on the way.

    torchrun … -m tests.launch DIGITS PROGRAM NAME N ARGUMENTS…

Each process ends by SIGKILL when it calls the function NAME of examples/common.py for the N-th time; with N = 0 it ends
as it would. DIGITS is a file of what `load_split` returns: scikit-learn takes as long to import as the training takes.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

import torch

import tomevit
import tomevit.training.datasets
from tomevit.transform import Transform


def main() -> None:
    digits, program, name, call, *arguments = sys.argv[1:]
    tomevit.training.datasets.load_split = lambda *_, **__: torch.load(digits, weights_only=False)
    if program in ("train_transformers", "train_lightning"):
        import benchmarks.peers  # noqa: F401  (they import torchvision)
    torch.set_default_dtype(torch.float64)  # in which the Trainer sums up losses
    create, prepare = tomevit.create, Transform.__call__
    tomevit.create = lambda *args, **kwargs: create(*args, **kwargs).double()
    Transform.__call__ = lambda self, image: prepare(self, image).double()
    if int(call):
        kill_at(name, int(call))
    sys.argv[1:] = arguments
    runpy.run_module(f"examples.{program}", run_name="__main__", alter_sys=True)


def kill_at(name: str, call: int) -> None:
    from examples import common

    calls, function = 0, getattr(common, name)

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(common, name, counted)


if __name__ == "__main__":
    main()

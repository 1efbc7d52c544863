"""What compiling costs: the first call of a compiled model at an r, and the first call at each other r after it.

    python -m benchmarks.compile --model vit_b16 --store

Every first r has a process of its own, with an empty compiler cache. "programs" is how many the compiler made in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import tomevit
from benchmarks.arguments import number_or_words
from tomevit.measure.timing import environment

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="time to compile, each first r in a process of its own")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=number_or_words, nargs="+", default=[0, 8, 13, 16])
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--one", action="store_true", help="in this process, the first r first; prints JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(calls(args.model, args.batch, args.r)))
        return

    rows = []
    for first in args.r:
        order = [first, *(r for r in args.r if r != first)]
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "benchmarks.compile", "--one", "--model", args.model]
            command += ["--batch", str(args.batch), "--r", *map(str, order)]
            run = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            )
        rows.append(json.loads(run.stdout))
        for row in rows[-1]:
            times = f"first call {row['first']:6.1f} s, second {row['second']:5.1f} s"
            print(f"r = {row['r']!s:<4}{times}, {row['programs']} programs", flush=True)
        print()
    if args.store:
        result = {"model": args.model, "batch": args.batch, "dtype": "float32"} | environment() | {"orders": rows}
        path = RESULTS / f"compile_{args.model}_float32_b{args.batch}_cpu.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


def calls(name: str, batch: int, r_values: list[int | str]) -> list[dict[str, int | str | float]]:
    model = tomevit.optimize(tomevit.create(name), compiled=True)
    images = torch.randn(batch, model.config.in_chans, *model.config.img_size)
    rows = []
    for r in r_values:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            with torch.inference_mode():
                model(images, model.plain(r))
            seconds.append(round(time.perf_counter() - start, 2))
        programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        rows.append({"r": r, "first": seconds[0], "second": seconds[1], "programs": programs})
    return rows


if __name__ == "__main__":
    main()

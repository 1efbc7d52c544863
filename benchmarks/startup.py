"""How long it takes until something is there: the package, a model, an answer of the command line.

python -m benchmarks.startup --model vit_b16

Each is run in fresh processes, in turn; medians of wall-clock time are printed. What needs torch is compared with
importing torch alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from tomevit.measure.timing import interleave

TORCH = "import torch"
IMPORT = "import tomevit"
PROBE = """
import time, torch
start = time.perf_counter(); import tomevit; tomevit.create; imported = time.perf_counter()
tomevit.create({model!r}); print(imported - start, time.perf_counter() - imported)
"""
COMMANDS = ("--version", "--help", "list", "info vit_b16")  # without torch
WITH_TORCH = ("verify --help", "classify --help", "eval --help")


def main() -> None:
    parser = argparse.ArgumentParser(description="time until the package, a model and the command line are there")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    runs = [measure(args.model) for _ in range(args.rounds)]
    imports, creations = zip(*runs, strict=True)
    print(f"what create() needs, beyond torch: {statistics.median(imports):.3f} s")
    print(f"create({args.model!r}): {statistics.median(creations):.3f} s (slowest {max(creations):.3f} s)")

    programs = {TORCH: ["-c", TORCH], IMPORT: ["-c", IMPORT]}
    programs |= {f"tomevit {words}": ["-m", "tomevit", *words.split()] for words in (*COMMANDS, *WITH_TORCH)}
    calls = {name: lambda arguments=arguments: run(arguments) for name, arguments in programs.items()}
    times = interleave(calls, rounds=args.rounds, warmup=1)
    for name, seconds in times.items():
        beyond = f", {seconds - times[TORCH]:+.3f} s to torch alone" if name.partition(" ")[2] in WITH_TORCH else ""
        print(f"{name}: {seconds:.3f} s{beyond}")


def run(arguments: list[str]) -> str:
    """What a process of its own prints."""
    command = [sys.executable, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."})
    return out.stdout


def measure(model: str) -> tuple[float, float]:
    """Seconds to import what `create` needs, and to create a model, in a process of its own."""
    imported, created = map(float, run(["-c", PROBE.format(model=model)]).split())
    return imported, created


if __name__ == "__main__":
    main()

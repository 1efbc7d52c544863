"""The time to import tomevit, beyond torch, and to create a model: medians over fresh processes.

python -m benchmarks.startup --model vit_b16
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

PROBE = """
import time, torch
start = time.perf_counter(); import tomevit; imported = time.perf_counter()
tomevit.create({model!r}); print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="time to import tomevit and to create a model")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    runs = [measure(args.model) for _ in range(args.rounds)]
    imports, creations = zip(*runs, strict=True)
    print(f"import tomevit, beyond torch: {statistics.median(imports):.3f} s")
    print(f"create({args.model!r}): {statistics.median(creations):.3f} s (slowest {max(creations):.3f} s)")


def measure(model: str) -> tuple[float, float]:
    """Seconds to import tomevit and to create a model, in a process of its own."""
    out = subprocess.run([sys.executable, "-c", PROBE.format(model=model)], capture_output=True, text=True, check=True)
    imported, created = map(float, out.stdout.split())
    return imported, created


if __name__ == "__main__":
    main()

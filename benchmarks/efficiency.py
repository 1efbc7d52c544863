"""Merge efficiency: how much of the FLOPs that merging saves becomes time, over a table of settings.

    python -m benchmarks.efficiency                        # the settings of this device, printed
    python -m benchmarks.efficiency --store                # and kept in benchmarks/results/, after each setting
    python -m benchmarks.efficiency --only vit_b16 bfloat16 b8
    python -m benchmarks.efficiency --device cuda --store

    efficiency = (throughput at r / best throughput at r = 0) / (FLOPs at 0 / FLOPs at r)

In each setting all candidates take turns in one process, on one set of weights: timm and tomevit at r = 0, eager and
compiled (every mode in bench.MODES), tomevit at every r in the same modes, and the design of ToMe's published
patch (reference.py), eager. "Best" is the fastest of all that merge nothing. FLOPs are those that tomevit computes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import tomevit
from benchmarks.peers import timm  # noqa: F401  # the way to import it beside a CPU torch
from benchmarks.reference import reference
from tomevit.cli.options import with_range
from tomevit.measure.bench import (
    MODES,
    PRECISIONS,
    Candidate,
    Comparison,
    Row,
    as_json,
    candidates,
    compare,
    setting,
    timm_twin,
)
from tomevit.measure.bounds import Limits
from tomevit.measure.timing import WARMUP
from tomevit.output import new_file

RESULTS = Path(__file__).parent / "results"
HEAD = (
    "setting",
    "r",
    "best unmerged",
    "images/s",
    "best merged",
    "images/s",
    "speed-up",
    "ratio",
    "efficiency",
    "over reference",
)


class Setting(NamedTuple):
    model: str
    img_size: int
    dtype: str
    batch: int
    r: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model} {self.img_size} {self.dtype} b{self.batch}"


R = {
    ("vit_s16", 224): (13,),
    ("vit_b16", 224): (8, 13, 16),
    ("vit_b16", 384): (23, 45),
    ("vit_b16", 512): (42, 80),
    ("vit_l16", 224): (4, 8),
    ("vit_l16", 384): (12, 23),
    ("vit_l16", 512): (21, 40),
    ("vit_h14", 224): (4, 7),
    ("vit_h14", 378): (11, 21),
    ("vit_h14", 518): (21, 40),
}
SMALL = [("vit_b16", 224), ("vit_s16", 224), ("vit_l16", 224), ("vit_b16", 384)]
CPU = [Setting(*which, dtype, 8, R[which]) for dtype in ("bfloat16", "float32") for which in SMALL]
CPU += [Setting("vit_b16", 224, dtype, 1, R["vit_b16", 224]) for dtype in ("bfloat16", "float32")]
CUDA = [
    Setting(*which, dtype, batch, R[which])
    for dtype in ("bfloat16", "float16", "tf32", "float32")
    for batch in (256, 1)
    for which in R
    if which != ("vit_s16", 224)
]


def main() -> None:
    parser = argparse.ArgumentParser(description="merge efficiency over a table of settings")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="words that the settings' names must have")
    parser.add_argument(
        "--setting", nargs=5, metavar=("MODEL", "PIXELS", "DTYPE", "BATCH", "R,R"), help="one of your own"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all, on a CPU without whole")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true", help="without timm and the reference design")
    parser.add_argument("--store", action="store_true", help="keep the results in benchmarks/results/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    settings = CUDA if device.type == "cuda" else CPU
    if args.setting:
        name, pixels, dtype, batch, r = args.setting
        settings = [Setting(name, int(pixels), dtype, int(batch), tuple(map(int, r.split(","))))]
    settings = [each for each in settings if set(args.only) <= {*each.name.split()}]
    modes = args.modes or [name for name in MODES if device.type == "cuda" or name != "whole"]

    limits = Limits(device)
    table: list[tuple[str, ...]] = [HEAD]
    for each in settings:
        result, where = measure(each, device, modes, args.rounds, limits, peers=not args.no_peers)
        lines = summary(each, result)
        table += lines
        for line in lines or [(each.name, result.note)]:
            print("  ".join(line), flush=True)
        if args.store and lines:
            path = RESULTS / f"efficiency_{each.name.replace(' ', '_')}_{device.type}.json"
            path.parent.mkdir(exist_ok=True)
            with new_file(path) as unfinished:
                unfinished.write_text(json.dumps(as_json(where, [result]), indent=2) + "\n", encoding="utf-8")
            print(f"written to {path}", flush=True)
        if result.interrupted:
            break
    print()
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def measure(
    each: Setting, device: torch.device, modes: Sequence[str], rounds: int, limits: Limits, *, peers: bool
) -> tuple[Comparison, dict[str, object]]:
    """One setting: all candidates, and what the figures must be read with."""
    model = tomevit.create(each.model, img_size=each.img_size).to(device, PRECISIONS[each.dtype][0])
    those = candidates(model, each.r, modes=modes, timm=timm_twin(model) if peers else None)
    for r in each.r if peers else ():  # not 0: what is best without merging is timm or ours
        cost, weights = tomevit.flops(model.config, r), those[0].weights
        those.append(Candidate("reference", "eager", r, partial(reference, model, r=r), cost, weights))
    where = setting(model, device=device, rounds=rounds, timm=True, name=each.model)
    with tqdm(total=len(those) * (rounds + WARMUP), desc=each.name, leave=False, disable=None) as bar:
        result = compare(
            those,
            model,
            batch=each.batch,
            rounds=rounds,
            dtype=each.dtype,
            limits=limits,
            progress=lambda _: bar.update(),
        )
    return result, where


def summary(each: Setting, result: Comparison) -> list[tuple[str, ...]]:
    """For each r the fastest of ours, over the fastest of all that merge nothing, and over the reference design."""
    best = result.best
    if best is None:
        return []

    def fastest(implementation: str, r: int) -> Row | None:
        rows = (row for row in result.rows if (row.implementation, row.r) == (implementation, r))
        return min(rows, key=lambda row: row.seconds.median, default=None)

    lines = []
    for r in each.r:
        ours, published = fastest("tomevit", r), fastest("reference", r)
        if ours is None:
            continue
        over = f"{published.seconds.median / ours.seconds.median:.2f}" if published else ""
        rates = [f"{row.images_per_second:.2f}" for row in (best, ours)]
        ratios = [f"{number:.3f}" for number in (ours.speed_up, ours.flop_ratio_computed)]
        ratios.append(with_range(ours.efficiency, ours.efficiency_range, 3))
        lines.append((each.name, str(r), best.name, rates[0], ours.name, rates[1], *ratios, over))
    return lines


if __name__ == "__main__":
    main()

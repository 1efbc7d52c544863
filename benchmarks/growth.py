"""What merging costs as images grow: the share of a forward's time that goes to matching and merging.

    python -m benchmarks.growth --model vit_b16 --store

Images from 224 to 1024 pixels, 197 to 4097 tokens for a patch of 16; r is 16 at every size, and a share of 0.08 of the
patches entering each block, which grows with them. Matching and merging are timed where they happen, inside the
forward. Sizes take turns; figures are medians. What the sizes cost where attention adds them is not in the share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import tomevit
from tomevit.layers import Block, Tokens, bipartite_soft_matching, merge_tokens
from tomevit.measure.timing import environment, turns
from tomevit.output import new_file
from tomevit.schedule import Schedule
from tomevit.tasks import plots

RESULTS = Path(__file__).parent / "results"
PIXELS = [224, 384, 512, 640, 768, 896, 1024]
TOKENS = 1600  # in a batch, unless one image has more


class Stopwatch:
    """Adds up the time of the functions that it wraps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            out = function(*args, **kwargs)
            self.seconds += self.now() - start
            return out

        return timed


def match_and_merge(tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> Tokens:
    """What a block does, as one function."""
    return merge_tokens(tokens, bipartite_soft_matching(key.mean(1), r, num_prefix))


def main() -> None:
    parser = argparse.ArgumentParser(description="the share of time that merging takes as images grow")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--pixels", type=int, nargs="+", default=PIXELS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", action="store_true", help="keep table and plot in benchmarks/results/")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    watch = Stopwatch(device)

    values: list[Schedule] = [16, 0.08]
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for pixels in args.pixels:
        model = tomevit.create(args.model, img_size=pixels).to(device, dtype)
        for block in model.blocks:
            assert isinstance(block, Block)
            block.bipartite = watch.wrap(match_and_merge)
        batch = max(1, TOKENS // model.config.num_tokens)
        images = torch.randn(batch, model.config.in_chans, pixels, pixels, device=device, dtype=dtype)
        for r in values:
            calls[pixels, str(r)] = partial(model, images, r)
            counts = model.token_counts(r)
            rows[pixels, str(r)] = {
                "pixels": pixels,
                "tokens": counts[0],
                "leaving": counts[-1],
                "batch": batch,
                "r": r,
            }

    shares: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    total = len(calls) * (args.rounds + 1)
    with (
        torch.inference_mode(),
        tqdm(total=total, leave=False, disable=None) as bar,
    ):
        for turn in turns(calls, rounds=args.rounds, warmup=1, device=device):
            if turn.counts:
                times[turn.key].append(turn.seconds)
                shares[turn.key].append(watch.seconds / turn.seconds)
            watch.seconds = 0.0
            bar.update()
    for key, row in rows.items():
        row |= {"seconds": statistics.median(times[key]), "share": statistics.median(shares[key])}

    where = {"model": args.model, "dtype": args.dtype, "rounds": args.rounds}
    where |= environment(device) | {"tomevit": tomevit.__version__}
    note = ", ".join(f"{key} {value}" for key, value in where.items())
    print(note)
    print("pixels  tokens  leaving  batch     r  ms per batch  matching and merging")
    for row in rows.values():
        print(
            f"{row['pixels']:6}{row['tokens']:8}{row['leaving']:9}{row['batch']:7}{row['r']!s:>6}"
            f"{1000 * row['seconds']:14.1f}{100 * row['share']:20.2f} %"
        )
    if args.store:
        name = f"growth_{args.model}_{args.dtype}_{device.type}"
        RESULTS.mkdir(exist_ok=True)
        with new_file(RESULTS / f"{name}.json") as unfinished:
            stored = where | {"rows": list(rows.values())}
            unfinished.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        with new_file(RESULTS / f"{name}.png") as unfinished:
            lines = {
                f"r = {r}": [(row["tokens"], 100 * row["share"]) for row in rows.values() if row["r"] == r]
                for r in values
            }
            plots.share_over_tokens(unfinished, lines, "What merging takes of the time as images grow", note)
        print(f"written to {RESULTS}: {name}.json, {name}.png")


if __name__ == "__main__":
    main()

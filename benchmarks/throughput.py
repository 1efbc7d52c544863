"""tomevit against timm: images per second of one model at several r, all taking turns in one process.

    python -m benchmarks.throughput --model vit_b16 --batch 8 --r 8 13 16 --store

Writes the table and what it was measured on to benchmarks/results/ with --store. timm runs the same weights, unmerged,
eager, with its own fused attention. "r=0, every token" is our model at r = 0 without what it saves in the last block,
where only the class token is read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import tomevit
from benchmarks.peers import timm
from tomevit.timing import environment, interleave

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="tomevit against timm, interleaved, medians")
    parser.add_argument("--model", default="vit_b16", help="a name that timm knows too (default: vit_b16)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 13, 16])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    card = tomevit.card(args.model)
    if card.timm is None:
        parser.error(f"timm has no model {args.model}")
    ours = tomevit.create(args.model).to(args.device, dtype)
    theirs = timm.create_model(card.timm).eval().to(args.device, dtype)
    theirs.load_state_dict(ours.state_dict())
    config = ours.config
    images = torch.randn(args.batch, config.in_chans, *config.img_size, device=args.device, dtype=dtype)

    def every_token() -> torch.Tensor:
        return ours.forward_head(ours.forward_features(images, 0, trace=False))

    calls: dict[str, Callable[[], torch.Tensor]] = {"timm": partial(theirs, images), "r=0, every token": every_token}
    calls |= {f"r={r}": partial(ours, images, r) for r in [0, *args.r]}
    with torch.inference_mode(), tqdm(total=len(calls) * (args.rounds + 2), delay=2, unit="call", disable=None) as bar:
        seconds = interleave(calls, rounds=args.rounds, device=args.device, progress=bar.update)

    gflops = {name: tomevit.flops(config) / 1e9 for name in calls}
    gflops |= {f"r={r}": tomevit.flops(config, r) / 1e9 for r in args.r}
    rows = [
        {
            "candidate": name,
            "gflops": round(gflops[name], 3),
            "images_per_second": round(args.batch / seconds[name], 2),
            "over_timm": round(seconds["timm"] / seconds[name], 3),
            "over_every_token": round(seconds["r=0, every token"] / seconds[name], 3),
            "over_r0": round(seconds["r=0"] / seconds[name], 3),
        }
        for name in calls
    ]
    setting = {"model": args.model, "batch": args.batch, "dtype": args.dtype, "rounds": args.rounds}
    result = setting | environment(args.device) | {"timm": timm.__version__, "rows": rows}
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    print("candidate           GFLOPs  images/s  over timm  over r=0, every token  over r=0")
    for row in rows:
        print(
            f"{row['candidate']:18}{row['gflops']:8.2f}{row['images_per_second']:10.2f}"
            f"{row['over_timm']:11.3f}{row['over_every_token']:23.3f}{row['over_r0']:10.3f}"
        )
    if args.store:
        path = RESULTS / f"throughput_{args.model}_{args.dtype}_b{args.batch}_{args.device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()

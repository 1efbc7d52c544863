"""A training step: its time and its memory, merging and not, beside the reference design and timm.

    python -m benchmarks.train_step --model mae_b16 --batch 8 --r 16 --store
    python -m benchmarks.train_step --model vit_l16 --batch 128 --r 8 --device cuda --dtype bfloat16 --compile --store

A step is forward, cross-entropy, backward, and AdamW over `tomevit.param_groups`; bfloat16 is autocast over float32
weights. All candidates share one set of weights. "reference" is the design of ToMe's published patch (reference.py).

Times are medians of interleaved steps in one process. Memory is measured in a fresh process for each candidate, in a
step that finds weights and optimizer state in place, as every step but the first does:

    step     the most that tensors take beyond weights and optimizer state: activations, gradients, scratch
    tensors  the same with weights and optimizer state
    process  the most that the process ever has: on the CPU resident, Python and torch included; on a GPU what torch's
             allocator holds

Merging changes nothing about weights and optimizer state, so that the last two fall with r only as far as the batch is
large. Beside each figure stand its ratios to r = 0: ours, and the reference's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import tomevit
from benchmarks.peers import timm
from benchmarks.reference import reference
from benchmarks.weights import peak
from tomevit.measure.timing import environment, interleave

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of a training step")
    parser.add_argument("--model", default="mae_b16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every candidate")
    parser.add_argument("--grad-checkpointing", action="store_true", help="in every candidate, block by block")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    config = tomevit.card(args.model).config
    if config.num_prefix != 1 or not config.class_token:
        parser.error(f"the reference design has a class token and no other prefix, unlike {args.model}")

    names = ["timm", "reference, r=0", f"reference, r={args.r}", "r=0", f"r={args.r}"]
    # Before this process grows: on Linux the largest resident memory of a child counts from its parent's.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        peaks = dict(zip(names, tqdm(fresh.map(partial(memory, args), names), "memory", len(names)), strict=True))
    steps, _ = training(args)
    with tqdm(total=len(names) * (args.rounds + 2), desc="time", unit="step") as bar:
        seconds = interleave(steps, rounds=args.rounds, device=args.device, progress=bar.update)
    bases = {"r0": "r=0", "reference_r0": "reference, r=0"}
    rows: list[dict[str, Any]] = []
    for name in names:
        flops = tomevit.flops(config, 0 if name in ("timm", *bases.values()) else args.r)
        row = {"candidate": name, "gflops": round(flops / 1e9, 2), "seconds": round(seconds[name], 4)}
        row |= {f"speedup_over_{key}": round(seconds[base] / seconds[name], 3) for key, base in bases.items()}
        for what, size in peaks[name].items():
            row[f"{what}_megabytes"] = round(size / 1e6)
            row |= {f"{what}_of_{key}": round(size / peaks[base][what], 3) for key, base in bases.items()}
        rows.append(row)
    setting = {key: getattr(args, key) for key in ("model", "r", "batch", "dtype", "compile", "grad_checkpointing")}
    result = setting | {"rounds": args.rounds} | environment(args.device) | {"timm": timm.__version__, "rows": rows}
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    print(f"{'':26}{'time':>20}{'step':>21}{'tensors':>21}{'process':>21}")
    print("candidate           GFLOPs" + "       s   r=0  ref." + 3 * "       MB   r=0  ref.")
    for name, gflops, s, *ratios in (row.values() for row in rows):
        numbers = "".join(f"{x:9}" if isinstance(x, int) else f"{x:6.2f}" for x in ratios)
        print(f"{name:18}{gflops:8.2f}{s:8.3f}{numbers}")
    if args.store:
        marks = [args.dtype, f"b{args.batch}", f"r{args.r}", *(["compile"] if args.compile else [])]
        marks += [*(["checkpointing"] if args.grad_checkpointing else []), args.device.partition(":")[0]]
        path = RESULTS / f"train_step_{'_'.join([args.model, *marks])}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


def training(args: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], torch.optim.Optimizer]:
    """A whole training step of each candidate, all on the same weights, images and labels, and with one optimizer."""
    torch.manual_seed(0)
    model = tomevit.create(args.model).to(args.device).train()
    config, dtype = model.config, getattr(torch, args.dtype)
    with torch.device("meta"):
        theirs = timm.models.VisionTransformer(
            img_size=config.img_size,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
            global_pool=config.pool,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
        )
    theirs.load_state_dict(model.state_dict(keep_vars=True), assign=True)  # the very parameters
    for each in (model, theirs):
        each.set_grad_checkpointing(args.grad_checkpointing)
    compiled: Callable[[Any], Any] = partial(torch.compile, fullgraph=True, dynamic=False)
    ours, published, timms = map(compiled if args.compile else lambda f: f, (model, reference, theirs))

    optimizer = torch.optim.AdamW(tomevit.param_groups(model, lr=1e-5), fused=True)
    images = torch.randn(args.batch, config.in_chans, *config.img_size, device=args.device)
    labels = torch.randint(config.num_classes, (args.batch,), device=args.device)

    def step(forward: Callable[[], Tensor]) -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    forwards: dict[str, Callable[[], Tensor]] = {"timm": partial(timms, images)}
    forwards |= {f"reference, r={r}": partial(published, model, images, r) for r in (0, args.r)}
    forwards |= {f"r={r}": partial(ours, images, r) for r in (0, args.r)}
    return {name: partial(step, forward) for name, forward in forwards.items()}, optimizer


def memory(args: argparse.Namespace, candidate: str) -> dict[str, int]:
    """The peaks of one candidate's steps in bytes, in a process that has done nothing else."""
    steps, optimizer = training(args)
    step = steps[candidate]
    for _ in range(2):  # compiles, makes the optimizer's state, lets the allocator settle
        step()
    held = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    held += sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    if torch.device(args.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
        step()
        tensors, process = torch.cuda.max_memory_allocated(args.device), torch.cuda.max_memory_reserved(args.device)
    else:
        process = peak()  # before a profiler takes its share
        tensors = held + peak_allocated(step)
    return {"step": tensors - held, "tensors": tensors, "process": process}


def peak_allocated(call: Callable[[], object]) -> int:
    """The most bytes that torch has from the CPU's allocator at once while a call runs, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


if __name__ == "__main__":
    main()

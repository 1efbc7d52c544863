"""Loading and converting: the time to create a model from the cache, and the memory that a conversion needs.

    python -m benchmarks.weights load --model vit_l16 --store
    python -m benchmarks.weights read --model vit_b16 --store
    python -m benchmarks.weights convert --model mae_h14 --store

`load` compares create(..., pretrained=True), second time, with safetensors' load_file and a look at every page of what
it gives, in one process, in turns. `read` compares a model whose weights are read into memory of their own, as those of
all files are, with one whose weights are mapped, as those in the cache are: each in a process of its own, in turns,
until the model is there and with a look at every page. `convert` makes a checkpoint of that size in each container and
converts it in a process of its own. The peak is what the system has as the largest resident memory, mapped file pages
included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tomevit
from tomevit.measure.timing import environment, interleave
from tomevit.models import build_meta
from tomevit.weights import checkpoint, rules
from tomevit.weights.formats import FORMATS

RESULTS = Path(__file__).parent / "results"
PAGE = 4096  # bytes

#: The containers that checkpoints come in, each with a format that it comes with.
CONTAINERS = {
    "torch zip": ("mae", ".pth"),
    "torch legacy": ("mae", ".legacy.pth"),
    "safetensors": ("timm", ".safetensors"),
    "safetensors, q k v apart": ("hf_vit", ".hf.safetensors"),
    "npz": ("vit_jax", ".npz"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="time and memory of loading and converting weights")
    parser.add_argument("what", choices=["load", "read", "convert", "read-one", "convert-one"])
    parser.add_argument("--model", help="default: vit_l16 for load, vit_b16 for read, mae_cls_h14 for convert")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--mapped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    if args.what == "convert-one":
        convert_one(args.file, args.model)
        return
    if args.what == "read-one":
        read_one(args.file, mapped=args.mapped)
        return
    model = args.model or {"load": "vit_l16", "read": "vit_b16", "convert": "mae_cls_h14"}[args.what]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        match args.what:
            case "load":
                result = load(model, folder, args.rounds)
            case "read":
                result = read(model, folder, args.rounds)
            case _:
                result = convert(model, folder)
    result = {"what": args.what, "model": model, **environment(), **result}
    print(json.dumps(result, indent=2))
    if args.store:
        (RESULTS / f"weights_{args.what}_{model}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )


def load(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    card = tomevit.card(model)
    os.environ |= {"TOMEVIT_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    source = card.sources[0]
    brought = folder / "downloads" / card.full_name / "model.safetensors"
    brought.parent.mkdir(parents=True)
    save_file(tomevit.create(model).state_dict(), brought)
    start = time.perf_counter()
    tomevit.create(model, pretrained=True)
    first = time.perf_counter() - start
    brought.unlink()
    (cached,) = (folder / "weights").iterdir()

    def read_all() -> None:
        touch(load_file(cached))

    def create() -> None:
        tomevit.create(model, pretrained=True)

    def create_and_touch() -> None:
        touch(tomevit.create(model, pretrained=True).state_dict())

    calls = {"load_file, every page": read_all, "create": create, "create, every page": create_and_touch}
    seconds = interleave(calls, rounds=rounds)
    base = seconds["load_file, every page"]
    return {
        "source": source.hub,
        "megabytes": round(cached.stat().st_size / 1e6),
        "rounds": rounds,
        "first_creation_s": round(first, 3),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "over_load_file": {name: round(value / base, 3) for name, value in seconds.items()},
    }


def read(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    path = folder / "model.safetensors"
    tomevit.save(tomevit.create(model), path)
    ways = {"mapped": ["--mapped"], "copied": []}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, options in ways.items():
            command = [sys.executable, "-m", "benchmarks.weights", "read-one", "--file", str(path), *options]
            rows[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {
        "megabytes": round(path.stat().st_size / 1e6),
        "rounds": rounds,
        "medians": {
            name: {key: round(statistics.median(row[key] for row in each), 4) for key in each[0]}
            for name, each in rows.items()
        },
    }


def read_one(file: str, *, mapped: bool) -> None:
    build_meta(checkpoint.read(file, mapped=True)[0].card.config)  # what is imported and made once
    before = memory_in_megabytes()
    start = time.perf_counter()
    header, tensors = checkpoint.read(file, mapped=mapped)
    model = checkpoint.assemble(header.card, tensors, file)
    there = time.perf_counter()
    touch(model.state_dict())
    touched = time.perf_counter()
    after = memory_in_megabytes()
    row = {
        "seconds": there - start,
        "seconds_with_every_page": touched - start,
        "peak_megabytes": after["VmHWM"],
        "of_which_python_and_torch": before["VmHWM"],
        "more_of_its_own_megabytes": after["RssAnon"] - before["RssAnon"],  # not shared with the file, other processes
    }
    print(json.dumps(row))


def memory_in_megabytes() -> dict[str, float]:
    """What Linux tells of this process: VmHWM, the most that was resident; RssAnon, of it now what is of no file."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e6 for line in lines if line[-1] == "kB"}


def touch(tensors: dict[str, Tensor]) -> float:
    """Read one element of every page."""
    return sum(float(t.flatten()[:: PAGE // t.element_size()].sum()) for t in tensors.values())


def convert(model: str, folder: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, (form, suffix) in CONTAINERS.items():
        path = folder / f"checkpoint{suffix}"
        write(path, form, model)
        command = [sys.executable, "-m", "benchmarks.weights", "convert-one", "--model", model, "--file", str(path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = {"container": name, "format": form, **json.loads(out)}
        row["peak_over_file"] = round(row["peak_megabytes"] / row["megabytes"], 3)
        rows.append(row)
        path.unlink()
    return {"rows": rows}


def write(path: Path, form: str, model: str) -> None:
    """A checkpoint as the format's project would write it, in a process that is done with its memory after it."""
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    config = tomevit.card(model).config
    ours = {name: torch.randn(t.shape) * 0.02 for name, t in build_meta(config).state_dict().items()}
    tensors = rules.from_native(FORMATS[form], ours, config)
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=".legacy" not in path.name)
    os._exit(0)


def convert_one(file: str, model: str) -> None:
    before = peak()
    start = time.perf_counter()
    tomevit.convert(file, f"{file}.converted", model=model)
    row = {
        "megabytes": round(Path(file).stat().st_size / 1e6),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_megabytes": round(peak() / 1e6),
        "of_which_python_and_torch": round(before / 1e6),
    }
    Path(f"{file}.converted").unlink()
    print(json.dumps(row))


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()

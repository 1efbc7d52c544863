"""Does merging pay in other runtimes too? One model at r = 0 and more, in torch, onnxruntime, OpenVINO and AOTInductor.

    python -m benchmarks.runtimes --model vit_b16 --batch 8 --r 13 16 --store

Each r is exported once, as `tomevit export --batch` does it; all candidates then take turns in one process, with
as many threads as torch has. OpenVINO reads the file that onnxruntime does; "int8" is onnxruntime with weights in 8
bits; "aoti" wants a C++ compiler. Fresh weights. Merging pays in a runtime if ViT-B is at least 1.6 times as fast at
r = 16 as at r = 0 there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
from torch import Tensor, nn
from tqdm import tqdm

import tomevit
from tomevit.deploy.programs import export_program
from tomevit.measure.timing import environment, interleave
from tomevit.models import VisionTransformer

RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("torch", "onnxruntime", "openvino", "aoti", "int8")
WANTED = 1.6  # times as fast at r = 16, for ViT-B


def main() -> None:
    parser = argparse.ArgumentParser(description="merging in several runtimes, interleaved, medians")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, nargs="+", default=[13, 16])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--img-size", type=int, help="pixels; default: the model's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = tomevit.create(args.model, img_size=args.img_size)
    for name in model.head_names:  # a fresh ViT's is zero, and so would all answers be
        nn.init.trunc_normal_(getattr(model, name).weight, std=0.02)
    values = list(dict.fromkeys([0, *args.r]))
    images = torch.randn(args.batch, model.config.in_chans, *model.config.img_size)
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    exports: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for runtime in tqdm(args.runtimes, desc="exporting", disable=None):
            for r in values:
                calls[runtime, r], exports[runtime, r] = candidate(runtime, model, r, images, Path(folder))
        with tqdm(total=len(calls) * (args.rounds + 2), delay=2, unit="call", disable=None) as bar:
            seconds = interleave(calls, rounds=args.rounds, progress=bar.update)
        calls.clear()

    rows = [
        {
            "runtime": runtime,
            "r": r,
            "images_per_second": round(args.batch / seconds[runtime, r], 2),
            "over_r0": round(seconds[runtime, 0] / seconds[runtime, r], 3),
            "flop_ratio": round(tomevit.flops(model.config) / tomevit.flops(model.config, r), 3),
            "over_torch": round(seconds["torch", r] / seconds[runtime, r], 3) if ("torch", r) in seconds else None,
            **exports[runtime, r],
        }
        for runtime, r in seconds
    ]
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__}
    setting = {"model": args.model, "img_size": model.config.img_size, "batch": args.batch, "rounds": args.rounds}
    result = setting | environment() | versions | {"tomevit": tomevit.__version__, "rows": rows}
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    print("runtime        r  images/s  over r=0  FLOP ratio  over torch  export s  difference")
    for row in rows:
        over_torch = "" if row["over_torch"] is None else f"{row['over_torch']:.2f}"
        print(
            f"{row['runtime']:12}{row['r']:4}{row['images_per_second']:10.2f}{row['over_r0']:10.2f}"
            f"{row['flop_ratio']:12.2f}{over_torch:>12}{row['export_seconds']:10.1f}{row['difference']:12.1e}"
        )
    for row in rows:
        if row["r"] == 16 and args.model == "vit_b16":
            pays = "pays" if row["over_r0"] >= WANTED else f"does not reach {WANTED}"
            print(f"{row['runtime']}: merging {pays}, {row['over_r0']:.2f} times at r = 16")
    if args.store:
        path = RESULTS / f"runtimes_{args.model}_b{args.batch}_cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


def candidate(
    runtime: str, model: VisionTransformer, r: int, images: Tensor, folder: Path
) -> tuple[Callable[[], object], dict[str, Any]]:
    """What runs the model at one r, and how long its export took and how far apart their logits are."""
    if runtime == "torch":
        return partial(model, images, r), {"export_seconds": 0.0, "difference": 0.0}
    kind, dtype = ("aoti", "float32") if runtime == "aoti" else ("onnx", "int8" if runtime == "int8" else "float32")
    path = folder / f"{dtype}_{r}.{'pt2' if kind == 'aoti' else 'onnx'}"
    start = time.perf_counter()
    if not path.exists():  # onnxruntime and OpenVINO read the same
        export_program(model, path, kind, r=r, dtype=dtype, batch=len(images))
    seconds = time.perf_counter() - start
    call = {"aoti": aoti, "openvino": in_openvino}.get(runtime, in_onnxruntime)(path, images)
    found, expected = torch.as_tensor(call()), model(images, r)
    return call, {"export_seconds": round(seconds, 1), "difference": float((found - expected).abs().max())}


def aoti(path: Path, images: Tensor) -> Callable[[], Tensor]:
    return partial(torch._inductor.aoti_load_package(str(path)), images)


def in_onnxruntime(path: Path, images: Tensor) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images.numpy()})[0]


def in_openvino(path: Path, images: Tensor) -> Callable[[], Any]:
    # The runtime alone: its converter would report its use over the network. For one call at a time, all threads.
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda: request.infer({"images": images.numpy()}, share_inputs=True)[0]


if __name__ == "__main__":
    main()

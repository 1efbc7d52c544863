"""Does merging pay in other runtimes too, and which model is the fastest of any? One model at r = 0 and more.

    python -m benchmarks.runtimes --model vit_b16 --batch 8 --r 13 16 --store
    python -m benchmarks.runtimes --model digits_p1.tome_r16 --batch 72

Each r is exported once, as `tomevit export --batch` does it; all candidates then take turns in one process, with as
many threads as torch has. A package that is missing is said, and its runtimes are left out. OpenVINO reads the file
that onnxruntime does, and computes in float32, or in bfloat16 where the processor has instructions for it. "int8" is
onnxruntime with linear layers in 8 bits, quantised as they run; "int8_calibrated" the same by the ranges of calibration
images; "openvino_int8" what NNCF quantised after training. "aoti" wants a C++ compiler.

Beside each time stand the error of the logits, as a share of theirs, and how many images get the same class as by the
model in float32. The digits' models are trained, are calibrated with the digits they were trained on, and classify
held-out ones. Others have fresh weights and see noise: their error says how exactly a runtime computes, and whether two
classes that are equally likely change places says little. Merging pays in a runtime if ViT-B is at least 1.6 times as
fast at r = 16 as at r = 0 there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tomevit
from benchmarks.arguments import number_or_words
from tomevit.deploy.programs import export_program, openvino
from tomevit.measure.timing import WARMUP, environment, ratio_interval, turns
from tomevit.models import VisionTransformer
from tomevit.private import emulated_dtypes
from tomevit.tasks.demo import held_out

RESULTS = Path(__file__).parent / "results"
WANTED = 1.6  # times as fast at r = 16, for ViT-B
CALIBRATION_IMAGES = 64
COMPARED_IMAGES = 32  # of noise; of digits all that are held out

Run = Callable[[Tensor], Any]


class Runtime(NamedTuple):
    """What runs the model, and as what."""

    format: str | None = None  # of the program; None: it is the model itself
    dtype: str = "float32"  # of the program
    calibrated: bool = False
    load: Callable[[Path], Run] | None = None  # of programs
    packages: tuple[str, ...] = ()
    computes: str = "float32"  # bfloat16 only where the processor has instructions for it


class Row(NamedTuple):
    """A program of one r, ready to run, and how it was made and answers."""

    call: Callable[[], object]
    about: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="merging in several runtimes, interleaved, medians")
    parser.add_argument("--model", default="vit_b16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=number_or_words, nargs="+", default=[13, 16])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--img-size", type=int, help="pixels; default: the model's")
    parser.add_argument("--rounds", type=int, default=20, help="6 or more give intervals")
    parser.add_argument("--store", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args(arguments)

    model, calibration, compared = prepare(args.model, args.img_size, args.batch)
    runtimes = list(usable(args.runtimes))
    values = list(dict.fromkeys([0, *args.r]))
    candidates: dict[tuple[str, int | str], Row] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for runtime in tqdm(runtimes, desc="exporting", disable=None):
            for r in values:
                made = candidate(runtime, model, r, args.batch, calibration, compared, Path(folder))
                candidates[runtime, r] = made
        times: dict[tuple[str, int | str], list[float]] = {key: [] for key in candidates}
        calls = {key: row.call for key, row in candidates.items()}
        with tqdm(total=len(calls) * (args.rounds + WARMUP), delay=2, unit="call", disable=None) as bar:
            for turn in turns(calls, rounds=args.rounds):
                if turn.counts:
                    times[turn.key].append(turn.seconds)
                bar.update()
        calls.clear()

    rows = [row_of(runtime, r, model, args.batch, times) | candidates[runtime, r].about for runtime, r in times]
    packages = sorted({package for name in runtimes for package in RUNTIMES[name].packages})
    result = (
        {"model": args.model, "img_size": model.config.img_size, "batch": args.batch, "rounds": args.rounds}
        | {"weights": "trained" if is_trained(args.model) else "fresh", "compared_images": len(compared)}
        | environment()
        | {package: version(package) for package in packages}
        | {"tomevit": tomevit.__version__, "rows": rows}
    )
    show(result)
    if args.store:
        path = RESULTS / f"runtimes_{args.model}_b{args.batch}_cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


def is_trained(model: str) -> bool:
    return tomevit.card(model).name == "digits_p1"


def prepare(name: str, img_size: int | None, batch: int) -> tuple[VisionTransformer, Tensor, Tensor]:
    """The model, images to calibrate with, and others to compare with, as many as make whole batches."""
    torch.manual_seed(0)
    if is_trained(name):
        from tomevit.training.digits import load_split

        model = tomevit.create(name, pretrained=True)
        prepared = tomevit.transform(model)
        return model, prepared(load_split()[0].images[:CALIBRATION_IMAGES]), whole(prepared(held_out()[0]), batch)
    model = tomevit.create(name, img_size=img_size)
    for head in model.head_names:  # a fresh ViT's is zero, and so would all answers be
        nn.init.trunc_normal_(getattr(model, head).weight, std=0.02)
    shape = (model.config.in_chans, *model.config.img_size)
    return (
        model,
        torch.randn(CALIBRATION_IMAGES, *shape),
        whole(torch.randn(max(COMPARED_IMAGES, batch), *shape), batch),
    )


def whole(images: Tensor, batch: int) -> Tensor:
    """Whole batches of images: repeated if there are too few for one."""
    if len(images) < batch:
        images = images.repeat(-(-batch // len(images)), 1, 1, 1)
    return images[: len(images) // batch * batch]


def usable(names: Sequence[str]) -> Iterator[str]:
    """Those of the runtimes that can run here; of the others it is said why not."""
    for name in names:
        runtime = RUNTIMES[name]
        missing = [package for package in runtime.packages if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {' and '.join(missing)} is not installed")
        elif runtime.computes == "bfloat16" and not has_bfloat16(runtime):
            print(f"{name} is left out: this processor has no instructions for bfloat16")
        else:
            yield name


def has_bfloat16(runtime: Runtime) -> bool:
    return openvino.has_bfloat16() if runtime.packages else torch.bfloat16 not in emulated_dtypes()


def candidate(
    name: str, model: VisionTransformer, r: int | str, batch: int, calibration: Tensor, compared: Tensor, folder: Path
) -> Row:
    """What runs the model at one r, how long its export took, and how its logits compare with the model's."""
    runtime = RUNTIMES[name]
    start = time.perf_counter()
    if runtime.format is None:
        run: Run = partial(deepcopy(model).to(getattr(torch, runtime.computes)), r=r)
        images = compared.to(getattr(torch, runtime.computes))
    else:
        suffix = {"onnx": "onnx", "openvino": "xml", "aoti": "pt2"}[runtime.format]
        path = folder / f"{runtime.dtype}_{'calibrated' if runtime.calibrated else 'plain'}_{r}.{suffix}"
        if not path.exists():  # onnxruntime and OpenVINO read the same
            calibrate = calibration if runtime.calibrated else None
            export_program(model, path, runtime.format, r=r, dtype=runtime.dtype, batch=batch, calibrate=calibrate)
        assert runtime.load is not None
        run, images = runtime.load(path), compared
    seconds = time.perf_counter() - start if runtime.format else 0.0
    parts = torch.split(images, batch)
    found = torch.cat([torch.as_tensor(run(part)).float().clone() for part in parts])
    expected = torch.cat([model(part, r) for part in torch.split(compared, batch)])
    about = {
        "export_seconds": round(seconds, 1),
        "difference": float((found - expected).abs().max()),
        "error": float((found - expected).norm() / expected.norm()),
        "same_top1": round(float((found.argmax(1) == expected.argmax(1)).float().mean()), 4),
    }
    return Row(partial(run, parts[0].contiguous()), about)


def row_of(
    runtime: str, r: int | str, model: VisionTransformer, batch: int, times: dict[tuple[str, int | str], list[float]]
) -> dict[str, Any]:
    """The speed of one candidate, and its ratios to the same runtime's at r = 0 and to torch's at the same r."""
    own = times[runtime, r]

    def over(key: tuple[str, int | str]) -> tuple[float | None, list[float] | None]:
        if key not in times:
            return None, None
        interval = ratio_interval([times[key]], own)
        ratio = statistics.median(times[key]) / statistics.median(own)
        return round(ratio, 3), interval and [round(end, 3) for end in interval]

    over_r0, over_r0_interval = over((runtime, 0))
    over_torch, over_torch_interval = over(("torch", r))
    return {
        "runtime": runtime,
        "r": r,
        "images_per_second": round(batch / statistics.median(own), 2),
        "over_r0": over_r0,
        "over_r0_interval": over_r0_interval,
        "flop_ratio": round(tomevit.flops(model.config) / tomevit.flops(model.config, model.plain(r)), 3),
        "over_torch": over_torch,
        "over_torch_interval": over_torch_interval,
    }


def show(result: dict[str, Any]) -> None:
    """A result as a table, and what it says."""
    rows = result["rows"]
    print(", ".join(f"{key} {value}" for key, value in result.items() if key != "rows"))
    print(
        "runtime              r  images/s  over r=0                FLOP ratio  over torch              "
        "export s  difference    error  same top-1"
    )
    for row in rows:
        print(
            f"{row['runtime']:18}{row['r']!s:>4}{row['images_per_second']:10.2f}  "
            f"{with_interval(row['over_r0'], row['over_r0_interval']):22}{row['flop_ratio']:12.2f}  "
            f"{with_interval(row['over_torch'], row['over_torch_interval']):22}{row['export_seconds']:10.1f}"
            f"{row['difference']:12.1e}{row['error']:9.1e}{row['same_top1']:12.2%}"
        )
    if result["weights"] == "fresh":
        print("same top-1 says little here: the weights are fresh, and the images noise; the error counts")
    for row in rows:
        if row["r"] == 16 and result["model"] == "vit_b16":
            pays = "pays" if row["over_r0"] >= WANTED else f"does not reach {WANTED}"
            print(f"{row['runtime']}: merging {pays}, {row['over_r0']:.2f} times at r = 16")
    fastest = {
        r: max((row for row in rows if row["r"] == r), key=lambda row: row["images_per_second"])
        for r in dict.fromkeys(row["r"] for row in rows)
    }
    for r, row in fastest.items():
        ratio = row["images_per_second"] / fastest[0]["images_per_second"]
        beside = "the fastest unmerged" if r == 0 else f"{ratio:.2f} times the fastest unmerged"
        print(f"fastest at r = {r}: {row['runtime']}, {row['images_per_second']:.2f} images/s, {beside}")


def with_interval(ratio: float | None, interval: Sequence[float] | None) -> str:
    """A ratio with between what it lies, with 95 % confidence, where there were rounds enough."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")


def aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


def in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def in_openvino(path: Path, precision: str = "f32") -> Run:
    import openvino

    # The runtime alone: its converter would report its use over the network. For one call at a time, all threads.
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    return lambda images: request.infer({"images": images.numpy()}, share_inputs=True)[0]


ONNX = ("onnx", "onnxscript", "onnxruntime")
OPENVINO = ("onnx", "onnxscript", "openvino")
RUNTIMES = {
    "torch": Runtime(),
    "torch_bfloat16": Runtime(computes="bfloat16"),
    "onnxruntime": Runtime("onnx", load=in_onnxruntime, packages=ONNX),
    "openvino": Runtime("onnx", load=in_openvino, packages=OPENVINO),
    "openvino_bfloat16": Runtime(
        "onnx", load=partial(in_openvino, precision="bf16"), packages=OPENVINO, computes="bfloat16"
    ),
    "aoti": Runtime("aoti", load=aoti),
    "int8": Runtime("onnx", "int8", load=in_onnxruntime, packages=ONNX),
    "int8_calibrated": Runtime("onnx", "int8", calibrated=True, load=in_onnxruntime, packages=ONNX),
    "openvino_int8": Runtime("openvino", "int8", calibrated=True, load=in_openvino, packages=(*OPENVINO, "nncf")),
}


if __name__ == "__main__":
    main()

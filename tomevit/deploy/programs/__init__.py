"""Models as programs that run without tomevit: ONNX files, torch.export archives, AOTInductor packages.

A program has one input, `images`, and one output, `logits` (`features` where the model has no head). r, the image size
and the dtype are fixed in it; the batch is not, unless asked for. What it is and how its images are prepared travels in
its metadata. Each is run and compared with the model before it takes the place of what was there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tomevit.config import Card
from tomevit.deploy.programs import archive, onnx
from tomevit.deploy.programs.trace import from_pixels, trace
from tomevit.errors import join_with_or
from tomevit.models import VisionTransformer
from tomevit.output import check_output, explain_os_errors, new_file
from tomevit.schedule import Schedule, check_schedule, schedule_to_json
from tomevit.version import __version__
from tomevit.weights import checkpoint
from tomevit.weights.convert import weights_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: torch 2.6 cannot export an open batch, and nothing between the two is tested.
LEAST_TORCH = (2, 13)

#: How far the logits of a float32 program may be from the model's, as a share of the largest. Rounding is 1e-5 or less;
#: where two tokens are equally similar, rounding decides which of them merges, which may be 1e-3.
MOST_APART = 1e-2


class Kind(NamedTuple):
    """A format of programs."""

    suffix: str
    dtypes: tuple[str, ...]
    check: Callable[[int | None, str], None]  # raises ValueError if it cannot be written here, in this opset and dtype
    write: Callable[..., None]
    load: Callable[[Path], tuple[str, Callable[[Tensor], Tensor]] | None]  # what runs it here, by name


PROGRAMS = {
    "onnx": Kind(".onnx", ("float32", "float16", "int8"), onnx.check_packages, onnx.write_onnx, onnx.load_onnx),
    "pt2": Kind(".pt2", tuple(DTYPES), archive.check_nothing, archive.write_exported, archive.load_exported),
    "aoti": Kind(".pt2", tuple(DTYPES), archive.check_compiler, archive.write_compiled, archive.load_compiled),
}


class Parity(NamedTuple):
    """How a program's answers compare with those of the model, eager and in float32, on generated images."""

    runtime: str  # what ran it, with its version
    images: int
    difference: float  # the largest of any logit, or feature
    largest: float  # logit, or feature
    same_top1: int | None  # of the images; None: the model has no head
    least_cosine: float  # of the angle between both answers to an image


class Program(NamedTuple):
    """What `export_program` did."""

    written: list[Path]
    metadata: dict[str, str]  # as the file has it
    parity: Parity | None  # None: what would run it is not installed


def export_program(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "onnx",  # noqa: A002
    *,
    r: Schedule | None = None,
    dtype: str = "float32",
    batch: int | None = None,
    opset: int | None = None,
    raw: bool = False,
) -> Program:
    """Write a model as a program that runs without tomevit, and compare the two.

    Args:
        model: a model, in a wrapper of torch's or not, or anything that `tomevit.convert` takes.
        out: the file, ending in .onnx or .pt2. ONNX weights that do not fit one file (2 GB) go to OUT.data beside it.
        format: "onnx", for onnxruntime, TensorRT, OpenVINO and others; "pt2", for `torch.export.load`; "aoti",
            compiled, for `torch._inductor.aoti_load_package` and C++ without Python, on the kind of device that the
            model is on.
        r: instead of the model's own.
        dtype: of images, weights and output. Sizes and similarities of tokens are float32 in each. "int8" (onnx):
            matrix products with weights in 8 bits, quantised as they run, by onnxruntime; all else in float32.
        batch: None: any number of images.
        opset: of ONNX; None: what torch's exporter recommends.
        raw: take pixels, uint8 from 0 to 255, and normalise within, where no one can get it wrong.

    Returns:
        What was written, and how its answers compare with the model's.

    Raises:
        ValueError: the program cannot be written: an argument, a package or a compiler that is missing, torch before
            2.13, or a model that answers otherwise in this form or that onnxruntime does not run.
        FileNotFoundError, OSError: nothing to read, or no place to write. What was at `out` before stays, in any case.
    """
    inputs = [] if isinstance(model, nn.Module) else [model]
    kind, out = _check_request(format, out, dtype, batch, opset, inputs)
    card, tensors, _ = weights_of(model)
    source = "the model" if isinstance(model, nn.Module) else os.fspath(model)  # as messages name it
    if r is not None:
        card = replace(card, r=check_schedule(r, card.config.depth))

    with tqdm(desc="reading", total=4, delay=2, leave=False, disable=None, bar_format="{desc} {elapsed}") as bar:

        def now(what: str) -> None:
            bar.set_description(what)
            bar.update()

        with torch.no_grad(), _folder_for(out) as folder:
            reference = checkpoint.assemble(card, {name: t.float() for name, t in tensors.items()}, source)
            if card.config.matching == "random" and any(reference.schedule()):
                raise ValueError(
                    "matching='random' draws anew at every call, and a program answers the same each time: "
                    "create the model with matching='bipartite'"
                )
            kept = DTYPES.get(dtype, torch.float32)
            exact = checkpoint.assemble(card, {name: t.to(kept) for name, t in tensors.items()}, source)
            runs = from_pixels(exact) if raw else exact
            metadata = describe_program(reference, dtype, batch, raw)
            images = _images(card, batch or 2, raw).to(exact.device, None if raw else kept)
            now("tracing")
            program = trace(runs, images, dynamic=batch is None)
            now("writing")
            kind.write(program, folder / out.name, metadata, dtype=dtype, opset=opset)
            now("comparing")
            parity = _compare(reference, kind, folder / out.name, dtype, batch, raw)
            written = _put_in_place(folder, out)
    return Program(written, metadata, parity)


def _check_request(
    format: str,  # noqa: A002
    out: str | os.PathLike[str],
    dtype: str,
    batch: int | None,
    opset: int | None,
    inputs: Sequence[str | os.PathLike[str]],
) -> tuple[Kind, Path]:
    """What can be known to be wrong before anything is read, as `export_program` says it."""
    if format not in PROGRAMS:
        raise ValueError(f"there is no program format {format!r}; there are {', '.join(PROGRAMS)}")
    kind, out = PROGRAMS[format], check_output(out, inputs=inputs, writable=True)
    if out.suffix != kind.suffix:
        raise ValueError(f"{out.name} must end in {kind.suffix}, as a program of format {format} does")
    if dtype not in kind.dtypes:
        raise ValueError(f"dtype is {dtype!r}, and a program of format {format} is of {join_with_or(kind.dtypes)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, and must be a number of images, or None for any")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset is ONNX's, and the format is {format}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise ValueError(f"programs need torch {least} or later, and this is {torch.__version__}: pip install -U torch")
    kind.check(opset, dtype)
    return kind, out


def describe_program(model: VisionTransformer, dtype: str, batch: int | None, raw: bool) -> dict[str, str]:
    """What a program says of itself: flat, each value a text or JSON."""
    card, config, preprocess = model.card, model.config, model.card.preprocess
    count = "batch" if batch is None else str(batch)
    io = "float32" if dtype == "int8" else dtype
    shape = f"({count}, {config.in_chans}, {config.img_size[0]}, {config.img_size[1]})"
    width = config.num_classes or config.num_features
    normalised = {"mean": json.dumps(preprocess.mean), "std": json.dumps(preprocess.std)}
    return {
        "name": card.full_name,
        "r": json.dumps(schedule_to_json(card.r)),
        "tokens": json.dumps(model.token_counts()),  # entering each block, and leaving the last
        "dtype": dtype,
        "input": f"images: {'uint8' if raw else io} {shape}, "
        + ("pixels from 0 to 255" if raw else "pixels from 0 to 1, less mean, over std"),
        "output": f"{output_name(model)}: {io} ({count}, {width})",
        "image_size": json.dumps(config.img_size),  # height, width
        "resize": preprocess.resize,
        "interpolation": preprocess.interpolation,
        "crop_pct": json.dumps(preprocess.crop_pct),
        **({} if raw else normalised),
        "class_names": json.dumps(card.class_names),
        "licence": card.licence or "",
        "tomevit": __version__,
    }


def output_name(model: VisionTransformer) -> str:
    return "logits" if model.config.num_classes else "features"


def _images(card: Card, count: int, raw: bool) -> Tensor:
    """Generated images: pixels, or normalised."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, card.config.in_chans, *card.config.img_size)
    if raw:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _compare(
    reference: VisionTransformer, kind: Kind, path: Path, dtype: str, batch: int | None, raw: bool
) -> Parity | None:
    loaded = kind.load(path)
    if loaded is None:
        return None
    runtime, run = loaded
    card, device = reference.card, reference.device
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]
        for values in (card.preprocess.mean, card.preprocess.std)
    )
    found, expected = [], []
    for count in [batch] if batch else [1, 3]:
        images = _images(card, count, raw)
        given = images if raw else images.to(DTYPES.get(dtype, torch.float32))
        found.append(run(given.to(device)).float().cpu())
        plain = images.div(255).sub(mean).div(std) if raw else given.float()
        expected.append(reference(plain.to(device)).cpu())
    ours, theirs = torch.cat(found), torch.cat(expected)
    largest, difference = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    if not theirs.isfinite().all():
        raise ValueError(
            "the model answers with values that are not finite, in torch and float32 too: its weights are broken, and "
            "nothing was written"
        )
    if not ours.isfinite().all():
        raise ValueError(
            f"in {dtype}, {runtime} answers with values that are not finite: "
            + ("nothing was written" if dtype == "float32" else "export it in float32")
        )
    if dtype == "float32" and difference > MOST_APART * largest:
        raise ValueError(
            f"{runtime} does not answer as torch does: answers differ by {difference:.2g} of {largest:.2g}; "
            f"nothing was written"
        )
    same = int((ours.argmax(1) == theirs.argmax(1)).sum()) if card.config.num_classes else None
    cosine = torch.cosine_similarity(ours.double(), theirs.double()).min().item()
    return Parity(runtime, len(ours), difference, largest, same, cosine)


@contextmanager
def _folder_for(out: Path) -> Iterator[Path]:
    """A directory for files of an output's name, on its disk: gone afterwards, with what is still in it."""
    with explain_os_errors(out):
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    with folder as name, explain_os_errors(out, Path(name) / out.name):
        yield Path(name)


def _put_in_place(folder: Path, out: Path) -> list[Path]:
    """Put the finished files in their places, the one that is opened last."""
    written: list[Path] = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name == out.name):
        with new_file(out.with_name(file.name)) as draft:
            shutil.move(file, draft)
        written.insert(0, out.with_name(file.name))
    return written

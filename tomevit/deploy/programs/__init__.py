"""Models as programs that run without tomevit: ONNX and OpenVINO files, torch.export archives, AOTInductor packages.

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
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tomevit.cards import Card
from tomevit.config import Preprocess
from tomevit.deploy.programs import archive, onnx, openvino
from tomevit.deploy.programs.trace import Settings, from_pixels, trace
from tomevit.errors import check_type, join_with_or
from tomevit.models import VisionTransformer
from tomevit.output import check_output, explain_os_errors, new_file
from tomevit.progress import progress_bar
from tomevit.schedule import Schedule, schedule_to_json
from tomevit.transform import Transform
from tomevit.version import __version__
from tomevit.weights import checkpoint
from tomevit.weights.convert import weights_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: torch 2.6 cannot export an open batch, and nothing between the two is tested.
LEAST_TORCH = (2, 13)

#: How far the logits of a float32 program may be from the model's, as a share of the largest. Rounding is 1e-5 or less;
#: where two tokens are equally similar, rounding decides which of them merges, which may be 1e-3.
MOST_APART = 1e-2

#: Images per call while int8 is calibrated, and compared, of a program that takes any number.
AT_ONCE = 8


class Kind(NamedTuple):
    """A format of programs."""

    suffixes: tuple[str, ...]  # of the file that is named, and of those that come beside it
    dtypes: tuple[str, ...]
    float32_ends: tuple[str, ...]  # of the dtypes: those of weights alone, with images and output in float32
    needs_calibration: bool  # for int8
    check: Callable[[int | None, str], None]  # raises ValueError if it cannot be written here, in this opset and dtype
    write: Callable[[ExportedProgram, Path, dict[str, str], Settings], None]
    load: Callable[[Path], tuple[str, Callable[[Tensor], Tensor]] | None]  # what runs it here, by name


PROGRAMS = {
    "onnx": Kind(
        suffixes=(".onnx",),
        dtypes=("float32", "float16", "int8"),
        float32_ends=("int8",),
        needs_calibration=False,
        check=onnx.check_packages,
        write=onnx.write_onnx,
        load=onnx.load_onnx,
    ),
    "openvino": Kind(
        suffixes=(".xml", ".bin"),
        dtypes=(*DTYPES, "int8"),
        float32_ends=(*DTYPES, "int8"),
        needs_calibration=True,
        check=openvino.check_packages,
        write=openvino.write_openvino,
        load=openvino.load_openvino,
    ),
    "pt2": Kind(
        suffixes=(".pt2",),
        dtypes=tuple(DTYPES),
        float32_ends=(),
        needs_calibration=False,
        check=archive.check_nothing,
        write=archive.write_exported,
        load=archive.load_exported,
    ),
    "aoti": Kind(
        suffixes=(".pt2",),
        dtypes=tuple(DTYPES),
        float32_ends=(),
        needs_calibration=False,
        check=archive.check_compiler,
        write=archive.write_compiled,
        load=archive.load_compiled,
    ),
}


class Parity(NamedTuple):
    """How a program's answers compare with those of the model, eager and in float32."""

    runtime: str  # what ran it, with its version
    images: int
    source: str  # of the images: "generated"; "calibration", the first that it was calibrated with
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
    calibrate: Tensor | Callable[[Transform], Tensor] | None = None,
) -> Program:
    """Write a model as a program that runs without tomevit, and compare the two.

    Args:
        model: a model, in a wrapper of torch's or not, or anything that `tomevit.convert` takes.
        out: the file, ending in .onnx, .xml or .pt2. ONNX weights that do not fit one file (2 GB) go to OUT.data beside
            it, and OpenVINO's always to a .bin beside the .xml.
        format: "onnx", for onnxruntime, TensorRT, OpenVINO and others; "openvino", OpenVINO's own; "pt2", for
            `torch.export.load`; "aoti", compiled, for `torch._inductor.aoti_load_package` and C++ without Python, on
            the kind of device that the model is on.
        r: instead of the model's own, in any form; words become plain numbers, and these are what the program says.
        dtype: of images, weights and output. Sizes and similarities of tokens are float32 in each. For OpenVINO, of the
            weights as they are stored: images and output are float32, and what it computes in is a setting there.
            "int8" (onnx, openvino): linear layers multiply in 8 bits, and all else is float32. Of ONNX what they
            multiply is quantised as it comes, or by `calibrate`; for OpenVINO by NNCF, which takes `calibrate`.
        batch: None: any number of images.
        opset: of ONNX; None: what torch's exporter recommends.
        raw: take pixels, uint8 from 0 to 255, and normalise within, where no one can get it wrong.
        calibrate: some hundred images as the model will see them, for int8: (N, C, H, W) as `tomevit.transform`
            prepares them, or a function that makes these, given the model's transform.

    Returns:
        What was written, and how its answers compare with the model's.

    Raises:
        ValueError: the program cannot be written: an argument, a package or a compiler that is missing, torch before
            2.13, or a model that answers otherwise in this form or that onnxruntime does not run.
        FileNotFoundError, OSError: nothing to read, or no place to write. What was at `out` before stays, in any case.
    """
    check_type("model", model, (nn.Module, str, os.PathLike), "a model, a file, a URL or a name of the zoo")
    inputs = [] if isinstance(model, nn.Module) else [model]
    kind, out = _check_request(format, out, dtype, batch, opset, inputs, calibrated=calibrate is not None)
    card, tensors, _ = weights_of(model)
    named = "the model" if isinstance(model, nn.Module) else os.fspath(model)  # as messages do
    if r is not None:
        card = replace(card, r=r)

    with progress_bar(desc="reading", total=5, bar_format="{desc} {elapsed}") as bar:

        def now(what: str) -> None:
            bar.set_description(what)
            bar.update()

        with torch.no_grad(), _folder_for(out) as folder:
            reference = checkpoint.assemble(card, {name: t.float() for name, t in tensors.items()}, named)
            matchings = {step.matching or card.config.matching for step in reference.steps() if step.total}
            if "random" in matchings:
                raise ValueError(
                    "matching='random' draws anew at every call, and a program answers the same each time: "
                    "create the model with matching='bipartite', and name no random matching in r"
                )
            ends = "float32" if dtype in kind.float32_ends else dtype
            kept = DTYPES[ends]
            exact = checkpoint.assemble(card, {name: t.to(kept) for name, t in tensors.items()}, named)
            runs = from_pixels(exact) if raw else exact
            metadata = describe_program(reference, dtype, batch, raw, ends=ends)
            batches: list[Tensor] = []
            if calibrate is not None:
                now("reading images")
                batches = _calibration(card, calibrate, batch or AT_ONCE, raw)
            images = _generated(card, batch or 2, raw).to(exact.device, None if raw else kept)
            now("tracing")
            program = trace(runs, images, dynamic=batch is None)
            now("writing")
            kind.write(program, folder / out.name, metadata, Settings(dtype, opset, batches))
            now("comparing")
            counts = [batch] if batch else [1, AT_ONCE if batches else 3]
            if batches:
                given, source = [batches[0][:count] for count in counts], "calibration"
            else:
                given, source = [_generated(card, n, raw).to(None if raw else kept) for n in counts], "generated"
            parity = _compare(reference, kind, folder / out.name, dtype, given, source)
            written = _put_in_place(folder, out)
    return Program(written, metadata, parity)


def _check_request(
    format: str,  # noqa: A002
    out: str | os.PathLike[str],
    dtype: str,
    batch: int | None,
    opset: int | None,
    inputs: Sequence[str | os.PathLike[str]],
    *,
    calibrated: bool,
) -> tuple[Kind, Path]:
    """What can be known to be wrong before anything is read, as `export_program` says it."""
    check_type("format", format, str, "the name of one")
    check_type("batch", batch, int | None, "a number of images, or None for any")
    if format not in PROGRAMS:
        raise ValueError(f"there is no program format {format!r}; there are {', '.join(PROGRAMS)}")
    kind, out = PROGRAMS[format], check_output(out, inputs=inputs, writable=True)
    suffix, *beside = kind.suffixes
    if out.suffix != suffix:
        raise ValueError(f"{out.name} must end in {suffix}, as a program of format {format} does")
    for other in map(out.with_suffix, beside):
        if check_output(other, inputs=inputs).exists() and not out.exists():
            raise ValueError(f"{other} is there without {out.name}, and would be replaced: name another file to write")
    if dtype not in kind.dtypes:
        raise ValueError(f"dtype is {dtype!r}, and a program of format {format} is of {join_with_or(kind.dtypes)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, and must be a number of images, or None for any")
    if calibrated and dtype != "int8":
        raise ValueError(f"images to calibrate with are for int8, and dtype is {dtype!r}")
    if kind.needs_calibration and dtype == "int8" and not calibrated:
        raise ValueError(f"int8 for {format} takes images to calibrate with: calibrate=images, or --calibrate FOLDER")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset is ONNX's, and the format is {format}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        raise ValueError(f"programs need torch {least} or later, and this is {torch.__version__}: pip install -U torch")
    kind.check(opset, dtype)
    return kind, out


def describe_program(
    model: VisionTransformer, dtype: str, batch: int | None, raw: bool, *, ends: str | None = None
) -> dict[str, str]:
    """What a program says of itself: flat, each value a text or JSON.

    Args:
        ends: the dtype of images and output; None: dtype.
    """
    card, config, preprocess = model.card, model.config, model.card.preprocess
    count = "batch" if batch is None else str(batch)
    io = ends or dtype
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


def _generated(card: Card, count: int, raw: bool) -> Tensor:
    """Generated images: pixels, or normalised."""
    generator = torch.Generator().manual_seed(count)
    shape = (count, card.config.in_chans, *card.config.img_size)
    if raw:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu")
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _calibration(card: Card, calibrate: Tensor | Callable[[Transform], Tensor], size: int, raw: bool) -> list[Tensor]:
    """Batches as a program takes them, all of one size: the last is filled up with the first images."""
    config, preprocess = card.config, card.preprocess
    images = calibrate if isinstance(calibrate, Tensor) else calibrate(Transform(preprocess, config.img_size))
    shape = (config.in_chans, *config.img_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"images to calibrate with are a {images.dtype} tensor of shape {tuple(images.shape)}, and must be "
            f"floating point, (N, {', '.join(map(str, shape))}), as tomevit.transform(model) prepares them"
        )
    images = images.detach().to("cpu", torch.float32)
    if not images.isfinite().all():
        raise ValueError("images to calibrate with have values that are not finite")
    if raw:
        mean, std = _per_channel(preprocess)
        images = images.mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    rows = torch.arange(-(-len(images) // size) * size, device="cpu") % len(images)
    return list(torch.split(images[rows], size))


def _per_channel(preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Mean and std, (C, 1, 1) each."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None]
        for values in (preprocess.mean, preprocess.std)
    )
    return mean, std


def _compare(
    reference: VisionTransformer, kind: Kind, path: Path, dtype: str, batches: Sequence[Tensor], source: str
) -> Parity | None:
    loaded = kind.load(path)
    if loaded is None:
        return None
    runtime, run = loaded
    card, device = reference.card, reference.device
    mean, std = _per_channel(card.preprocess)
    found, expected = [], []
    for given in batches:
        found.append(run(given.to(device)).float().cpu())
        plain = given.div(255).sub(mean).div(std) if given.dtype == torch.uint8 else given.float()
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
    return Parity(runtime, len(ours), source, difference, largest, same, cosine)


@contextmanager
def _folder_for(out: Path) -> Iterator[Path]:
    """A directory for files of an output's name, on its disk: gone afterwards, with what is still in it."""
    with explain_os_errors(out):
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    with folder as name, explain_os_errors(out, Path(name) / out.name):
        yield Path(name)


def _put_in_place(folder: Path, out: Path) -> list[Path]:
    """Put the finished files in their places, once all are on that disk, and the one that is opened last."""
    files = sorted(folder.iterdir(), key=lambda file: file.name != out.name)
    with ExitStack() as drafts:  # which end in the opposite order
        for file in files:
            shutil.move(file, drafts.enter_context(new_file(out.with_name(file.name))))
    return [out.with_name(file.name) for file in files]

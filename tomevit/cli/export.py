"""Models for other software: `tomevit export`, weights in another project's format, or programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tomevit.cli.console import echo_json
from tomevit.cli.options import BATCH, FORMS_OF_R, Command, FilePath, R
from tomevit.cli.tables import show
from tomevit.data.images import find, prepare_image
from tomevit.deploy.programs import DTYPES, PROGRAMS, Program, export_program
from tomevit.errors import ImageError, join_with_or, nearest
from tomevit.transform import Transform
from tomevit.weights.export import export as export_weights
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import MAIN_FORMATS

MOST_IMAGES = 256  # to calibrate with
FORMAT_HELP = f"A program: {join_with_or(PROGRAMS)}. Or weights: {', '.join(FORMATS)}."


@click.command(cls=Command)
@click.argument("source")
@click.option("--format", "format_name", required=True, metavar="NAME", help=FORMAT_HELP)
@click.option(
    "-o",
    "--out",
    type=FilePath(),
    required=True,
    help="A file, or a directory for timm and transformers.",
)
@click.option("--r", type=R(), help=f"Of a program: how much merges; default: the model's own. An r: {FORMS_OF_R}.")
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES, "int8"]),
    help="Of a program; default float32. int8 (onnx, openvino): linear layers in 8 bits.",
)
@click.option("--batch", type=BATCH, help="Of a program: images per call; default: any number.")
@click.option("--opset", type=int, help="Of ONNX; default: what torch's exporter recommends.")
@click.option("--raw", is_flag=True, default=None, help="Of a program: it takes pixels, uint8, and normalises within.")
@click.option(
    "--calibrate",
    type=FilePath(),
    metavar="FOLDER",
    help=f"Of int8: images like those that it will see, of which up to {MOST_IMAGES} are drawn.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def export(
    source: str,
    format_name: str,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a model as a program that runs without tomevit, or its weights in another project's format.

    SOURCE is a file that tomevit wrote, or a name of the zoo with its weights. A program is a file that ends in .onnx,
    .xml (OpenVINO's, with a .bin beside it) or .pt2, and is run and compared with the model before it is put there. Of
    weights the suffix of OUT says what is written: .safetensors, .npz, or .pth, .pt, .bin, .torch; a directory gets
    model.safetensors and its config.json.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if format_name in PROGRAMS:
        if "calibrate" in given:
            given["calibrate"] = partial(_sample, given["calibrate"])
        program = export_program(source, out, format_name, **given)
        echo_json(_as_json(program)) if as_json else show(_lines(program), hanging=12)
        return
    if format_name not in FORMATS:
        known = [*PROGRAMS, *MAIN_FORMATS]
        choices = nearest(format_name, known, f"there are {', '.join(known)}")
        raise ValueError(f"there is no format {format_name!r}; {choices}")
    if given:
        raise ValueError(
            f"--{next(iter(given))} is for programs ({', '.join(PROGRAMS)}), and {format_name} is of weights"
        )
    written, unsaid = export_weights(source, out, format_name)
    if as_json:
        echo_json({"written": list(map(str, written)), "unsaid": unsaid})
        return
    lines = [*(f"written     {path}" for path in written), *(f"left out    {sentence}" for sentence in unsaid)]
    show(lines, hanging=12)


def _sample(folder: Path, transform: Transform) -> Tensor:
    """Images of a folder as a model takes them, (N, C, H, W): the same ones each time, and all if they are few.

    Raises:
        ValueError: there is no such folder, or no image in it.
        ImageError: one of them cannot be read.
    """
    files = find([folder])
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(0), device="cpu")[:MOST_IMAGES]
    images = []
    for i in sorted(drawn.tolist()):
        image = prepare_image(files[i], transform)
        if isinstance(image, str):
            raise ImageError(files[i], image)
        images.append(image)
    return torch.stack(images)


def _as_json(program: Program) -> dict[str, Any]:
    parity = program.parity._asdict() if program.parity else None
    return {"written": list(map(str, program.written)), "metadata": program.metadata, "parity": parity}


def _lines(program: Program) -> Iterator[str]:
    for path in program.written:
        yield f"written     {path}"
    metadata = program.metadata
    tokens = json.loads(metadata["tokens"])
    yield f"r           {metadata['r']}: {tokens[-1]} of {tokens[0]} tokens remain after the last block"
    for end in ("input", "output"):
        yield f"{end:12}{metadata[end]}"
    if program.parity is None:
        yield "compared    no: onnxruntime is not installed (pip install 'tomevit[export]')"
        return
    parity = program.parity
    alike = f"least cosine {parity.least_cosine:.6f}"
    if parity.same_top1 is not None:
        alike = f"same top-1 {parity.same_top1} of {parity.images}"
    yield (
        f"compared    {parity.runtime} with torch in float32, {parity.images} {parity.source} images: largest "
        f"difference {parity.difference:.2g} of values up to {parity.largest:.2g}, {alike}"
    )

"""From our models to the formats of other projects: the tables of `formats` read backwards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tomevit.config import Card
from tomevit.deploy.programs import PROGRAMS
from tomevit.models import VisionTransformer
from tomevit.output import check_output, new_file
from tomevit.weights import checkpoint as native
from tomevit.weights import rules
from tomevit.weights.convert import card_of_name, published
from tomevit.weights.foreign_configs import write_sidecars
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import check_format

#: Which container a file name asks for.
CONTAINERS = {".safetensors": "safetensors", ".npz": "npz"} | dict.fromkeys((".pth", ".pt", ".bin", ".torch"), "torch")


class Exported(NamedTuple):
    """What `export` did."""

    written: list[Path]
    unsaid: list[str]  # what the format has no words for, and was left out: sentences


def export(
    model: VisionTransformer | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,  # noqa: A002
) -> Exported:
    """Write a model's weights as another project names and lays them out.

    Args:
        model: a model, a file that tomevit wrote, or a name of the zoo.
        out: a file, whose suffix says what it is: .safetensors, .npz, or .pth, .pt, .bin, .torch for torch.save, which
            puts DeiT's and MAE's weights under "model" as those projects do. Or a directory, for timm and transformers:
            model.safetensors with the config.json (and preprocessor_config.json) by which they load it.
        format: a name in `tomevit.weights.formats.FORMATS`; for programs there is `tomevit.export_program`.

    Returns:
        What was written, and what the format has no words for.

    Raises:
        ValueError: the format cannot hold this model, or there is no such format or suffix.
        FileNotFoundError, OSError: nothing to read, or no place to write. A file is written whole or not at all.
    """
    if format in PROGRAMS:
        raise ValueError(f"{format} is a format of programs, not of weights: use tomevit.export_program")
    table, out = FORMATS[check_format(format)], Path(out)
    to_directory = out.is_dir() or not out.suffix
    if not to_directory:
        if out.suffix not in CONTAINERS:
            raise ValueError(f"{out.name} must end in {', '.join(CONTAINERS)}, or be a directory")
        check_output(out)
    if isinstance(model, VisionTransformer):
        card, named = native.card_of(model), {name: t.detach().cpu() for name, t in model.state_dict().items()}
    elif Path(model).exists():
        card, named, _ = native.read(model)
        if out.exists() and out.samefile(model):
            raise ValueError(f"{out} is the source itself: name another file to write")
    else:
        card, named, _ = published(card_of_name(os.fspath(model)))
    tensors = rules.from_native(table, named, card.config)

    sidecars = {}
    if to_directory:
        sidecars = write_sidecars(card, format)
        if not sidecars:
            raise ValueError(f"{format} has no directories of its own: name a file, as in {out / 'model.pth'}")
        out.mkdir(parents=True, exist_ok=True)
        out = out / "model.safetensors"
    try:
        with new_file(out) as unfinished:
            _WRITERS[CONTAINERS[out.suffix]](unfinished, tensors, table.container.partition(":")[2])
    except BaseException:
        if to_directory:
            with contextlib.suppress(OSError):
                out.parent.rmdir()  # if nothing was in it before
        raise
    beside = [out.with_name(name) for name in sidecars]
    for path in beside:
        with new_file(path) as unfinished:
            unfinished.write_text(json.dumps(sidecars[path.name], indent=2) + "\n", encoding="utf-8")
    return Exported([out, *beside], _unsaid(card, format))


def _safetensors(path: Path, tensors: dict[str, Tensor], _key: str) -> None:
    native.write_safetensors(path, tensors, lambda _: {"format": "pt"})  # as transformers insists


def _npz(path: Path, tensors: dict[str, Tensor], _key: str) -> None:
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        raise ValueError("an .npz file cannot hold bfloat16: convert the model to float32 or float16 first")
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


def _torch(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    torch.save({key: tensors} if key else tensors, path)


_WRITERS: dict[str, Callable[[Path, dict[str, Tensor], str], None]] = {
    "safetensors": _safetensors,
    "npz": _npz,
    "torch": _torch,
}


def _unsaid(card: Card, format: str) -> list[str]:  # noqa: A002
    sentences = []
    if card.r:
        sentences.append(f"{format} does not know merging: r = {card.r} is left out")
        if not card.config.prop_attn:
            sentences.append(f"{format} does not know merging: that attention is not proportional is left out")
    return sentences

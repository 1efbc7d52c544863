"""From our models to the formats of other projects: the tables of `formats` read backwards."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tomevit.cards import Card
from tomevit.errors import check_path, check_type
from tomevit.flops import plain_steps
from tomevit.output import check_output, make_directory, new_file
from tomevit.schedule import format_schedule
from tomevit.weights import checkpoint, rules
from tomevit.weights.convert import weights_of
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import MAIN_FORMATS
from tomevit.weights.side_files import configs_from_card

#: Which container a file name asks for.
CONTAINERS = {".safetensors": "safetensors", ".npz": "npz"} | dict.fromkeys((".pth", ".pt", ".bin", ".torch"), "torch")


class Exported(NamedTuple):
    """What `export` did."""

    written: list[Path]
    unsaid: list[str]  # what the format has no words for, and was left out: sentences


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,  # noqa: A002
) -> Exported:
    """Write a model's weights as another project names and lays them out.

    Args:
        model: a model, in a wrapper of torch's or not, or anything that `tomevit.convert` takes.
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
    check_type("format", format, str, "the name of one")
    check_type("model", model, (nn.Module, str, os.PathLike), "a model, a file, a URL or a name of the zoo")
    check_path("out", out, "the file or the directory to write")
    if format not in FORMATS:
        raise ValueError(
            f"there is no format {format!r} of weights; there are {', '.join(MAIN_FORMATS)}; "
            f"for programs use tomevit.export_program, or tomevit export"
        )
    table, out = FORMATS[format], Path(out)
    inputs = [] if isinstance(model, nn.Module) or not Path(model).exists() else [model]
    as_directory = out.is_dir() or not (out.suffix or out.exists())
    if as_directory:
        file, container = out / "model.safetensors", "safetensors"
    elif out.suffix in CONTAINERS:
        file, container = check_output(out, endings=tuple(CONTAINERS), inputs=inputs), CONTAINERS[out.suffix]
    else:
        raise ValueError(f"{out.name} must end in {', '.join(CONTAINERS)}, or be a directory")
    card, named, _ = weights_of(model)
    tensors = rules.from_native(table, {name: tensor.cpu() for name, tensor in named.items()}, card.config)
    configs = configs_from_card(card, format) if as_directory else {}
    if as_directory and not configs:
        raise ValueError(f"{format} has no directories of its own: name a file, as in {out / 'model.pth'}")

    made = [folder for folder in (out, *out.parents) if as_directory and not folder.exists()]
    try:
        if made:
            make_directory(out)
        with contextlib.ExitStack() as files:  # none is put in place before all are written
            for name, content in configs.items():
                draft = files.enter_context(new_file(out / name, inputs=inputs))
                draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            draft = files.enter_context(new_file(file, inputs=inputs))
            _WRITERS[container](draft, tensors, table.container.partition(":")[2])
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return Exported([file, *(out / name for name in configs)], _list_unsaid(card, format))


def _write_safetensors(path: Path, tensors: dict[str, Tensor], _key: str) -> None:
    checkpoint.write_safetensors(path, tensors, lambda _: {"format": "pt"})  # as transformers insists


def _write_npz(path: Path, tensors: dict[str, Tensor], _key: str) -> None:
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        raise ValueError("an .npz file cannot hold bfloat16: convert the model to float32 or float16 first")
    with path.open("wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


def _write_torch(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    torch.save({key: tensors} if key else tensors, path)


_WRITERS = {"safetensors": _write_safetensors, "npz": _write_npz, "torch": _write_torch}


def _list_unsaid(card: Card, format: str) -> list[str]:  # noqa: A002
    sentences = []
    if any(step.total for step in plain_steps(card.r, card.config, card.presets)):
        sentences.append(f"{format} does not know merging: r = {format_schedule(card.r)} is left out")
        if not card.config.prop_attn:
            sentences.append(f"{format} does not know merging: that attention is not proportional is left out")
    return sentences

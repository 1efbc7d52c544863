"""tomevit's own file: safetensors that describe themselves.

Tensors have the names of the model's parameters. The metadata has one entry, `tomevit`, in JSON:

    version   of this format
    card      the Card with the whole Config, so that nothing else is needed to build, feed and understand the model
    sha256    of the tensors, as `digest` has it, so that damage shows

Equal models make equal files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tomevit.config import Card, Config, Figure, Preprocess, Schedule, Source
from tomevit.errors import CheckpointError
from tomevit.layers.matching import find_matching
from tomevit.layers.schedule import check_schedule
from tomevit.models import VisionTransformer, build_meta

KEY = "tomevit"
VERSION = 2

#: safetensors' names
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Described(NamedTuple):
    """What a file of tomevit's own holds."""

    card: Card
    tensors: dict[str, Tensor]  # mapped into memory, not read
    sha256: str | None  # what `digest` of the tensors must be; None in files of version 1


def save(model: VisionTransformer, path: str | os.PathLike[str], *, card: Card | None = None) -> None:
    """Write a model with all that is needed to build, feed and understand it into one safetensors file.

    The file appears whole or not at all.

    Args:
        model: on any device, in any floating dtype.
        path: the file; its directory must exist.
        card: instead of the model's own. The architecture and r always come from the model.

    Raises:
        ValueError: the model merges by a function of your own, which a file cannot hold.
        OSError: the file cannot be written; what was there before is untouched.
    """
    write(path, card_of(model, card), model.state_dict())


def card_of(model: VisionTransformer, card: Card | None = None) -> Card:
    """The model's card, or another, with the architecture and r as the model has them now."""
    return replace(card or model.card, config=model.config, r=model.r)


def write(
    path: str | os.PathLike[str], card: Card, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> None:
    """Write tensors and their card, one tensor after the other: memory holds one copy of one tensor at a time.

    Raises:
        ValueError, OSError: as `save`.
    """
    if callable(card.config.matching):
        raise ValueError(
            f"a file cannot hold the function {card.config.matching!r}: save a model whose matching has a name, "
            f"and pass the function to create() when loading"
        )

    def metadata(sha256: str) -> dict[str, str]:
        return {KEY: json.dumps({"version": VERSION, "card": _card_to_json(card), "sha256": sha256})}

    with draft(path) as unfinished:
        write_safetensors(unfinished, tensors, metadata, dtype)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Callable[[str], dict[str, str]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file, one tensor after the other.

    safetensors' own writer wants every tensor contiguous and in its dtype at once, which can double the memory.

    Args:
        path: the file.
        tensors: of any floating dtype, on any device.
        metadata: from the tensors' digest, of the same length for every digest.
        dtype: None: each tensor's own.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in in_order(tensors):
        becomes = dtype or tensor.dtype
        if becomes not in DTYPES:
            raise ValueError(f"{name} is {becomes}, and a file holds {', '.join(map(str, DTYPES))}")
        end = offset + tensor.numel() * becomes.itemsize
        header[name] = {"dtype": DTYPES[becomes], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end

    def encode(sha256: str) -> bytes:
        text = json.dumps({"__metadata__": metadata(sha256), **header}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with path.open("wb") as file:
        file.write(encode("0" * 64))
        stored = ((name, tensor.detach().to("cpu", dtype).contiguous()) for name, tensor in in_order(tensors))
        sha256 = digest(stored, file.write)
        file.seek(0)
        file.write(encode(sha256))


def in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As they lie in a file: wide dtypes first, so that each is aligned, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def digest(tensors: Iterable[tuple[str, Tensor]], also: Callable[[Any], Any] = lambda _: None) -> str:
    """The sha256 of names, dtypes, shapes and values, in order.

    Args:
        tensors: contiguous, on the CPU, as `in_order` has them.
        also: is given the bytes of each.
    """
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        values = tensor.reshape(-1).view(torch.uint8).numpy().data
        sha.update(values)
        also(values)
    return sha.hexdigest()


@contextmanager
def draft(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends well, and vanishes otherwise."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name the file to write")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} into")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> VisionTransformer:
    """The model in a file that `save` wrote, in evaluation mode, on the CPU, in the file's dtype.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a file of tomevit's, or one of a newer version, or damaged.
    """
    card, tensors, _ = read(path)
    return assemble(card, tensors, path)


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that tomevit wrote it, as far as its header can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read(path: str | os.PathLike[str]) -> Described:
    """The card and the tensors of a file that `save` wrote.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            card, sha256 = _read_metadata(path, file.metadata() or {})
            return Described(card, {name: file.get_tensor(name) for name in file.keys()}, sha256)  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error


def assemble(card: Card, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> VisionTransformer:
    """A model of the card's config over these very tensors: nothing is initialised, nothing copied.

    Raises:
        CheckpointError: names or shapes do not fit; the message shows both sides.
    """
    model = build_meta(card.config, card.r)
    check_fit({name: tuple(p.shape) for name, p in model.state_dict().items()}, tensors, path)
    model.load_state_dict(dict(tensors), assign=True)
    model.card = card
    return model.eval()


def check_fit(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raises CheckpointError, showing both sides, unless names and shapes are the same."""
    lines = []
    for name in sorted(wanted.keys() | tensors.keys()):
        ours, theirs = wanted.get(name), tuple(tensors[name].shape) if name in tensors else None
        if ours != theirs:
            lines.append(f"  {name}: model {ours or '—'}, file {theirs or '—'}")
    if lines:
        raise CheckpointError(f"{os.fspath(path)} does not fit the model:\n" + "\n".join(lines))


def _read_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> tuple[Card, str | None]:
    path = os.fspath(path)
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by tomevit: its metadata has no entry {KEY!r}; tomevit convert reads other formats"
        )
    try:
        described = json.loads(metadata[KEY])
        version = described["version"]
        if version not in range(1, VERSION + 1):
            raise ValueError(f"it is of format version {version!r}, and this tomevit reads up to {VERSION}: upgrade it")
        # Version 1 had neither the tensors' digest nor the card's origin, and a Source had neither revision nor file.
        return _card_from_json(described["card"]), described["sha256"] if version > 1 else None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _card_to_json(card: Card) -> dict[str, Any]:
    return asdict(card) | {"r": _schedule_to_json(card.r)}


def _card_from_json(data: dict[str, Any]) -> Card:
    config = Config(**_tuples(data["config"]))
    find_matching(config.matching)
    origin = data.get("origin")
    nested = {
        "config": config,
        "preprocess": Preprocess(**_tuples(data["preprocess"])),
        "r": check_schedule(_schedule_from_json(data["r"]), config.depth),
        "sources": tuple(Source(**source) for source in data["sources"]),
        "origin": None if origin is None else Source(**origin),
        "figures": tuple(Figure(**figure) for figure in data["figures"]),
    }
    return Card(**_tuples(data) | nested)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _schedule_to_json(r: Schedule) -> Any:
    return {"mean": r[0], "inflection": r[1]} if isinstance(r, tuple) else r


def _schedule_from_json(r: Any) -> Schedule:
    return (r["mean"], r["inflection"]) if isinstance(r, dict) else r

"""tomevit's own file: safetensors that describe themselves.

Tensors have the names of the model's parameters; what the metadata have is in `tomevit.cards`. Equal models make equal
files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from tomevit import zoo
from tomevit.cards import Card, Header, decode_header, encode_header, first_line
from tomevit.config import Config
from tomevit.errors import CheckpointError, NotRegularFileError, check_path
from tomevit.headers import read_header
from tomevit.models import VisionTransformer, build_meta, unwrap_transformer
from tomevit.opening import open_file
from tomevit.output import new_file
from tomevit.progress import progress_bar
from tomevit.weights.reading import explain_lack_of_memory, read_tensors
from tomevit.weights.rules import without_wrappers

#: Of tensors of which each process has a part.
SPREAD = {"DTensor", "ShardedTensor"}
MOST_LINES = 200  # of tensors that do not fit: a small file can have thousands
#: safetensors' names
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    card: Card | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model with all that is needed to build, feed and understand it into one safetensors file.

    The file appears whole or not at all.

    Args:
        model: on any device, in any floating dtype, in a wrapper of torch's or not.
        path: the file; its directory must exist.
        card: instead of the model's own. The architecture and r always come from the model.
        state_dict: instead of the model's own: the whole one of a model that is spread over processes.

    Raises:
        ValueError: the model merges by a function of your own, which a file cannot hold, or is none of ours, or not
            what its config says, or is spread over processes.
        OSError: the file cannot be written; what was there before is untouched.
    """
    inner = unwrap_transformer(model)
    tensors = state_dict_of(inner) if state_dict is None else state_dict
    check_whole(tensors)
    if state_dict is not None and (wrong := _find_misfits(_shapes(inner.config), state_dict)):
        raise ValueError(f"state_dict is of another model: {wrong[0][0]} is missing, left over or of another shape")
    write(path, card_of(inner, card), tensors)


def state_dict_of(model: VisionTransformer) -> dict[str, Tensor]:
    """A model's tensors by the names that they have where none of its blocks is in a wrapper of torch's."""
    return {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the weights are plain tensors, all in this process."""
    strange = sorted({type(tensor).__name__ for tensor in tensors.values()} - {"Tensor", "Parameter"})
    if not SPREAD.isdisjoint(strange):
        raise ValueError(
            f"the weights are of type {', '.join(strange)}; save takes those of a model spread over processes as "
            f"state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
        )
    if strange:
        raise ValueError(
            f"a file holds plain floating-point weights, and the model has some of type {', '.join(strange)}: save it "
            f"before it is quantised, and quantise what load returns"
        )


def card_of(model: VisionTransformer, card: Card | None = None) -> Card:
    """The model's card, or another, with the architecture and r as the model has them now.

    Raises:
        ValueError: layers were replaced, and the config does not say so: from it the model could not be built again.
    """
    if wrong := _find_misfits(_shapes(model.config), state_dict_of(model)):
        name, wanted, given = wrong[0]
        raise ValueError(
            f"the model is not what its config says: {name} is {given or 'missing'} and should be "
            f"{wanted or 'missing'}; for another number of classes use model.reset_classifier"
        )
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
    with new_file(path, endings=(".safetensors",)) as unfinished:
        write_safetensors(unfinished, tensors, lambda sha256: encode_header(Header(card, sha256)), dtype)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Callable[[str], dict[str, str]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file, one tensor after the other.

    safetensors' own writer wants all of them contiguous, in their dtype and on the CPU at once: that can double the
    memory, and before its release 0.8 always does.

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

    bar = progress_bar(desc="writing", total=offset, in_bytes=True)
    with path.open("wb") as file, bar:
        file.write(encode("0" * 64))
        stored = ((name, tensor.detach().to("cpu", dtype).contiguous()) for name, tensor in in_order(tensors))
        sha256 = digest(stored, lambda values: bar.update(file.write(values)))
        file.seek(0)
        file.write(encode(sha256))


def in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As they lie in a file: wide dtypes first, so that each is aligned, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def digest(tensors: Iterable[tuple[str, Tensor]], also: Callable[[Any], Any] = lambda _: None) -> str:
    """The sha256 of names, dtypes, shapes and values of contiguous tensors on the CPU, in the order of `in_order`.

    `also` is given the bytes of each.
    """
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(f"{name} {DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        values = tensor.reshape(-1).view(torch.uint8).numpy().data
        sha.update(values)
        also(values)
        del tensor, values  # or this copy would live until the next is made
    return sha.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The digest of tensors on any device, as a file of them records it."""
    return digest((name, tensor.detach().cpu().contiguous()) for name, tensor in in_order(tensors))


def load(path: str | os.PathLike[str]) -> VisionTransformer:
    """The model in a file that `save` wrote, in evaluation mode, on the CPU, in the file's dtype.

    Its weights are read into memory: what becomes of the file afterwards does not matter to the model.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a file of tomevit's, or one of a newer version, or damaged.
    """
    try:
        header, tensors = read(path)
    except FileNotFoundError as error:
        if not zoo.names_model(os.fspath(path)):
            raise
        raise FileNotFoundError(f"{error}; of the model: tomevit.create({path!r}, pretrained=True)") from None
    return assemble(header.card, tensors, path)


def read(
    path: str | os.PathLike[str], *, fitting: bool = True, mapped: bool = False
) -> tuple[Header, dict[str, Tensor]]:
    """What a file that `save` wrote says of itself, and its tensors.

    Args:
        path: the file.
        fitting: check that the tensors are those of the card's architecture.
        mapped: map them into memory instead of reading them: for files alone that nobody writes to.

    Raises:
        FileNotFoundError, CheckpointError: as `load`.
    """
    with open_own_file(path) as file:
        return read_open(file, fitting=fitting, mapped=mapped)


def open_own_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A file that may be one of ours, open for reading.

    Raises:
        FileNotFoundError: there is none, or a directory.
        CheckpointError: it is a pipe, a device or a socket.
    """
    check_path("path", path)
    path = os.fspath(path)
    try:
        return open_file(path)
    except NotRegularFileError as error:
        raise CheckpointError(f"{path} is not a regular file") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        directory = f": {path} is a directory" if Path(path).is_dir() else ""
        raise FileNotFoundError(f"there is no file {path}{directory}") from error


def read_open(file: BinaryIO, *, fitting: bool = True, mapped: bool = False) -> tuple[Header, dict[str, Tensor]]:
    """As `read`, of a file that is open and at its beginning."""
    path, before = file.name, os.fstat(file.fileno())
    try:
        with explain_lack_of_memory(path):
            metadata, stored = read_header(file)
            header = decode_header(path, metadata)
            tensors = read_tensors(file, stored, mapped=mapped)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of tomevit's own: it is damaged, or of another format, "
            f"which tomevit convert reads ({error})"
        ) from error
    if others := sorted({str(tensor.dtype) for tensor in tensors.values()} - set(map(str, DTYPES))):
        raise CheckpointError(f"{path} is damaged: weights are floating point, and it holds {', '.join(others)}")
    if (after := os.fstat(file.fileno())).st_size != before.st_size or after.st_mtime_ns != before.st_mtime_ns:
        raise CheckpointError(f"{path} was changed while it was read")
    if fitting:
        check_structure(header.card.config, tensors, path)
    return header, tensors


def assemble(card: Card, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> VisionTransformer:
    """A model of the card's config over these very tensors: nothing is initialised, nothing copied.

    Raises:
        CheckpointError: names or shapes do not fit; the message shows both sides.
    """
    check_structure(card.config, tensors, path)
    model = build_meta(card.config, card.r)
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():  # load_state_dict(assign=True), of which all is checked, in half the time
        module, _, parameter = name.rpartition(".")
        modules[module].register_parameter(parameter, nn.Parameter(tensor))
    model.card = card
    return model.eval()


def check_structure(config: Config, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError, showing both sides, unless tensors are those of a config's model.

    Nothing is built but one block: a config may come from a file that was made to do harm.
    """
    if config.depth > len(tensors):
        raise CheckpointError(f"{path} describes a model of {config.depth} blocks, and holds {len(tensors)} tensors")
    try:
        one = _shapes(replace(config, depth=1, drop_path=0.0))
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # torch, of numbers that it cannot hold
        raise CheckpointError(f"{path} describes a model that cannot be: {first_line(error)}") from error
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in one.items():
        in_block = name.removeprefix("blocks.0.")
        names = [name] if in_block == name else [f"blocks.{i}.{in_block}" for i in range(config.depth)]
        wanted |= dict.fromkeys(names, shape)
    if wrong := _find_misfits(wanted, tensors):
        lines = [f"  {name}: model {ours or '—'}, file {theirs or '—'}" for name, ours, theirs in wrong[:MOST_LINES]]
        lines += [f"  and {len(wrong) - MOST_LINES} more"] * (len(wrong) > MOST_LINES)
        raise CheckpointError(f"{path} does not fit the model:\n" + "\n".join(lines))


def _find_misfits(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> list[tuple[str, Any, Any]]:
    """The names of tensors that are missing, left over or of another shape, sorted: the shape wanted, the one given."""
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    names = sorted({name for name, _ in wanted.items() ^ given.items()})
    return [(name, wanted.get(name), given.get(name)) for name in names]


@lru_cache(maxsize=64)
def _shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in build_meta(config).state_dict().items()}

"""Open any checkpoint file safely: safetensors, npz, and what torch.save writes.

A file is recognised by its bytes, never by its name. No code of a checkpoint ever runs, and there is no flag to allow
it. Before any data is read, a file must show that it asks for no more memory than its size warrants. What comes out is
plain: names and dense tensors on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tomevit.errors import AmbiguousCheckpointError, CheckpointError, MissingOptionError, UnreadableError
from tomevit.headers import MOST_CHARACTERS, MOST_TENSORS, Stored, check_names, read_header
from tomevit.opening import open_file
from tomevit.weights.other_files import (
    DISTRIBUTED,
    TORCHSCRIPT,
    ZERO,
    describe_archive,
    describe_file,
    describe_text,
    is_part_of_distributed,
    shorten,
)
from tomevit.weights.pickles import MAX_DIMS, UNUSUAL, Storage, StoredArray, StoredTensor, Unknown, Walk, refused
from tomevit.weights.reading import check_room, explain_lack_of_memory, read_tensors, read_values
from tomevit.weights.shards import OpenFiles, open_files

#: Under these names a state dict lies in a torch checkpoint, also one in another.
STATE_DICTS = (
    *("model", "state_dict", "model_state", "model_state_dict", "module", "network", "teacher", "student"),
    # exponential moving averages
    *("model_ema", "model_ema_state_dict", "state_dict_ema", "ema", "ema_model", "ema_state_dict"),
)
#: Where the weights lie in a JAX archive. Other names are beside them: the optimizer, a text tower.
NPZ_PREFIXES = ("opt/target/", "params/img/", "params/")

#: The element types of .npy files that hold weights. numpy has no bfloat16: JAX writes it as two bytes of anything, V2.
NPY_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", "V2")
# numpy always writes the header in this form. Its own reader takes more: it evaluates whatever Python literal is there,
# which prints warnings for some, and raises MemoryError for others, as if the machine had no memory left.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|=])(\w{2,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d+, ?)*\d*)\), \}\s*",
    re.DOTALL,
)

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before zip archives (torch 1.6)
MAX_ENTRIES = 2**14  # of a zip archive
MAX_DIRECTORY = 2**22  # bytes of a zip archive's list of entries
ZIP_HEADER = 30  # bytes in front of a zip entry, at least
LEAST_SHARE = 4  # of a training run's file, at least one in so many bytes is of the model, and has to fit into memory
#: Names of tensors among which a model is looked for, of all state dicts together; each dict counts for so many more.
MAX_LOOKED_AT, LOOK = 2**18, 64
MAX_MODELS = 64  # state dicts to choose from
CHUNK = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights, and what was seen on the way to them."""

    path: str
    container: str  # "safetensors", "npz" or "torch"
    key: str  # where in the file the state dict lay: "" for a flat one, "model", "model_ema.module"
    prefix: str  # what was stripped off every name in an npz file: "", "opt/target/"
    tensors: dict[str, Tensor]  # dense, on the CPU, in memory of their own
    beside: tuple[str, ...] = ()  # what lay beside the tensors: "optimizer", "epoch", "args"
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors


def open_checkpoint(
    source: str | os.PathLike[str] | OpenFiles,
    *,
    key: str | None = None,
    holds_model: Callable[[Collection[str]], bool] = lambda _: False,
) -> Checkpoint:
    """Read the state dict of a checkpoint file, without running anything in it.

    Args:
        source: safetensors, npz, or what torch.save wrote, as a zip archive or (before torch 1.6) as a pickle; or the
            index of several such files, which lie beside it. A path, or what is open already.
        key: which state dict, as a dotted path ("model_ema"), where a file has several; for npz files with slashes
            ("params/txt"). "" is the top level. None: the only one there is.
        holds_model: whether tensors of these names are what is looked for. State dicts that are come before all others,
            wherever in a torch checkpoint they lie; without any, one is looked for under the usual names.

    Returns:
        Tensors in their own dtypes, float16 to float64 and integer buffers, under their names.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file.
        CheckpointError: the file is damaged, hostile, or no checkpoint; it asks for more memory or work than its size
            warrants; it holds no weights at `key`; it was changed meanwhile. The message says which.
        MemoryError: there is no room for it.
        MissingOptionError, AmbiguousCheckpointError: it has none that is recognised, or several, and `key` is None.
    """
    if not isinstance(source, OpenFiles):
        with open_files(Path(source)) as files:
            return open_checkpoint(files, key=key, holds_model=holds_model)
    with _telling_of(source.path, key):
        checkpoint = _read_files(source, key, holds_model)
        _check_tensors(checkpoint, source.size)
    source.check_unchanged()
    return checkpoint


def check_is_checkpoint(files: OpenFiles) -> None:
    """Look at the head of a file, and at what says where its values lie, whatever its size: before all of it is read.

    Raises:
        CheckpointError, MemoryError: as `open_checkpoint`, as far as that can be seen there.
    """
    with _telling_of(files.path, None):
        if not files.listed:
            _check_container(files.path, files.file)
        for path, file in files.parts.items():
            with _telling_of_part(path):
                _check_container(path, file)


def _check_container(path: Path, file: BinaryIO) -> None:
    match _find_container(path, file):
        case "zip":
            with _open_zip(file):
                check_room(path, file.seek(0, os.SEEK_END) // LEAST_SHARE)
        case "safetensors":
            _read_safetensors_header(file)
        case _:
            _walk_torch_legacy(file)
            check_room(path, file.seek(0, os.SEEK_END) // LEAST_SHARE)


@contextlib.contextmanager
def _telling_of(path: Path, key: str | None) -> Iterator[None]:
    """What is wrong in a file is told in one line, after its name."""
    try:
        with explain_lack_of_memory(path):
            yield
    except CheckpointError as error:
        error.args = (f"{path} {_printable_line(error)}",)
        if key is None and not isinstance(error, MissingOptionError):
            raise UnreadableError(*error.args) from error.__cause__
        raise
    except MemoryError:  # what the file asks for is warranted, but not to be had
        raise
    # The parsers of zip, of torch and of safetensors raise whatever a hostile file makes them raise.
    except Exception as error:
        raise UnreadableError(f"{path} is damaged: {_printable_line(error)}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5(path: str | os.PathLike[str]) -> str:
    """The MD5 of a file, as 32 hexadecimal digits: to compare with published ones, not for security."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_files(files: OpenFiles, key: str | None, holds_model: Callable[[Collection[str]], bool]) -> Checkpoint:
    if files.listed:
        return _read_listed(files, key or "")
    return _read_container(files.path, files.file, key, holds_model)


def _read_container(
    path: Path, file: BinaryIO, key: str | None, holds_model: Callable[[Collection[str]], bool]
) -> Checkpoint:
    match _find_container(path, file):
        case "zip":
            with _open_zip(file) as archive:
                names = archive.namelist()
                if all(name.endswith(".npy") for name in names):
                    return _read_npz(str(path), archive, key)
                return _read_torch_zip(str(path), file, archive, key, holds_model)
        case "safetensors":
            return _read_safetensors(str(path), file, key)
        case _:
            return _read_torch_legacy(str(path), file, key, holds_model)


def _find_container(path: Path, file: BinaryIO) -> str:
    """Which container a file is, by its first bytes: "zip", "safetensors" or "legacy"; the file is then at its start.

    Raises:
        CheckpointError: it is no checkpoint; the message says what it is.
    """
    file.seek(0)
    head = file.read(2**16)
    if is_part_of_distributed(str(path), head):
        raise CheckpointError(f"is {DISTRIBUTED}")
    found = "zip" if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) else None
    found = "legacy" if head.startswith(LEGACY) else found
    found = "safetensors" if head[7:9] == b"\0{" else found  # after the header's length, 8 bytes
    if found is None:
        raise CheckpointError(_describe_other_file(str(path), file, head))
    file.seek(0)
    return found


def _describe_other_file(path: str, file: BinaryIO, head: bytes) -> str:
    """What a file is that is no checkpoint."""
    if not head:
        return "is empty"
    file.seek(-min(8, len(head)), os.SEEK_END)
    if (known := describe_file(path, head, file.read())) is not None:
        return f"is {known}"
    if head.startswith(b"\x80") or re.match(rb"c[\w.]+\n[\w.]+\n", head):
        Walk(_memory_limit(len(head))).load(io.BytesIO(head))  # says what it wants to run
        return "is a pickle, but not one of torch.save's"
    if (text := describe_text(head)) is not None:
        return f"is {text}: the download went wrong"
    return f"is no checkpoint: it begins with {head[:8].hex(' ')}, as neither safetensors, npz nor torch files do"


# several files


def _read_listed(files: OpenFiles, key: str) -> Checkpoint:
    """What the files hold together that an index lists: each the tensors that the index says, and no others."""
    tensors: dict[str, Tensor] = {}
    beside: list[str] = []
    for (path, file), names in zip(files.parts.items(), files.listed.values(), strict=True):
        with _telling_of_part(path):
            part = _read_container(path, file, key, lambda _: False)
        if wrong := sorted(names ^ part.tensors.keys()):
            told = "is not in it, as the index says" if wrong[0] in names else "is in it, and the index does not say so"
            raise CheckpointError(f"lists {path.name}, and does not fit it: {wrong[0]!r} {told}")
        tensors |= part.tensors
        beside += part.beside
    return replace(part, path=str(files.path), tensors=tensors, beside=tuple(beside))


@contextlib.contextmanager
def _telling_of_part(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"lists {path.name}, which {error}") from error.__cause__


# safetensors


def _read_safetensors(path: str, file: BinaryIO, key: str | None) -> Checkpoint:
    if key:
        raise CheckpointError(f"has no state dict at {key!r}: safetensors files are flat")
    metadata, stored = _read_safetensors_header(file)
    try:
        tensors = read_tensors(file, stored)
    except ValueError as error:
        raise CheckpointError(f"is a damaged or truncated safetensors file: {error}") from error
    return Checkpoint(path, "safetensors", "", "", tensors, metadata=metadata)


def _read_safetensors_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Stored]]:
    file.seek(0)
    try:
        metadata, stored = read_header(file)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"is a damaged or truncated safetensors file: {error}") from error
    check_room(file.name, sum(each.end - each.start for each in stored.values()))
    return metadata, stored


# zip archives


@contextlib.contextmanager
def _open_zip(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """An archive whose entries lie side by side in the file and unpack to no more than its size warrants.

    Raises:
        CheckpointError: it is none, or neither torch's nor numpy's.
    """
    try:
        directory = _ListedAtOnce(file)
        archive = zipfile.ZipFile(directory)
        directory.most = sys.maxsize
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"is a damaged or truncated zip archive: {error}") from error
    with archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        size = os.fstat(file.fileno()).st_size
        if len(entries) > MAX_ENTRIES:
            raise CheckpointError(f"is a zip archive of {len(entries):,} entries; weights have fewer")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise CheckpointError("is a zip archive that has an entry twice")
        starts = [*(entry.header_offset for entry in entries), archive.start_dir]
        ends = [0, *(entry.header_offset + ZIP_HEADER + entry.compress_size for entry in entries)]
        # Readers of zip disagree about archives that begin later than their file.
        if starts[0] or any(end > start for end, start in zip(ends, starts, strict=True)):
            raise CheckpointError("is a damaged zip archive: its entries overlap, or something lies in front of them")
        for entry in entries:
            name, packing = repr(entry.filename), entry.compress_type
            if entry.flag_bits & 1 or packing not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CheckpointError(f"is a zip archive whose entry {name} is encrypted, or packed unusually")
            if packing == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
                raise CheckpointError(f"is a damaged zip archive: entry {name} has two sizes")
        if (total := sum(entry.file_size for entry in entries)) > _memory_limit(size):
            raise CheckpointError(f"is an archive bomb: {total:,} bytes packed into {size:,}")
        if not any(entry.CRC for entry in entries):
            # torch.serialization.set_crc32_options(False) writes 0 for every entry: there is nothing to compare with.
            for entry in entries:
                entry.CRC = None  # type: ignore[assignment]
        names = archive.namelist()
        if (length := max(map(len, names), default=0)) > MOST_CHARACTERS:
            raise CheckpointError(f"is a zip archive that has an entry whose name has {length:,} characters")
        if not (names and all(name.endswith(".npy") for name in names)):
            if (known := describe_archive(names)) is not None and known != TORCHSCRIPT:
                raise CheckpointError(f"is {known}")
            if not any(name.endswith("/data.pkl") for name in names):
                if known is not None:
                    raise CheckpointError(f"is {known}")
                raise CheckpointError(f"is a zip archive of {_list_names(names)}: neither torch's nor numpy's")
        yield archive


class _ListedAtOnce:
    """A file for zipfile, which reads the list of an archive's entries at once, whatever length it says."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.most = file, MAX_DIRECTORY
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self.most:
            raise zipfile.BadZipFile(f"its list of entries has {size:,} bytes")
        return self.file.read(size)


def _memory_limit(size: int) -> int:
    """Bytes of memory that a file of this size may ask for."""
    return 4 * size + 64 * 2**20


def _most_values(size: int) -> int:
    """Floating values that a file of this size may hold: in two bytes each, and some repeated or well compressed.

    In a mixture of dtypes each can take eight bytes later.
    """
    return size // 2 + 2**23


# npz


def _read_npz(path: str, archive: zipfile.ZipFile, key: str | None) -> Checkpoint:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    prefixes = NPZ_PREFIXES if key is None else (f"{key.rstrip('/')}/" if key else "",)
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), "")
    if key and not prefix:
        raise CheckpointError(f"has no weights at {key!r}; it has {_list_names(names)}")
    chosen = [name for name in names if name.startswith(prefix)]
    # As much of the other names as tells them from ours: "opt/state", "params/txt".
    depth = prefix.count("/")
    beside = dict.fromkeys("/".join(name.split("/")[:depth]) for name in names if not name.startswith(prefix))
    tensors = {name.removeprefix(prefix): _read_npy(archive, f"{name}.npy") for name in chosen}
    return Checkpoint(path, "npz", "", prefix, tensors, tuple(beside))


def _read_npy(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as file:
        start = file.read(10)
        start += file.read(int.from_bytes(start[8:], "little"))
        if not start.startswith(b"\x93NUMPY"):
            raise CheckpointError(f"is damaged: its entry {name!r} is no numpy array")
        if (header := NPY_HEADER.fullmatch(start)) is None:
            raise CheckpointError(f"holds {name!r}, no plain array of numbers (tomevit reads no Python objects)")
        order, code, fortran, dims = (part.decode() for part in header.groups())
        if code not in NPY_TYPES or (order == ">" and code[1] != "1"):
            raise CheckpointError(f"holds {name!r} of numpy's type {order + code!r}, which tomevit does not read")
        shape = tuple(int(n) for n in dims.split(",") if n.strip())
        size = math.prod(shape) * int(code[1])
        absurd = len(shape) > MAX_DIMS or max(shape, default=0) > _memory_limit(size)
        if absurd or size != archive.getinfo(name).file_size - len(start):
            raise CheckpointError(f"is damaged: {name!r} should be {code} of shape {shape}, but has another size")
        data = io.BytesIO()
        shutil.copyfileobj(file, data, CHUNK)  # to the end: that checks the sum
    dtype = np.dtype("i2" if code == "V2" else code)
    values = torch.from_numpy(np.ndarray(shape, dtype, data.getbuffer(), order="F" if fortran == "True" else "C"))
    return values.view(torch.bfloat16) if code == "V2" else values


# torch


def _read_torch_zip(
    path: str,
    file: BinaryIO,
    archive: zipfile.ZipFile,
    key: str | None,
    holds_model: Callable[[Collection[str]], bool],
) -> Checkpoint:
    entries = {entry.filename: entry for entry in archive.infolist()}
    root = archive.namelist()[0].split("/")[0]  # torch takes the first entry's
    if f"{root}/data.pkl" not in entries:
        raise CheckpointError(f"is a zip archive of {_list_names(entries)}, without {root}/data.pkl")
    scripted = describe_archive(entries) == TORCHSCRIPT
    packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
    if packed := [name for name in packed if not (scripted and name.startswith(f"{root}/code/"))]:
        raise CheckpointError(f"was packed anew: torch.save stores, and {packed[0]!r} is compressed")
    walk = Walk(_memory_limit(os.fstat(file.fileno()).st_size))
    try:
        tree = walk.load(io.BytesIO(archive.read(f"{root}/data.pkl")))
    except CheckpointError as error:
        if not scripted:
            raise
        raise CheckpointError(f"is {TORCHSCRIPT}") from error
    if scripted:
        tree = _list_scripted(tree)
        if not holds_model(_names_of_tensors(tree)):
            raise CheckpointError(f"is {TORCHSCRIPT}")
    for storage in walk.storages.values():
        entry = entries.get(f"{root}/data/{storage.key}")
        if entry is None or entry.file_size < storage.nbytes:
            raise CheckpointError(f"is damaged: {storage.numel} values are not in {root}/data/{storage.key}")
    for name in entries:
        with archive.open(name) as member:
            while member.read(CHUNK):  # to the end: that checks the sum
                pass
    swapped = f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder") != sys.byteorder.encode()

    def values(storage: Storage) -> Tensor:
        header = entries[f"{root}/data/{storage.key}"].header_offset
        file.seek(header + ZIP_HEADER - 4)  # the lengths of a name and of a field that lie between header and data
        start = header + ZIP_HEADER + sum(struct.unpack("<HH", file.read(4)))
        values = read_values(file, start, storage.numel, storage.dtype)
        if swapped:
            values.untyped_storage().byteswap(storage.dtype)  # type: ignore[no-untyped-call]
        return values

    return _select_state_dict(path, tree, walk.module, key, holds_model, cache(values))


def _list_scripted(module: Any) -> dict[str, Any]:
    """The tensors of a TorchScript module by their names in its state dict, and its own numbers beside them.

    Raises:
        CheckpointError: it holds more modules than any model, or itself.
    """
    listed: dict[str, Any] = {}
    modules: list[tuple[str, Any]] = [("", module)]
    for prefix, node in modules:  # which grows
        if len(modules) + len(listed) > MOST_TENSORS or len(prefix) > MOST_CHARACTERS:
            raise CheckpointError("is a TorchScript archive of more modules than any model has")
        for name, value in _children(node).items():
            if isinstance(value, Unknown):
                modules.append((f"{prefix}{name}.", value))
            elif _is_tensor(value) or (not prefix and type(value) in (int, float)):
                listed[f"{prefix}{name}"] = value
    return listed


def _read_torch_legacy(
    path: str, file: BinaryIO, key: str | None, holds_model: Callable[[Collection[str]], bool]
) -> Checkpoint:
    tree, walk, starts = _walk_torch_legacy(file)

    def values(storage: Storage) -> Tensor:
        return read_values(file, starts[storage.key], storage.numel, storage.dtype)

    return _select_state_dict(path, tree, walk.module, key, holds_model, cache(values))


def _walk_torch_legacy(file: BinaryIO) -> tuple[Any, Walk, dict[str, int]]:
    """What an old file holds, and where the values of each storage begin."""
    size = os.fstat(file.fileno()).st_size
    walk = Walk(_memory_limit(size))
    for _ in range(4):  # magic number, protocol version, system, object
        tree = walk.load(file)
    keys = walk.load(file)
    if type(keys) is not list or {str, *map(type, keys)} != {str} or sorted(keys) != sorted(walk.storages):
        raise CheckpointError("is damaged: its list of storages does not fit its tensors")
    starts = {}
    for name in keys:
        storage = walk.storages[name]
        if (count := file.read(8)) and count != struct.pack("<q", storage.numel):
            raise CheckpointError(f"is damaged: storage {name!r} has not the {storage.numel} values it should have")
        starts[name] = file.tell()
        end = starts[name] + storage.nbytes
        if not count or end > size:
            raise CheckpointError(f"is truncated: it has {size:,} bytes, and storage {name!r} ends at {end:,}")
        file.seek(end)
    if (left := size - file.tell()) > file.tell():
        raise CheckpointError(f"is damaged: {left:,} bytes follow the {file.tell():,} that are of it")
    return tree, walk, starts


def _select_state_dict(
    path: str,
    tree: Any,
    module: str | None,
    key: str | None,
    holds_model: Callable[[Collection[str]], bool],
    values: Callable[[Storage], Tensor],
) -> Checkpoint:
    """The state dict at a key, or the only one, out of everything that a torch checkpoint holds."""
    found = list(islice(_find_models(tree, holds_model), MAX_MODELS)) or _find_state_dicts(tree)
    if not found and module is not None:
        raise refused(module)
    if not found and (not isinstance(tree, Mapping) or (isinstance(tree, Unknown) and not tree)):
        raise CheckpointError(f"holds a {_kind_of(tree)}, not a state dict")
    if key is None:
        if not found:
            _check_for_zero(tree)
            message = f"has no state dict where tomevit looks; it has {_list_names(tree)}: name one with key= (--key)"
            raise MissingOptionError(message, "key")
        if len(found) > 1:
            message = f"has several state dicts, {_list_names(found)}: name one with key= (--key)"
            raise AmbiguousCheckpointError(message, "key", found)
        key = found[0]
    node, beside = _follow_key(tree, key)
    state = _children(node)
    names = _names_of_tensors(state)
    if not names:
        raise CheckpointError(f"has no state dict at {key!r}; it has {_list_names(found or tree)}")
    check_names(names)
    tensors = {name: _as_tensor(state[name], values) for name in names}
    if not any(tensor.numel() for tensor in tensors.values()):
        _check_for_zero(tree)
    beside += [_join_key(key, name) for name in state if name not in tensors]
    if len(beside) > MOST_TENSORS:
        raise CheckpointError(f"has {len(beside):,} names beside its tensors, which no checkpoint has")
    return Checkpoint(path, "torch", key, "", tensors, tuple(shorten(name, MOST_CHARACTERS) for name in beside))


def _find_models(tree: Any, holds_model: Callable[[Collection[str]], bool]) -> Iterator[str]:
    """The dotted paths of the state dicts that hold a model, whatever they are called."""
    nodes: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    holding: dict[int, bool] = {}
    looked_at = 0
    for path, node in nodes:  # which grows; but each is looked into once: a pickle's dict can contain itself
        if id(node) not in holding:
            children = _children(node)
            names = _names_of_tensors(children)
            looked_at += len(names) + LOOK if names else 0
            holding[id(node)] = 0 < len(names) <= MOST_TENSORS and looked_at <= MAX_LOOKED_AT and holds_model(names)
            nodes += [
                ((*path, name), child)
                for name, child in children.items()
                if len(path) < 8 and type(name) is str and len(name) <= MOST_CHARACTERS
                if isinstance(child, (list, tuple, Mapping)) and child
            ]
        if holding[id(node)]:
            yield ".".join(path)


def _find_state_dicts(tree: Any) -> list[str]:
    """The dotted paths of the state dicts under their usual names; a dict that has some inside is none itself."""

    @cache
    def has_tensors(node: int) -> bool:
        return bool(_names_of_tensors(nodes[node]))

    def find(node: Any, key: str, depth: int) -> list[str]:
        if not isinstance(node, Mapping):
            return []
        nodes[id(node)] = node
        within = [(name, node[name]) for name in STATE_DICTS if name in node] if depth else []
        inside = [path for name, child in within for path in find(child, _join_key(key, name), depth - 1)]
        return inside or ([key] if has_tensors(id(node)) else [])

    nodes: dict[int, Mapping[Any, Any]] = {}
    return find(tree, "", 4)  # no deeper: a pickle's dict can contain itself


def _children(node: Any) -> Mapping[Any, Any]:
    """What lies in a dict, by name, or in a list, by number; in all else nothing does."""
    if type(node) in (list, tuple):
        return {str(i): child for i, child in enumerate(node)}
    return node if isinstance(node, Mapping) else {}


def _names_of_tensors(state: Mapping[Any, Any]) -> list[str]:
    return [name for name, value in state.items() if isinstance(name, str) and _is_tensor(value)]


def _follow_key(tree: Any, key: str) -> tuple[Any, list[str]]:
    """What lies at a dotted path, and the paths beside it; names may have dots themselves."""
    above, beside = "", []
    while key:
        parts, children = key.split("."), _children(tree)
        heads = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        head = next((head for head in heads if head in children), None)
        if head is None:
            there = _list_names(children) if children else "a value"
            raise CheckpointError(
                f"has nothing at {_join_key(above, key)!r}; {f'at {above!r} ' if above else ''}it has {there}"
            )
        beside += [_join_key(above, name) for name in children if name != head]
        above, tree, key = _join_key(above, head), children[head], key[len(head) + 1 :]
    return tree, beside


def _is_tensor(value: Any) -> bool:
    if isinstance(value, StoredArray):
        return value.content is not None and value.content[1][:2] not in (">u", ">i", ">f")
    return isinstance(value, StoredTensor) or (isinstance(value, Unknown) and value.name in UNUSUAL)


def _as_tensor(value: Any, values: Callable[[Storage], Tensor]) -> Tensor:
    if isinstance(value, Unknown):
        raise CheckpointError(f"holds {UNUSUAL[value.name]}; tomevit reads plain ones")
    if isinstance(value, StoredTensor):
        return values(value.storage).as_strided(value.size, value.stride, value.offset)
    shape, code, fortran, data = value.content
    return torch.from_numpy(np.ndarray(shape, code, bytearray(data), order="F" if fortran else "C"))


def _kind_of(tree: Any) -> str:
    return {StoredTensor: "Tensor", StoredArray: "numpy array", Unknown: getattr(tree, "name", "")}.get(
        type(tree), type(tree).__name__
    )


def _check_for_zero(tree: Any) -> None:
    """DeepSpeed's ZeRO leaves a part of the weights in each of its files."""
    if isinstance(tree, Mapping) and not tree.keys().isdisjoint(("ds_version", "ds_config")):
        raise CheckpointError(f"is {ZERO}")


# all containers


def _check_tensors(checkpoint: Checkpoint, size: int) -> None:
    """Raises CheckpointError if there are none, or more than a file of this size has, or some tomevit cannot use."""
    if not checkpoint.tensors:
        raise CheckpointError("has no tensors")
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"has {name!r} as {tensor.dtype}, {tensor.layout}; tomevit reads dense real tensors")
    values = sum(tensor.numel() for tensor in checkpoint.tensors.values() if tensor.is_floating_point())
    if values > _most_values(size):
        raise CheckpointError(f"asks for more memory than its size warrants: {values:,} values from {size:,} bytes")


def _join_key(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _list_names(names: Iterable[Any]) -> str:
    names = list(names)
    texts = [shorten(repr(name[:80] if isinstance(name, str) else name), 80) for name in names[:8]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(texts) or "nothing") + more


def _printable_line(error: Exception) -> str:
    """What an error says, in one line that a hostile file cannot make long or colourful."""
    lines = str(error).splitlines() or [type(error).__name__]
    return "".join(char if char.isprintable() else "?" for char in shorten(lines[0], 600))

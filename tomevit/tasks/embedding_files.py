"""Files of embeddings: one vector and one key for each image.

    found = tomevit.tasks.embedding_files.read("photographs.safetensors")      # or .parquet
    found.vectors @ found.vectors[0]; found.keys[0]

A .safetensors file has these tensors, and in its metadata, under `tomevit_embeddings`, what it was made of and what
could not be read, in JSON:

    key_ends    (N,) int64, where each key ends in `keys`
    shard       (N,) int32, of WebDataset: the place of each one's shard among `shards` in the metadata
    embeddings  (N, D) float32 or float16
    keys        (bytes,) uint8, all keys one after the other in UTF-8

A .parquet file has the columns key, embedding (a list of fixed size) and, of WebDataset, shard (its name), and the same
metadata. A key is an image's path as it was found, or its sample's key in WebDataset.

Both are joined from parts, which are .safetensors files of the same kind: never are all vectors in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomevit.data.images import Strings
from tomevit.errors import NotRegularFileError
from tomevit.opening import open_file

if TYPE_CHECKING:
    import pyarrow as pa

KEY = "tomevit_embeddings"
VERSION = 1
SUFFIXES = (".safetensors", ".parquet")
DTYPES = {"float32": (torch.float32, "F32"), "float16": (torch.float16, "F16")}

#: What the metadata of every file has.
REQUIRED = {"version", "rows", "dim", "dtype", "num_unreadable", "unreadable"}
#: What comes of metadata that make no sense.
SENSELESS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

#: Bytes of vectors that parquet keeps together.
ROW_GROUP = 2**25


class Embeddings(NamedTuple):
    """What is in a file."""

    vectors: Tensor  # (N, D) float32 or float16; of .safetensors mapped into memory, not read
    keys: Strings
    shard: Tensor | None  # (N,) int32, the place of each one's shard among info["shards"]; None if there are none
    info: dict[str, Any]  # what they were made of, and what could not be read


def read(path: str | PathLike[str]) -> Embeddings:
    """The embeddings in a file that `tomevit.tasks.embed.embed` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or another kind of file, or parquet, and pyarrow is not installed.
    """
    info = read_info(path)
    try:
        if Path(path).suffix == ".parquet":
            return _read_parquet(path, info)
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            keys, ends = file.get_tensor("keys").numpy(), file.get_tensor("key_ends").numpy()
            shard = file.get_tensor("shard") if "shards" in info else None
            return Embeddings(file.get_tensor("embeddings"), _strings(keys, ends), shard, info)
    except (SafetensorError, *SENSELESS) as error:
        raise _no_embeddings(path) from error


def read_info(path: str | PathLike[str]) -> dict[str, Any]:
    """The metadata of a file, as `read`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {fspath(path)}")
    text = (_parquet_metadata if Path(path).suffix == ".parquet" else _metadata)(path)
    if text is None:
        raise _no_embeddings(path)
    try:
        info: dict[str, Any] = json.loads(text)
        newer, known = info["version"] > VERSION, info.keys() >= REQUIRED
    except SENSELESS as error:
        raise _no_embeddings(path) from error
    if newer:
        raise ValueError(f"{fspath(path)} is of format version {info['version']}; this tomevit reads {VERSION}")
    if not known:
        raise _no_embeddings(path)
    return info


def _no_embeddings(path: str | PathLike[str]) -> ValueError:
    return ValueError(f"{fspath(path)} holds no embeddings of tomevit's, or is damaged")


def _metadata(path: str | PathLike[str]) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):
        return None


def _strings(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> Strings:
    return Strings.packed(data, np.concatenate([np.zeros(1, np.int64), ends]))


# --------------------------------------------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """What the metadata of a part says."""

    rows: int
    unreadable: list[tuple[str, str]]  # names and reasons
    last: bool  # of its shard

    @property
    def images(self) -> int:
        """How many there were, read or not."""
        return self.rows + len(self.unreadable)


def write_part(path: Path, vectors: Tensor, keys: Sequence[str], unreadable: list[tuple[str, str]], last: bool) -> None:
    """Write a part: vectors (N, D), and the rest as `Part` has it."""
    strings = Strings(keys)
    tensors = {
        "embeddings": vectors,
        "keys": torch.from_numpy(strings.data.copy()),
        "key_ends": torch.from_numpy(strings.ends[1:].copy()),
    }
    info = {"version": VERSION, "rows": len(keys), "unreadable": unreadable, "last": last}
    save_file(tensors, path, {KEY: json.dumps(info)})


def read_part(path: Path) -> Part | None:
    """What a part holds; None if it is not there, or not whole.

    Raises:
        NotRegularFileError: something that waits for ever lies there.
    """
    try:
        with open_file(path), safe_open(path, framework="np") as file:
            info = json.loads(file.metadata()[KEY])
            part = Part(info["rows"], [(name, reason) for name, reason in info["unreadable"]], info["last"])
            ends, keys, vectors = map(file.get_slice, ("key_ends", "keys", "embeddings"))
            rows = vectors.get_shape()[0]
            # The last end is 0 in a file that lost what it held when the power failed.
            length = int(ends[rows - 1 : rows][0]) if rows else 0
            whole = (ends.get_shape(), keys.get_shape(), part.rows) == ([rows], [length], rows)
            return part if whole else None
    except NotRegularFileError:
        raise
    except (OSError, SafetensorError, *SENSELESS):
        return None


# ------------------------------------------------------------------------------------------------------------- joining


def join(
    path: Path,
    suffix: str,
    parts: Mapping[Path, int],
    info: Mapping[str, Any],
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the rows of parts, one part after the other, into one file.

    Args:
        path: the file.
        suffix: its kind, one of SUFFIXES, whatever the path's.
        parts: in order, each with the place of its shard.
        info: the metadata, with rows, dim, dtype, and shards if there are any.
        progress: told the number of rows that were written since the last call.
    """
    info = {"version": VERSION, **info}
    (_join_parquet if suffix == ".parquet" else _join_safetensors)(path, parts, info, progress)


def _join_safetensors(
    path: Path, parts: Mapping[Path, int], info: Mapping[str, Any], progress: Callable[[int], object]
) -> None:
    rows, dtype = info["rows"], DTYPES[info["dtype"]]
    size = sum(len(_array(part, "keys")) for part in parts)
    tensors: dict[str, tuple[str, list[int], int]] = {
        "key_ends": ("I64", [rows], 8),
        **({"shard": ("I32", [rows], 4)} if "shards" in info else {}),
        "embeddings": (dtype[1], [rows, info["dim"]], dtype[0].itemsize),
        "keys": ("U8", [size], 1),
    }  # wide ones first, so that each is aligned
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(info)}}
    offset = 0
    for name, (kind, shape, itemsize) in tensors.items():
        end = offset + int(np.prod(shape)) * itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        before = 0
        for part in parts:
            ends = _array(part, "key_ends")
            file.write((ends + before).tobytes())
            before += int(ends[-1]) if len(ends) else 0
        if "shards" in info:
            for part, shard in parts.items():
                file.write(np.full(len(_array(part, "key_ends")), shard, np.int32).tobytes())
        for part in parts:
            vectors = _array(part, "embeddings")
            file.write(vectors.tobytes())
            progress(len(vectors))
        for part in parts:
            file.write(_array(part, "keys").tobytes())


def _array(part: Path, name: str) -> NDArray[Any]:
    with safe_open(part, framework="np") as file:
        array: NDArray[Any] = file.get_tensor(name)
        return array


# ------------------------------------------------------------------------------------------------------------- parquet


def _join_parquet(
    path: Path, parts: Mapping[Path, int], info: Mapping[str, Any], progress: Callable[[int], object]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = pa.float32() if info["dtype"] == "float32" else pa.float16()
    columns = {"key": pa.large_string(), **({"shard": pa.large_string()} if "shards" in info else {})}
    columns["embedding"] = pa.list_(number, info["dim"])
    schema = pa.schema(list(columns.items()), metadata={KEY: json.dumps(info)})

    def table(part: Path, shard: int) -> pa.Table:
        vectors, keys = _array(part, "embeddings"), _arrow_strings(_array(part, "keys"), _array(part, "key_ends"))
        arrays = [keys, pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), info["dim"])]
        if "shards" in info:
            arrays.insert(1, pa.array([info["shards"][shard]] * len(keys), pa.large_string()))
        return pa.Table.from_arrays(arrays, schema=schema)

    # Numbers of a vector repeat too rarely for a dictionary.
    with pq.ParquetWriter(path, schema, use_dictionary=["shard"] if "shards" in info else False) as writer:
        rows = ROW_GROUP // (info["dim"] * DTYPES[info["dtype"]][0].itemsize)
        for group in _groups((table(part, shard) for part, shard in parts.items()), rows):
            whole = pa.concat_tables(group).combine_chunks()
            writer.write_table(whole, row_group_size=max(1, len(whole)))
            progress(len(whole))


def _groups(tables: Iterator[pa.Table], rows: int) -> Iterator[list[pa.Table]]:
    """Tables that follow each other, with so many rows at least, but for the last."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= rows:
            yield group
            group = []
    if group:
        yield group


def _arrow_strings(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> pa.Array:
    """Keys as parquet must have them; bytes that are no UTF-8, as names of files may hold, become question marks."""
    import pyarrow as pa

    strings = _strings(data, ends)
    try:
        data.tobytes().decode()
    except UnicodeDecodeError:
        return pa.array([key.encode(errors="replace").decode() for key in strings], pa.large_string())
    return pa.LargeStringArray.from_buffers(len(strings), pa.py_buffer(strings.ends), pa.py_buffer(data))


def _read_parquet(path: str | PathLike[str], info: dict[str, Any]) -> Embeddings:
    import pyarrow.parquet as pq

    table = pq.read_table(path, memory_map=True)
    chunks = [chunk.flatten().to_numpy() for chunk in table["embedding"].chunks]
    dtype = np.float32 if info["dtype"] == "float32" else np.float16
    vectors = np.concatenate([np.empty(0, dtype), *chunks]).reshape(-1, info["dim"])
    shard = None
    if "shards" in info:
        places = {name: place for place, name in enumerate(info["shards"])}
        shard = torch.tensor([places[name] for name in table["shard"].to_pylist()], dtype=torch.int32, device="cpu")
    return Embeddings(torch.from_numpy(vectors), Strings(table["key"].to_pylist()), shard, info)


def _parquet_metadata(path: str | PathLike[str]) -> str | None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("parquet needs pyarrow: pip install 'tomevit[parquet]'") from error
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    text = metadata.get(KEY.encode())
    return None if text is None else text.decode(errors="replace")

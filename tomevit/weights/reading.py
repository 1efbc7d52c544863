"""Values from a file into memory of their own: whatever becomes of the file afterwards, they stay."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tomevit.headers import Stored
from tomevit.private import lacks_memory

#: By safetensors' names.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def check_room(path: str | os.PathLike[str], size: int) -> None:
    """Raises MemoryError if this process cannot have so many bytes more; none of them is used."""
    try:
        torch.empty(size, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:  # of torch's allocator
        raise MemoryError(
            f"{os.fspath(path)} does not fit into memory, of which there are no {size:,} bytes left"
        ) from error


@contextmanager
def explain_lack_of_memory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Where memory or address space ends, say so, of which file, and how much was needed as far as it is known.

    Raises:
        MemoryError: for that of Python, the RuntimeError of torch, and the OSError of the system.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not lacks_memory(error) or " does not fit into memory" in str(error):
            raise
        size = re.search(r"allocate (\d+) bytes", str(error))
        left = f", of which there are no {int(size[1]):,} bytes left" if size else ""
        raise MemoryError(f"{os.fspath(path)} does not fit into memory{left}") from error


def read_values(file: BinaryIO, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """So many elements that lie in a file from a byte on, in one dimension.

    Raises:
        ValueError: the file ends before.
        MemoryError: there is no room for them.
    """
    with explain_lack_of_memory(file.name):
        values = torch.empty(count, dtype=dtype, device="cpu")
    file.seek(start)
    if count and file.readinto(values.view(torch.uint8).numpy().data) != values.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it was cut short while it was read")
    return values


def read_tensors(file: BinaryIO, stored: Mapping[str, Stored], *, mapped: bool = False) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Args:
        file: the file.
        stored: where they lie in it.
        mapped: map them, all in one, where the file system can; what is written to them never reaches the file. For
            files alone that nobody writes to: others would change the tensors, or end the process by cutting the file.

    Raises:
        ValueError: the file ends before, or a type is not known.
        MemoryError: as `read_values`.
    """
    if unknown := sorted({kind for kind, *_ in stored.values()} - DTYPES.keys()):
        raise ValueError(f"it holds tensors of type {unknown[0][:20]!r}, which tomevit does not know")
    whole: Any = None
    if mapped:
        with suppress(RuntimeError, UnicodeEncodeError):  # torch takes no names but in UTF-8
            whole = torch.UntypedStorage.from_file(file.name, shared=False, nbytes=os.fstat(file.fileno()).st_size)
        if not os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat()):
            whole = None  # another lies there by now
    if whole is None:
        check_room(file.name, sum(each.end - each.start for each in stored.values()))
    tensors = {}
    for name, (kind, shape, start, end) in stored.items():
        dtype = DTYPES[kind]
        if whole is None or start == end:
            values = read_values(file, start, (end - start) // dtype.itemsize, dtype)
        else:
            values = torch.empty(0, dtype=dtype, device="cpu").set_(whole[start:end])
        tensors[name] = values.reshape(shape)
    return tensors

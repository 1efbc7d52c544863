"""What a safetensors file holds, and where: read from its header alone, which nothing is mapped into memory for.

A file is the length of its header in 8 bytes, little-endian; the header, in JSON; and the values, one tensor after the
other (https://huggingface.co/docs/safetensors). safetensors' own reader maps the whole file: that takes as much address
space for every tensor, and ends the process when someone cuts the file short meanwhile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from typing import Any, BinaryIO, NamedTuple

from tomevit.typed import parse_json

#: Of a header: the tensors of any vision transformer take a thousandth of it.
MOST_BYTES = 2**24
#: In a file, of any kind: a thousand blocks have fewer.
MOST_TENSORS = 2**14
MOST_CHARACTERS = 2**9  # of a tensor's name
MOST_DIMS = 64
#: Of one element, by the format's name of its type.
ITEMSIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str  # the format's name of it, maybe none of `ITEMSIZES`
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file
    end: int


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Stored]]:
    """The metadata of a safetensors file, and its tensors, sorted by name.

    Args:
        file: a regular one, at its beginning.

    Raises:
        ValueError: it is damaged, or cut short, or of another format; without the file's name.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    begin = 8 + length
    if begin > min(size, MOST_BYTES):
        raise ValueError(f"its header would end at byte {begin:,} of {size:,}")
    content = file.read(length)
    header = parse_json(content.decode(), make_object=_without_repetition)
    if b"\\u" in content:  # so JSON can spell half a character, which no text may hold
        json.dumps(header, ensure_ascii=False).encode()
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    check_names(header)
    tensors = {name: _find_stored(name, header[name], begin) for name in sorted(header)}
    position = begin
    for stored in sorted(tensors.values(), key=lambda stored: stored[2:]):
        if stored.start != position:
            raise ValueError("its tensors overlap, or leave gaps between them")
        position = stored.end
    if position != size:
        raise ValueError(f"it has {size:,} bytes, and its tensors end at {position:,}")
    return metadata, tensors


def check_names(names: Collection[str]) -> None:
    """Raises ValueError if tensors are more than any model has, or called as none is: their names are work for all."""
    if len(names) > MOST_TENSORS:
        raise ValueError(f"it has {len(names):,} tensors, and tomevit reads up to {MOST_TENSORS:,}")
    if (length := max(map(len, names), default=0)) > MOST_CHARACTERS:
        raise ValueError(f"the name of a tensor in it has {length:,} characters")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("its header has a name twice")
    return made


def _find_stored(name: str, entry: Any, begin: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
            plain = all(type(n) is int and 0 <= n < 2**31 for n in shape) and len(shape) <= MOST_DIMS
            if plain and 0 <= start <= end and math.prod(shape) * ITEMSIZES.get(dtype, 0) in (end - start, 0):
                return Stored(dtype, tuple(shape), begin + start, begin + end)
    raise ValueError(f"the place of {name[:80]!r} in it makes no sense")

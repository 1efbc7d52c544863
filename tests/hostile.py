"""Checkpoint files made by hand: tiny valid ones of every container, and hostile ones."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "count": torch.tensor(7),
}

# pickles, by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(module: str, function: str, *args: bytes) -> bytes:
    return name(module, function) + tuple_of(*args) + b"R"


def state_dict(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def shape_of(shape: bytes) -> bytes:
    """A tensor whose size and stride are anything."""
    return call("torch._utils", "_rebuild_tensor_v2", storage(4), number(0), shape, shape, b"\x89", b"}")


def tensor(size: tuple[int, ...], stride: tuple[int, ...], numel: int, offset: int = 0) -> bytes:
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage(numel),
        number(offset),
        tuple_of(*map(number, size)),
        tuple_of(*map(number, stride)),
        b"\x89",
        b"}",
    )


# containers


def torch_zip(pickled: bytes, data: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save would write, around any pickle and one storage."""
    return zip_of({"x/data.pkl": pickled, "x/byteorder": b"little", "x/data/0": data, "x/version": b"3\n"}, compression)


def zip_of(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", compression) as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
        return file.getvalue()


def legacy(pickled: bytes, keys: bytes = b"\x80\x02].", data: bytes = b"") -> bytes:
    """A pickle as torch.save wrote it before version 1.6."""
    magic, version = b"\x80\x02" + number(0x1950A86A20F9469CFC6C) + b".", b"\x80\x02" + number(1001) + b"."
    return magic + version + b"\x80\x02}." + pickled + keys + data


def saved(tree: Any, *, zipped: bool = True) -> bytes:
    with io.BytesIO() as file:
        torch.save(tree, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()


def npz(arrays: Mapping[str, Any], *, compressed: bool = False) -> bytes:
    with io.BytesIO() as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)
        return file.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n"


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: value.numpy() for key, value in tensors.items()}


#: Every container, around the same tensors.
VALID: dict[str, Callable[[], bytes]] = {
    "safetensors": lambda: save(TENSORS, {"format": "pt"}),
    "npz": lambda: npz(as_numpy(TENSORS)),
    "npz compressed": lambda: npz(as_numpy(TENSORS), compressed=True),
    "torch zip": lambda: saved({"model": TENSORS, "args": Namespace(lr=np.float64(0.1)), "rng": np.arange(3)}),
    "torch legacy": lambda: saved({"model": TENSORS, "epoch": 3}, zipped=False),
}


class Command:
    """Pickles into a shell command that makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def bombs() -> dict[str, bytes]:
    """Files of a few KB that ask for gigabytes."""
    big = 2**40
    giant = text("a" * 30_000)
    encode = name("_codecs", "encode") + b"q\x01" + giant + b"q\x02" + text("latin1") + b"q\x03"
    attributes = b"}q\x02(" + b"".join(text(f"{i}") + b"N" for i in range(2000)) + b"u"
    updates = name("collections", "OrderedDict") + b"q\x01" + attributes
    zeros = npy(npy_header((25 * 2**20,)), bytes(100 * 2**20))
    sizes = name("torch", "Size") + b"q\x01" + tuple_of(*[b"K\x01"] * 20_000) + b"q\x02"
    # A list of ten times the list before, 60 times over: a few hundred bytes, 10^60 words when written out.
    laughs = b"]q\x00" + b"".join(b"](" + 10 * (b"h" + bytes([i])) + b"eq" + bytes([i + 1]) for i in range(60))
    return {
        "bytearray": torch_zip(state_dict(a=call("__builtin__", "bytearray", number(10**12)))),
        "bytearray legacy": legacy(state_dict(a=call("__builtin__", "bytearray", number(10**12)))),
        "torch.Tensor": torch_zip(state_dict(a=call("torch", "Tensor", number(big)))),
        "torch.FloatStorage": torch_zip(state_dict(a=call("torch", "FloatStorage", number(big)))),
        "storage": torch_zip(state_dict(a=tensor((4,), (1,), big))),
        "storage legacy": legacy(
            state_dict(a=tensor((4,), (1,), big)), b"\x80\x02](" + text("0") + b"e.", struct.pack("<q", big)
        ),
        "expanded": torch_zip(state_dict(a=tensor((big,), (0,), 4))),
        "expanded often": torch_zip(state_dict(**{name: tensor((10**7,), (0,), 4) for name in "abc"})),
        "beyond": torch_zip(state_dict(a=tensor((4,), (1,), 4, offset=1))),
        "dimension": torch_zip(state_dict(a=tensor((0, 2**62), (1, 1), 4))),
        "dimensions": torch_zip(state_dict(a=tensor((2**31, 2**31, 4), (0, 0, 1), 4))),
        "negative": torch_zip(state_dict(a=tensor((-4,), (1,), 4))),
        "negative stride": torch_zip(state_dict(a=tensor((4,), (-1,), 4, offset=3))),
        "encode": torch_zip(b"\x80\x02](" + encode + b"h\x01h\x02h\x03\x86R" * 20_000 + b"e."),
        "updates": torch_zip(b"\x80\x02](" + updates + (b"h\x01)Rh\x02b") * 20_000 + b"e."),
        "laughs": torch_zip(b"\x80\x02}" + text("a") + b"](" + laughs + b"es."),
        "laughs as a shape": torch_zip(b"\x80\x02](" + laughs + shape_of(b"h\x3c") + b"e."),
        "laughs as a storage": torch_zip(b"\x80\x02](" + laughs + b"h\x3c\x85Qe."),
        "text": torch_zip(b"\x80\x02X\xff\xff\xff\xff."),
        "memo": torch_zip(b"\x80\x02}r\xff\xff\xff\xff."),
        "sizes": torch_zip(b"\x80\x02](" + sizes + b"h\x01h\x02\x85R" * 20_000 + b"e."),
        "deep": torch_zip(b"\x80\x02})" + b"\x85" * 250_000 + b"Ns."),
        "deflated": torch_zip(state_dict(a=tensor((4,), (1,), 4)), bytes(100 * 2**20), zipfile.ZIP_DEFLATED),
        "deflated npz": zip_of({"a.npy": zeros}, zipfile.ZIP_DEFLATED),
        "npz shape": zip_of({"a.npy": npy(npy_header((2**40,)))}),
        "npz dimension": zip_of({"a.npy": npy(npy_header((0, 2**62)))}),
        "npz objects": npz({"a": np.array([{}], dtype=object)}),
        "header": safetensors(b"{}", length=2**62),
        "header long": safetensors(b"{}", length=10**8),
        "header deep": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "offsets": safetensors(_entry([2**40], [0, 2**42])),
        "shape": safetensors(_entry([2**32, 2**32], [0, 0])),
    }


def _entry(shape: list[int], offsets: list[int]) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()

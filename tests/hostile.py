"""Checkpoint files made by hand: tiny valid ones of every container, and hostile ones."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
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


def costly() -> dict[str, dict[str, bytes]]:
    """Files of up to a few MB, by name in a folder, each of which takes minutes or gigabytes if it is believed.

    The first of each folder is what is given to tomevit.
    """
    whole = tensor((4,), (1,), 4)
    vit = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    model = b"}(" + text(vit[0]) + whole + b"q\x01" + text(vit[1]) + b"h\x01u"
    colliding = [number(i * (2**61 - 1)) for i in range(1, 40_000)]  # Python's hash of each is 0
    # Under every usual name, itself.
    usual = ("model", "state_dict", "module", "network", "teacher", "student", "ema", "model_ema", "ema_model")
    itself = b"".join(text(each) + b"h\x00" for each in usual) + b"".join(text(str(i)) + b"N" for i in range(50_000))
    many = b"](" + b"N" * 50_000 + b"eq\x01"
    laughs = b"]q\x00" + b"".join(b"](" + 10 * (b"h" + bytes([i])) + b"eq" + bytes([i + 1]) for i in range(60))
    parts = {f"{i}.safetensors": "a.safetensors" for i in range(100_000)}
    labels = {"architecture": "vit_tiny_patch16_224", "num_classes": 200_000, "label_names": ["a"] * 200_000}
    safetensor = {"model.safetensors": safetensors(_empty(vit))}

    def pickled(body: bytes) -> dict[str, bytes]:
        return {"model.pth": torch_zip(b"\x80\x02" + body + b".")}

    def configured(config: Any) -> dict[str, bytes]:
        return safetensor | {"config.json": config if isinstance(config, bytes) else json.dumps(config).encode()}

    return {
        "wrappers": {"model.pth": torch_zip(state_dict(**{"module." * 140_000 + vit[0]: whole, vit[1]: whole}))},
        "dots": pickled(b"}(" + text("x") + b"}(" + text("." * 10**6) + model + b"uu"),
        "names": {"model.safetensors": safetensors(_empty(f"{i}" for i in range(70_000)))},
        "models": {"model.safetensors": safetensors(_empty(f"{i}.{each}" for i in range(3000) for each in vit))},
        "lists in a header": {"model.safetensors": safetensors(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")},
        "keys that collide": pickled(b"}(" + text("x") + b"}(" + b"".join(n + b"N" for n in colliding) + b"uu"),
        "keys that collide in tuples": pickled(
            b"}(" + text("x") + b"}(" + b"".join(n + b"\x85N" for n in colliding) + b"uu"
        ),
        "a set that collides": pickled(b"](" + name("builtins", "set") + b"](" + b"".join(colliding) + b"e\x85Re"),
        "a long key, often": pickled(b"](" + b"(" + b"N" * 10**5 + b"tq\x01" + b"}(" + b"h\x01N" * 70_000 + b"ue"),
        "a long call, often": pickled(
            b"]("
            + b"("
            + b"N" * 10**5
            + b"tq\x01"
            + name("torch", "device")
            + b"q\x02"
            + b"h\x02h\x01R0" * 70_000
            + b"e"
        ),
        "a dict in itself": pickled(b"}q\x00(" + itself + b"u"),
        "a list in many": pickled(b"}(" + text("a") + many + text("b") + b"](" + b"h\x01" * 50_000 + b"eu"),
        "laughs as keys": {"model.pth": legacy(state_dict(a=whole), b"\x80\x02](" + laughs + b"h\x3be.")},
        "views of one storage": pickled(
            b"}(" + text("a") + whole + b"q\x01" + b"".join(text(f"{i}") + b"h\x01" for i in range(60_000)) + b"u"
        ),
        "names in an archive": {
            "model.npz": zip_of({f"{i}/{'/' * 60_000}.npy": npy(npy_header((0,))) for i in range(150)})
        },
        "models in an archive": {
            "model.npz": zip_of(
                {f"{i}/{each}.npy": npy(npy_header((0,))) for i in range(3000) for each in ("embedding/kernel", "cls")}
            )
        },
        "an index of lists": {"model.safetensors.index.json": b'{"weight_map":{},"a":[' + b"[]," * 5_000_000 + b"1]}"},
        "an index of files": {"model.safetensors.index.json": json.dumps({"weight_map": parts}).encode()},
        "an index of indices": {
            f"{i}{side}.index.json": json.dumps({"weight_map": {j: f"{i + 1}{j}.index.json" for j in "ab"}}).encode()
            for i in range(25)
            for side in "ab"
        },
        "a config of lists": configured(b'{"architecture":"a","a":[' + b"[]," * 5_000_000 + b"1]}"),
        "a config of names": configured(labels | {"label_descriptions": {"a": ["x"] * 50_000}}),
        "an argument": configured(
            {"architecture": "vit_tiny_patch16_224", "model_args": {"drop" + "_drop" * 10**5: 0}}
        ),
        "directories": {f"checkpoint-{i}/empty": b"" for i in range(1200)},
    }


def _empty(names: Iterable[str]) -> bytes:
    """The header of tensors without values."""
    return json.dumps({each: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for each in names}).encode()

"""Headers of safetensors files: what safetensors itself reads is read alike, all else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.hostile import safetensors as file_of
from tomevit.headers import ITEMSIZES, read_header
from tomevit.weights.reading import DTYPES, read_tensors


def test_every_type_is_read_as_safetensors_does(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {kind: torch.arange(6).reshape(2, 3).to(dtype) for kind, dtype in DTYPES.items()}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "é \n": torch.zeros(1)}
    safetensors.torch.save_file(tensors, path, {"one": "1", "two": "é"})
    for mapped in (False, True):
        with path.open("rb") as file:
            metadata, stored = read_header(file)
            ours = read_tensors(file, stored, mapped=mapped)
        with safe_open(path, framework="pt") as theirs:
            assert metadata == theirs.metadata()
            assert list(ours) == list(theirs.keys())
            for name, tensor in ours.items():
                expected = theirs.get_tensor(name)
                assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
                assert tensor.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
    assert DTYPES.keys() == ITEMSIZES.keys()
    assert all(DTYPES[kind].itemsize == size for kind, size in ITEMSIZES.items())


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


REFUSED: dict[str, bytes] = {
    "empty": b"",
    "short": b"\2\0\0",
    "not JSON": file_of(b"{"),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "UTF-16": file_of("{}".encode("utf-16")),
    "half a character": file_of(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a list": file_of(b"[]"),
    "metadata of numbers": file_of(b'{"__metadata__":{"a":1}}'),
    "metadata of a list": file_of(b'{"__metadata__":["a"]}'),
    "a name twice": file_of(b'{"__metadata__":{},"__metadata__":{}}'),
    "values missing": file_of(json.dumps({"a": entry()}).encode(), bytes(3)),
    "values left over": file_of(json.dumps({"a": entry()}).encode(), bytes(5)),
    "a gap": file_of(json.dumps({"a": entry(offsets=(4, 8))}).encode(), bytes(8)),
    "another size": file_of(json.dumps({"a": entry(shape=(2,))}).encode(), bytes(4)),
    "backwards": file_of(json.dumps({"a": entry(offsets=(4, 0))}).encode(), bytes(4)),
    "negative": file_of(json.dumps({"a": entry(shape=(-1, -1))}).encode(), bytes(4)),
    "a truth as a size": file_of(json.dumps({"a": entry(shape=(True,))}).encode(), bytes(4)),
    "a fraction": file_of(json.dumps({"a": entry(shape=(1.0,))}).encode(), bytes(4)),
    "huge beside nothing": file_of(json.dumps({"a": entry(shape=(0, 2**62), offsets=(0, 0))}).encode()),
    "too many dimensions": file_of(json.dumps({"a": entry(shape=(1,) * 65)}).encode(), bytes(4)),
    "a type that is no text": file_of(json.dumps({"a": entry(dtype=1)}).encode(), bytes(4)),
    "no shape": file_of(b'{"a":{"dtype":"F32","data_offsets":[0,4]}}', bytes(4)),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_damage_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(ValueError, match=r"\w"):
        read_header(file)


def test_a_type_of_the_future_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(file_of(json.dumps({"a": entry(), "b": entry((3,), (4, 6), "F4")}).encode(), bytes(6)))
    with path.open("rb") as file:
        stored = read_header(file)[1]
        assert read_tensors(file, {"a": stored["a"]})["a"].equal(torch.zeros(1))
        with pytest.raises(ValueError, match="type 'F4', which tomevit does not know"):
            read_tensors(file, stored)

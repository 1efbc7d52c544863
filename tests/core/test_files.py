"""Checkpoint files of every container open to the right values; all others end in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import tomevit
from tests import hostile
from tests.hostile import TENSORS, VALID, npz, saved, torch_zip, zip_of
from tests.outcomes import survives
from tomevit.errors import AmbiguousCheckpointError, CheckpointError
from tomevit.weights.files import Checkpoint, md5, open_checkpoint, sha256

Opener = Callable[..., Checkpoint]


@pytest.fixture
def open_bytes(tmp_path: Path) -> Opener:
    def write_and_open(content: bytes, name: str = "weights", **options: Any) -> Checkpoint:
        path = tmp_path / name
        path.write_bytes(content)
        return open_checkpoint(path, **options)

    return write_and_open


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert torch.equal(ours[name].nan_to_num(), tensor.nan_to_num()), name


def refused(open_bytes: Opener, content: bytes, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_bytes(content, **options)
    assert re.match(r"/\S*/weights\S* [a-z]", str(caught.value))  # begins with the path, and is a sentence
    assert "\n" not in str(caught.value)


# what is read


@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors", ".npz", ".tar"])
@pytest.mark.parametrize("kind", VALID)
def test_every_container_under_any_name(kind: str, suffix: str, open_bytes: Opener) -> None:
    checkpoint = open_bytes(VALID[kind](), f"weights{suffix}")
    assert_same(checkpoint.tensors, TENSORS)
    assert checkpoint.container == kind.split()[0]
    assert checkpoint.path.endswith(f"weights{suffix}")
    assert checkpoint.key == ("model" if "torch" in kind else "")
    assert checkpoint.metadata == ({"format": "pt"} if kind == "safetensors" else {})


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype: torch.dtype, open_bytes: Opener) -> None:
    state = {
        "a": (torch.arange(6) % 2).to(dtype).reshape(2, 3),
        "scalar": torch.tensor(1).to(dtype),
        "e": torch.empty(0, 3, dtype=dtype),
    }
    for content in (save(state), saved(state), saved(state, zipped=False)):
        assert_same(open_bytes(content).tensors, state)
    # JAX's bfloat16 is two bytes of no type in numpy
    arrays = {
        name: value.contiguous().view(torch.int16).numpy().view("V2")
        if dtype == torch.bfloat16 and value.ndim
        else value
        for name, value in state.items()
        if value.ndim or dtype != torch.bfloat16
    }
    assert_same(open_bytes(npz(arrays)).tensors, {name: state[name] for name in arrays})


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint(zipped: bool, open_bytes: Opener) -> None:
    """As DeiT's training script writes them: a Namespace, an optimizer, numpy's scalars and arrays around the model."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5])
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 299,
        "args": Namespace(
            lr=np.float64(5e-4), seed=np.int64(0), drop=np.float32(0.1), flag=np.bool_(True), name="deit", none=None
        ),
        "scaler": {"scale": 65536.0},
        "rng": ("MT19937", np.arange(5, dtype=np.uint32), torch.get_rng_state()),
        "kinds": [
            torch.float16,
            torch.device("cuda:1"),
            torch.Size([2, 3]),
            {1, 2},
            Counter("aab"),
            b"raw",
            1 + 2j,
            2**100,
        ],
        "best": np.array([[1.5, 2.5]]),
    }
    checkpoint = open_bytes(saved(tree, zipped=zipped))
    assert (checkpoint.key, checkpoint.prefix) == ("model", "")
    assert checkpoint.beside == ("optimizer", "lr_scheduler", "epoch", "args", "scaler", "rng", "kinds", "best")
    assert_same(checkpoint.tensors, dict(model.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_any_layout(zipped: bool, open_bytes: Opener) -> None:
    base = torch.arange(24.0)
    state = OrderedDict(
        transposed=base.reshape(4, 6).T,
        slice=base[3:9:2],
        shared=base,
        also_shared=base,
        expanded=base[:1].expand(5),
        permuted=base.reshape(2, 3, 4).permute(2, 0, 1),
        parameter=nn.Parameter(base[:3] * 2),
    )
    marked = nn.Parameter(base[:2])
    marked.no_weight_decay = True  # type: ignore[attr-defined]
    state["marked"] = marked
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    tensors = open_bytes(saved(state, zipped=zipped)).tensors
    assert_same(tensors, {name: tensor.detach() for name, tensor in state.items()})
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert all(type(tensor) is Tensor for tensor in tensors.values())


def test_numpy_arrays_as_weights(open_bytes: Opener) -> None:
    state = {name: tensor.numpy() for name, tensor in TENSORS.items()}
    assert_same(open_bytes(saved({"state_dict": state})).tensors, TENSORS)


@pytest.mark.parametrize("kind", VALID)
def test_tensors_and_their_file_do_not_touch_each_other(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(VALID[kind]())
    checkpoint = open_checkpoint(path)
    path.write_bytes(b"")  # in place: what were mapped from here would be gone, and the process with it
    assert_same(checkpoint.tensors, TENSORS)
    path.write_bytes(VALID[kind]())
    before = sha256(path)
    for tensor in open_checkpoint(path).tensors.values():
        tensor.zero_()
    assert sha256(path) == before


# where the state dict lies


@pytest.mark.parametrize(
    ("tree", "key", "beside"),
    [
        (lambda s: s, "", ()),
        (lambda s: {"state_dict": s, "epoch": 1}, "state_dict", ("epoch",)),
        (lambda s: {"epoch": torch.tensor(1), "model": s}, "model", ("epoch",)),
        (lambda s: {"model": s, "model_ema": None}, "model", ("model_ema",)),
        (lambda s: {"state_dict_ema": s}, "state_dict_ema", ()),
        (lambda s: {"ema": {"module": s, "decay": 0.9}}, "ema.module", ("ema.decay",)),
        (lambda s: {"model": {"state_dict": s, "name": "vit"}, "a": 1}, "model.state_dict", ("a", "model.name")),
        (
            lambda s: {"teacher": {**s, "none": None, "n": 3, 5: 1}},
            "teacher",
            ("teacher.none", "teacher.n", "teacher.5"),
        ),
    ],
)
def test_finds_the_state_dict(
    tree: Callable[[Any], Any], key: str, beside: tuple[str, ...], open_bytes: Opener
) -> None:
    checkpoint = open_bytes(saved(tree(TENSORS)))
    assert (checkpoint.key, checkpoint.beside) == (key, beside)
    assert_same(checkpoint.tensors, TENSORS)


def test_several_state_dicts_are_asked_about(open_bytes: Opener) -> None:
    other = {"weight": torch.zeros(3)}
    content = saved({"model": TENSORS, "model_ema": {"module": other}, "my.own": {"x": other}, "epoch": 3})
    refused(open_bytes, content, r"several state dicts, 'model', 'model_ema\.module': name one with key=")
    with pytest.raises(AmbiguousCheckpointError) as caught:
        open_bytes(content)
    assert (caught.value.option, caught.value.choices) == ("key", ["model", "model_ema.module"])
    assert_same(open_bytes(content, key="model").tensors, TENSORS)
    checkpoint = open_bytes(content, key="model_ema.module")
    assert_same(checkpoint.tensors, other)
    assert (checkpoint.key, checkpoint.beside) == ("model_ema.module", ("model", "my.own", "epoch"))
    assert open_bytes(content, key="my.own.x").key == "my.own.x"
    refused(open_bytes, content, r"nothing at 'nope'; it has 'model', 'model_ema', 'my.own', 'epoch'", key="nope")
    refused(open_bytes, content, r"nothing at 'model_ema\.nope'; at 'model_ema' it has 'module'", key="model_ema.nope")
    refused(open_bytes, content, r"no state dict at 'epoch'; it has 'model', 'model_ema.module'", key="epoch")
    refused(open_bytes, content, r"no state dict at ''", key="")
    refused(open_bytes, save(TENSORS), "no state dict at 'model': safetensors files are flat", key="model")


WEIGHTS = {"head/kernel": torch.arange(6.0).reshape(2, 3), "Transformer/block0/bias": torch.ones(2)}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("prefix", "others", "beside"),
    [
        ("", {}, ()),
        ("params/", {}, ()),
        ("params/", {"opt/0/mu/x": 1, "step": 3}, ("opt", "step")),
        ("opt/target/", {"opt/state/step": 1, "opt/state/a/b": 2, "extra": 3}, ("opt/state", "extra")),
        ("params/img/", {"params/txt/head/kernel": 1, "params/t": 2}, ("params/txt", "params/t")),
    ],
)
def test_npz_layouts(
    prefix: str, others: dict[str, int], beside: tuple[str, ...], compressed: bool, open_bytes: Opener
) -> None:
    names = {prefix + name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    arrays = names | {name: np.full(3, float(value)) for name, value in others.items()}
    checkpoint = open_bytes(npz(arrays, compressed=compressed))
    assert (checkpoint.prefix, checkpoint.beside) == (prefix, beside)
    assert_same(checkpoint.tensors, WEIGHTS)


def test_npz_key(open_bytes: Opener) -> None:
    content = npz({"params/img/a": np.zeros(2), "params/txt/a": np.ones(3)})
    assert_same(open_bytes(content, key="params/txt").tensors, {"a": torch.ones(3, dtype=torch.float64)})
    assert set(open_bytes(content, key="").tensors) == {"params/img/a", "params/txt/a"}
    refused(open_bytes, content, "no weights at 'nope'; it has 'params/img/a', 'params/txt/a'", key="nope")


def test_npz_orders(open_bytes: Opener) -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    arrays = {
        "c": array,
        "fortran": np.asfortranarray(array),
        "t": array.T,
        "scalar": np.float32(3),
        "empty": array[:0],
    }
    assert_same(open_bytes(npz(arrays)).tensors, {name: torch.tensor(value) for name, value in arrays.items()})


# what is refused


class Module(nn.Module):
    pass


def _tar() -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a"))
        return file.getvalue()


def _script() -> bytes:
    # torch.jit is deprecated and says so; its archives have these entries.
    return zip_of({"x/data.pkl": b"", "x/code/__torch__.py": b"", "x/constants.pkl": b""})


PLAIN = hostile.state_dict(a=hostile.tensor((4,), (1,), 4))
SPARSE = torch.eye(3).to_sparse()
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "html": (
        lambda: b"<!DOCTYPE html>\n<html><head><title>Sign in &amp;\n go</title></head>",
        r'is a web page \("Sign in & go"\): the download went wrong',
    ),
    "html of utf-8": (lambda: b"\xef\xbb\xbf <html><body>" + "ü".encode() * 2**16, "is a web page"),
    "xml": (
        lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
        r'is a web page \("Access Denied"\)',
    ),
    "json": (lambda: b'{"err": {"message": "Repository not found"}}', r"is text \(.*Repository not found"),
    "text": (lambda: b"Not Found\n", r'is text \("Not Found"\), not weights: the download went wrong'),
    "git-lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "is a git-lfs pointer.*git lfs pull",
    ),
    "gzip": (lambda: b"\x1f\x8b\x08\0", "is gzip-compressed: unpack it first"),
    "tar": (_tar, "is a tar archive: unpack it first"),
    "npy": (lambda: hostile.npy(hostile.npy_header((1,)), bytes(4)), "is a single numpy array"),
    "noise": (lambda: bytes(range(100, 0, -1)), "is no checkpoint: it begins with 64 63 62"),
    "zip": (lambda: zip_of({"readme.txt": b"hello"}), "is a zip archive of 'readme.txt': neither torch's nor numpy's"),
    "zip of nothing": (lambda: zip_of({}), "is a zip archive of nothing"),
    "torchscript": (_script, r"is a TorchScript archive: .* torch.save its state_dict\(\)"),
    "plain pickle": (lambda: pickle.dumps({"a": 1}, 2), "is a pickle, but not one of torch.save's"),
    "protocol 4": (lambda: saved_with(4), "is a pickle of protocol 4"),
    "a module": (lambda: saved(Module()), r"wants to run tests\.core\.test_files\.Module; tomevit reads only tensors"),
    "a module inside": (lambda: saved({"model": nn.Linear(1, 1)}), r"wants to run torch\.nn\.modules\.linear\.Linear"),
    "a path": (lambda: saved(Path("x")), r"holds a pathlib\.PosixPath, not a state dict"),
    "a list": (lambda: saved([torch.ones(1)]), "holds a list, not a state dict"),
    "a tensor": (lambda: saved(torch.ones(1)), "holds a Tensor, not a state dict"),
    "no tensors": (lambda: saved({"epoch": 1, "args": Namespace()}), "has no state dict.* it has 'epoch', 'args'"),
    "nothing": (lambda: saved({}), "it has nothing"),
    "nothing, safetensors": (lambda: save({}), "has no tensors"),
    "sparse": (lambda: saved({"a": SPARSE}), "holds a sparse tensor"),
    "quantized": (
        lambda: saved({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
        "holds a quantized tensor",
    ),
    "complex": (lambda: saved({"a": torch.ones(2, dtype=torch.complex64)}), "has 'a' as torch.complex64"),
    "complex npz": (lambda: npz({"a": np.ones(2, dtype=np.complex64)}), "holds 'a.npy' of numpy's type '<c8'"),
    "float8": (lambda: saved({"a": torch.ones(2).to(torch.float8_e4m3fn)}), "holds a tensor of an unusual dtype"),
    "meta": (lambda: saved({"a": torch.ones(2, device="meta")}), "holds a meta tensor"),
    "big-endian npz": (lambda: npz({"a": np.ones(2, dtype=">f4")}), "holds 'a.npy' of numpy's type '>f4'"),
    "objects npz": (lambda: npz({"a": np.array([{}], dtype=object)}), "reads no Python objects"),
    "strings npz": (lambda: npz({"a": np.array("abc")}), "holds 'a.npy' of numpy's type '<U3'"),
    "structured npz": (lambda: npz({"a": np.zeros(2, dtype="i4,f4")}), "no plain array of numbers"),
    "packed anew": (lambda: torch_zip(PLAIN, compression=zipfile.ZIP_DEFLATED), "was packed anew"),
    "zip with junk in front": (lambda: zip_of({"y": b""})[:31] + torch_zip(PLAIN), "is a damaged zip archive"),
    "zip with an entry twice": (lambda: zip_of({"x/data.pkl": PLAIN, "X/data.pkl": PLAIN}), "has an entry twice"),
    "zip without its data": (lambda: torch_zip(PLAIN, data=b""), "is damaged: 4 values are not in x/data/0"),
    "zip whose tensor is larger than its data": (
        lambda: torch_zip(hostile.state_dict(a=hostile.tensor((2, 2), (3, 1), 4))),
        r"holds a tensor of shape \(2, 2\) that reaches beyond its 4 values",
    ),
    "bytearray8": (lambda: torch_zip(b"\x80\x02\x96" + struct.pack("<Q", 2**40)), r"no sense \(instruction b'\\x96'\)"),
    "binunicode8": (lambda: torch_zip(b"\x80\x02\x8d" + struct.pack("<Q", 2**62)), "asks for more than .* bytes"),
    "name without an end": (lambda: torch_zip(b"\x80\x02c" + b"a" * 10**5), "a name without an end"),
    "two protocols": (lambda: torch_zip(b"\x80\x04\x80\x02}."), "is a pickle of protocol 4"),
    "memo of nothing": (lambda: torch_zip(b"\x80\x02h\x07."), "makes no sense"),
    "text to anything but bytes": (
        lambda: torch_zip(
            hostile.state_dict(a=hostile.call("_codecs", "encode", hostile.text("a"), hostile.text("x")))
        ),
        r"holds a _codecs\.encode of \(str, str\)",
    ),
    "npy of a deep literal": (lambda: zip_of({"a.npy": hostile.npy("-" * 9000 + "1\n")}), "no plain array of numbers"),
    "old file without its data": (
        lambda: hostile.legacy(PLAIN),
        "is damaged: its list of storages does not fit its tensors",
    ),
    "old file with less data": (
        lambda: hostile.legacy(PLAIN, b"\x80\x02](" + hostile.text("0") + b"e.", struct.pack("<q", 3) + bytes(16)),
        "is damaged: storage '0' has not the 4 values it should have",
    ),
    "safetensors with a name twice": (
        lambda: hostile.safetensors(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            bytes(8),
        ),
        "is a damaged or truncated safetensors file",
    ),
    "safetensors whose tensors overlap": (
        lambda: hostile.safetensors(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            bytes(12),
        ),
        "is a damaged or truncated safetensors file",
    ),
}


def saved_with(protocol: int) -> bytes:
    with io.BytesIO() as file:
        torch.save(TENSORS, file, pickle_protocol=protocol)
        return file.getvalue()


# torch says that quantization moved, and takes no quantized tensor without it
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(what: str, open_bytes: Opener) -> None:
    content, message = REFUSED[what]
    refused(open_bytes, content(), message)


def test_a_python_without_its_unpickler_refuses_pickles(open_bytes: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pickle._Unpickler.dispatch  # type: ignore[attr-defined]
    monkeypatch.setattr("tomevit.weights.pickles._METHODS", {})
    refused(open_bytes, saved({"model": TENSORS}), "is a pickle, which this Python cannot look into")
    assert open_bytes(save(TENSORS)).container == "safetensors"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no file {tmp_path}/nope"):
        open_checkpoint(tmp_path / "nope")
    with pytest.raises(IsADirectoryError, match="is a directory, not a checkpoint file"):
        open_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "pipe")


@survives("checkpoints", "a pickle that wants to run something", "nothing of it runs; the message says what it wants")
def test_no_code_runs(tmp_path: Path, open_bytes: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof = tmp_path / "proof"
    command = hostile.Command(proof)
    system = hostile.name("os", "system") + hostile.text(f"touch {proof}") + b"\x85R"
    for content in (
        saved({"model": TENSORS, "x": command}),
        saved({"model": TENSORS, "x": command}, zipped=False),
        *(pickle.dumps(command, protocol) for protocol in (2, 3, 4, 5)),
        b"cos\nsystem\n(S'touch it'\ntR.",
        torch_zip(hostile.state_dict(a=system)),
        # in the pickles around the object of an old file
        hostile.legacy(b"\x80\x02" + system + b"."),
        hostile.legacy(PLAIN, keys=b"\x80\x02" + system + b"."),
    ):
        refused(open_bytes, content, r"wants to run (os|posix|nt)\.system; tomevit reads only tensors and plain data")
    assert not proof.exists()
    pickle.loads(pickle.dumps(command))
    assert proof.exists()


def test_settings_of_the_process_are_left_as_found(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(VALID["torch zip"]())
    with torch.serialization.safe_globals([Namespace]):
        before = set(torch.serialization.get_safe_globals())
        with ThreadPoolExecutor(8) as threads:
            for checkpoint in threads.map(open_checkpoint, [path] * 32):
                assert_same(checkpoint.tensors, TENSORS)
        assert set(torch.serialization.get_safe_globals()) == before
        path.write_bytes(saved([1]))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before


# damage


@survives("checkpoints", "cut short at any byte", "refused")
@pytest.mark.parametrize("kind", VALID)
def test_truncated_anywhere(kind: str, open_bytes: Opener) -> None:
    whole = VALID[kind]()
    opened = []
    for length in range(len(whole)):
        with contextlib.suppress(CheckpointError):
            open_bytes(whole[:length])
            opened.append(length)
    assert opened == []


def data_positions(whole: bytes) -> list[int]:
    start = whole.index(TENSORS["weight"].numpy().tobytes())
    return list(range(start, start + 48))


@survives("checkpoints", "a bit of the values flipped, in an archive with sums", "found, and said")
@pytest.mark.parametrize("kind", ["npz", "torch zip"])
def test_flipped_bits_in_the_data_are_found(kind: str, open_bytes: Opener) -> None:
    whole = VALID[kind]()
    for position in data_positions(whole):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        refused(open_bytes, bytes(flipped), "is damaged: Bad CRC-32")


def test_files_without_sums(open_bytes: Opener) -> None:
    """As torch writes them with set_crc32_options(False)."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        whole = saved(TENSORS)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(open_bytes(whole).tensors, TENSORS)


# memory

CHILD = """
import json, resource, sys, warnings
from pathlib import Path
from tomevit.errors import CheckpointError
from tomevit.weights.files import open_checkpoint
warnings.simplefilter("error")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for good in sorted(Path(sys.argv[1]).glob("good*")):
    open_checkpoint(good)
before = peak()
answers = {}
for path in sorted(Path(sys.argv[1]).glob("bomb*")):
    try:
        open_checkpoint(path)
        answers[path.name] = "opened"
    except CheckpointError as error:
        answers[path.name] = str(error)
print(json.dumps({"grown": peak() - before, "answers": answers}))
"""


@survives("checkpoints", "a few KB that ask for gigabytes", "refused in 200 MB, all of them together")
def test_hostile_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    bombs = hostile.bombs()
    for name, content in bombs.items():
        (tmp_path / f"bomb {name}").write_bytes(content)
        assert len(content) < 300_000
    for i, make in enumerate(VALID.values()):
        (tmp_path / f"good {i}").write_bytes(make())
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert len(report["answers"]) == len(bombs)
    assert [name for name, answer in report["answers"].items() if answer == "opened"] == []
    assert report["grown"] < 200  # MiB, all of them together


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from tomevit import cli
from tomevit.weights.convert import convert
path, large = sys.argv[1:]
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20,) * 2)
convert(path, f"{path}.out", model="deit_ti16")
cli.main(["convert", large, "--out", f"{large}.out"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space so")
def test_address_space_of_one_file_is_enough(tmp_path: Path) -> None:
    path, large = tmp_path / "weights.safetensors", tmp_path / "large.safetensors"
    tomevit.export(tomevit.create("deit_ti16"), path, "timm")  # 152 tensors in 23 MB: mapped on its own each, 3.5 GB
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**26], "data_offsets": [0, 2**28]}}).encode()
    large.write_bytes(hostile.safetensors(header))
    os.truncate(large, 8 + len(header) + 2**28)  # all zeros, which take no room
    child = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, path, large],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 2, child.stderr
    assert (tmp_path / "weights.safetensors.out").exists()
    assert child.stderr == (
        f"tomevit: {large} does not fit into memory, of which there are no 268,435,456 bytes left\n"
    )


def test_many_entries(open_bytes: Opener) -> None:
    refused(open_bytes, zip_of({f"{i}.npy": b"" for i in range(2**14 + 1)}), "16,385 entries")


def test_overlapping_entries(open_bytes: Opener) -> None:
    """Two names for the same bytes: how the densest zip bombs are made."""
    whole = bytearray(npz({"a": np.zeros(100), "b": np.zeros(100)}))
    directory = [match.start() for match in re.finditer(b"PK\x01\x02", whole)]
    whole[directory[1] + 42 : directory[1] + 46] = struct.pack("<I", 0)
    refused(open_bytes, bytes(whole), "is a damaged.* zip archive")


# hashes


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert md5(tmp_path / "abc") == "900150983cd24fb0d6963f7d28e17f72"
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

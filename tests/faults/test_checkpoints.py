"""Checkpoints that were made to do harm, or change while they are read, or do not fit: one sentence, at little cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tomevit
from tests import hostile
from tests.faults.special import SPECIAL, each_special
from tests.outcomes import survives
from tomevit import cards
from tomevit.cards import Card
from tomevit.config import Config, Preprocess
from tomevit.errors import CheckpointError, NotRegularFileError
from tomevit.models import VisionTransformer, build
from tomevit.weights import files, shards, sources
from tomevit.weights.convert import inspect

COSTLY = survives(
    "checkpoints",
    "names of a million characters, keys whose hashes collide, what holds itself, a million entries, everywhere",
    "read or refused in ten seconds, and in 300 MB beyond the file's own size",
)
NO_FILE = survives(
    "checkpoints",
    "a pipe, a device or a socket as the file, a part of several, in a directory, beside, or to compare with",
    "one sentence, or passed over beside the weights; never waited for",
)
CHANGED = survives(
    "checkpoints",
    "replaced, or written to, between the look at it and the last byte",
    "what was looked at is what is loaded, or an error says that it was changed",
)
SPARSE = survives(
    "checkpoints", "a terabyte of nothing, after a head of any kind", "refused by its head, before all is read"
)
METADATA = survives(
    "checkpoints",
    "numbers in a file's own description that no model can have",
    "load, create, info and verify name the field; nothing is built",
)
BESIDE = survives(
    "checkpoints",
    "numbers in the config.json beside it that no model can have",
    "one sentence that names the file and the field",
)
NO_ROOM = survives(
    "checkpoints",
    "too little memory or address space, at any point",
    "said so, with the file's name; never called damaged",
)

CHILD = """
import json, sys, time
from pathlib import Path
import tomevit

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def attempt(path):
    try:
        tomevit.convert(path, path.parent.with_suffix(".out.safetensors"))
        return "converted"
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"

attempt(Path(sys.argv[1]))
for path in map(Path, sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.process_time()
    said = attempt(path)
    print(json.dumps([str(path), time.process_time() - began, peak() - before, said]), flush=True)
"""


def run_child(program: str, *arguments: object) -> str:
    child = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOMEVIT_HOME": "/nonexistent"},
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@COSTLY
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what memory was taken at most")
def test_files_cost_what_their_size_says(tmp_path: Path) -> None:
    sound = tmp_path / "sound.safetensors"
    tomevit.save(tiny(), sound)
    sizes: dict[str, int] = {}
    for what, folder in hostile.costly().items():
        for name, content in folder.items():
            (tmp_path / what / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / what / name).write_bytes(content)
        beside = len(folder) > 1 and "index" not in what  # or the file itself is given
        sizes[str(tmp_path / what / ("" if beside else next(iter(folder))))] = sum(map(len, folder.values()))
    found = [json.loads(line) for line in run_child(CHILD, sound, *sizes).splitlines()]
    assert [path for path, *_ in found] == list(sizes)
    assert [(path, seconds) for path, seconds, *_ in found if seconds > 10] == []
    assert [(path, grown) for path, _, grown, _ in found if grown > sizes[path] + 300 * 2**20] == []
    assert [(path, said) for path, *_, said in found if "rror: " not in said or len(said) > 2000] == []


def tiny(**fields: Any) -> VisionTransformer:
    config = Config(
        **{"img_size": (32, 32), "patch_size": 16, "embed_dim": 8, "num_heads": 2, "depth": 1, "num_classes": 3}
        | fields
    )
    model = build(config).eval()
    model.card = Card(name="tiny", config=config)
    return model


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A checkpoint of timm's."""
    path = tmp_path / "source" / "model.safetensors"
    path.parent.mkdir()
    tomevit.export(tomevit.create("vit_ti16", num_classes=2), path, "timm")
    return path


# no file


@NO_FILE
@each_special
def test_what_is_no_file_is_no_checkpoint(special: str, tmp_path: Path) -> None:
    path, sound = tmp_path / "model.safetensors", tmp_path / "sound.safetensors"
    SPECIAL[special](path)
    tomevit.save(tiny(), sound)
    calls: tuple[Callable[[], object], ...] = (
        lambda: tomevit.load(path),
        lambda: tomevit.convert(path, tmp_path / "out.safetensors"),
        lambda: tomevit.convert(tmp_path, tmp_path / "out.safetensors"),
        lambda: tomevit.create("vit_ti16", pretrained=path),
        lambda: tomevit.verify(sound, against=path),
        lambda: inspect(path),
        lambda: files.open_checkpoint(path),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a regular file"):
            call()
    (check,) = tomevit.verify(path)
    assert not check.passed
    for read in (files.sha256, files.md5, cards.read_contents):
        with pytest.raises(NotRegularFileError):
            read(path)
    assert not cards.is_ours(path)


@NO_FILE
@each_special
def test_no_file_beside_or_within(special: str, encoder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        SPECIAL[special](encoder.with_name(name))
    tomevit.convert(encoder.parent, tmp_path / "out.safetensors", model="vit_ti16")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    SPECIAL[special](tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"lists part\.safetensors, which is missing"):
        tomevit.convert(index, tmp_path / "out.safetensors")
    index.unlink()
    SPECIAL[special](index)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        tomevit.convert(index, tmp_path / "out.safetensors")


# what changes


@pytest.fixture
def after_hashing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something happen after the look at a file, before it is read."""

    def arrange(happens: Callable[[], object]) -> None:
        def sha256(opened: shards.OpenFiles) -> str:
            found = before(opened)
            happens()
            return found

        before = shards.OpenFiles.sha256
        monkeypatch.setattr(shards.OpenFiles, "sha256", sha256)

    return arrange


@CHANGED
@pytest.mark.parametrize("kind", ["timm", "deit", "index"])
def test_a_file_that_is_replaced(kind: str, tmp_path: Path, after_hashing: Callable[..., None]) -> None:
    model, other = tomevit.create("deit_ti16", num_classes=2), tomevit.create("deit_ti16", num_classes=2)
    name = "model.pth" if kind == "deit" else "model.safetensors"
    path, swapped = tmp_path / name, tmp_path / f"other-{name}"
    for each, to in ((model, path), (other, swapped)):
        tomevit.export(each, to, "timm" if kind == "index" else kind)
    source = path
    if kind == "index":
        source = tmp_path / "x.index.json"
        source.write_text(json.dumps({"weight_map": dict.fromkeys(safetensors.torch.load_file(path), name)}))
    sha256 = shards.sha256(source)
    after_hashing(lambda: swapped.replace(path))
    report = tomevit.convert(source, tmp_path / "out.safetensors", model="deit_ti16")
    assert report.sha256 == sha256
    read = tomevit.load(tmp_path / "out.safetensors").state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


@CHANGED
def test_a_file_that_is_written_to(encoder: Path, tmp_path: Path, after_hashing: Callable[..., None]) -> None:
    def write() -> None:
        with encoder.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        os.utime(encoder, (0, 0))

    after_hashing(write)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        tomevit.convert(encoder, tmp_path / "out.safetensors", model="vit_ti16")
    assert not (tmp_path / "out.safetensors").exists()


# sparse files


@SPARSE
@pytest.mark.parametrize("kind", ["nothing", *hostile.VALID])
def test_a_terabyte_of_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.OpenFiles, "sha256", lambda _: pytest.fail("it is read whole"))
    path = tmp_path / "model.bin"
    path.write_bytes(hostile.VALID[kind]() if kind in hostile.VALID else b"")
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match=f"{path} is "):
        tomevit.convert(path, tmp_path / "out.safetensors")


@SPARSE
def test_a_terabyte_of_weights_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(hostile.safetensors(header))
    os.truncate(path, 8 + len(header) + 2**40)
    with pytest.raises(
        MemoryError, match=r"model\.safetensors does not fit into memory, of which there are no 1,099,5"
    ):
        tomevit.convert(path, tmp_path / "out.safetensors")


@SPARSE
def test_a_terabyte_in_an_archive_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.OpenFiles, "sha256", lambda _: pytest.fail("it is read whole"))
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
        entry = archive.infolist()[0]
        entry.file_size = entry.compress_size = 2**40
        archive.fp.seek(2**40, os.SEEK_CUR)  # type: ignore[union-attr]
        archive.start_dir = archive.fp.tell()  # type: ignore[union-attr]
    assert path.stat().st_size > 2**40
    with pytest.raises(MemoryError, match=r"model\.npz does not fit into memory"):
        tomevit.convert(path, tmp_path / "out.safetensors")


@SPARSE
def test_a_terabyte_of_our_own_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = cards.encode_header(cards.Header(tiny().card, "0" * 64))
    values = {
        f"{i}": {"dtype": "F32", "shape": [2**28], "data_offsets": [i * 2**30, (i + 1) * 2**30]} for i in range(1024)
    }
    header = json.dumps({"__metadata__": metadata, **values}).encode()
    path.write_bytes(hostile.safetensors(header))
    os.truncate(path, 8 + len(header) + 2**40)
    for call in (lambda: tomevit.load(path), lambda: tomevit.verify(path)):
        with pytest.raises(MemoryError, match=r"model\.safetensors does not fit into memory"):
            call()


# metadata


@METADATA
@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        *(("preprocess", {"crop_pct": value}, "crop_pct") for value in (0, 0.001, -1, 1.5, 1e-300, "1", None)),
        *(("preprocess", {"mean": value}, "mean") for value in ([0.5, 0.5], [], [1e300] * 3, ["0"] * 3, [0.5] * 5000)),
        ("preprocess", {"mean": [0.5, 0.5], "std": [0.5, 0.5]}, "mean has 2 values"),
        ("preprocess", {"mean": [0.5], "std": [0.5]}, "mean has 1 values"),
        *(("preprocess", {"std": value}, "std") for value in ([0, 1, 1], [-1, 1, 1], [1e-300, 1, 1], [1e300, 1, 1])),
        ("preprocess", {"interpolation": "nearest"}, "interpolation"),
        ("preprocess", {"resize": "pad"}, "resize"),
        *(("config", {"img_size": size}, "img_size") for size in ([0, 32], [2**30, 32], [33, 32], [2**14, 2**14], 32)),
        *(("config", {"depth": depth}, "(?:depth|describes a model)") for depth in (0, -1, 10**9, 2**200, 1.5)),
        ("config", {"num_heads": 3}, "num_heads"),
        ("config", {"embed_dim": 10**9}, "embed_dim"),
        ("config", {"mlp_ratio": 1e30}, "mlp_ratio"),
        ("config", {"norm_eps": 1e9}, "norm_eps"),
        ("config", {"num_classes": 10**12}, "num_classes"),
        ("config", {"reg_tokens": 10**9}, "reg_tokens"),
        ("config", {"patch_size": 10**9}, "patch_size"),
        ("config", {"in_chans": 10**9}, "in_chans"),
        ("config", {"matching": "none"}, "matching"),
        ("", {"class_names": ["a"] * 4}, "class_names"),
        ("", {"class_names": ["a" * 2**21] * 3}, "class_names"),
        ("", {"r": -1}, "r is -1"),
        ("", {"r": 2**70}, "r is beyond"),
        ("", {"r": [1, 2]}, "r lists 2 blocks"),
        ("", {"r": {"mean": 1, "inflection": 5}}, "inflection"),
    ],
)
def test_metadata_that_no_model_has(part: str, fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    path, broken = tmp_path / "tiny.safetensors", tmp_path / "broken.safetensors"
    tomevit.save(tiny(), path)
    with safetensors.safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()[cards.KEY])
    card = described["card"]
    (card[part] if part else card).update(fields)
    safetensors.torch.save_file(safetensors.torch.load_file(path), broken, {cards.KEY: json.dumps(described)})
    for call in (
        lambda: tomevit.load(broken),
        lambda: tomevit.create("vit_ti16", pretrained=broken),
        lambda: tomevit.convert(broken, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=rf"broken\.safetensors .*{named}") as caught:
            call()
        assert len(str(caught.value)) < 500
    last = tomevit.verify(broken)[-1]
    assert not last.passed
    assert len(last.found) < 500


def test_a_preprocess_that_cannot_be() -> None:
    for fields, named in (
        ({"crop_pct": 0.05}, "crop_pct is 0.05"),
        ({"std": (1e-9, 1, 1)}, "std"),
        ({"mean": (1e9,) * 3}, "mean"),
    ):
        with pytest.raises(ValueError, match=named):
            Preprocess(**fields)  # type: ignore[arg-type]
    assert Preprocess(crop_pct=0.1).crop_pct == 0.1


@BESIDE
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"crop_pct": 0.001}, "crop_pct is 0.001"),
        ({"crop_pct": 0}, "crop_pct is 0"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"std": [0, 0, 0]}, "std"),
        ({"input_size": [3, 10**9, 10**9]}, "input_size"),
        ({"input_size": [2**12, 2**14, 2**14]}, "img_size"),
        ({"num_classes": 10**12}, "num_classes"),
    ],
)
def test_a_config_beside_that_no_model_has(fields: dict[str, Any], named: str, encoder: Path, tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    config["pretrained_cfg"] |= fields  # type: ignore[operator]
    encoder.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{named}"):
        tomevit.convert(encoder.parent, tmp_path / "out.safetensors", model="vit_ti16")


# memory

LITTLE_MEMORY = """
import ctypes, json, resource, sys
from pathlib import Path
import torch
import tomevit
from tomevit.weights import files
*paths, own = map(Path, sys.argv[1:])
tomevit.load(own)
said = []
for limit in (0, 16, 48):
    for path in (*paths, own):
        for call in (
            lambda: files.open_checkpoint(path),
            lambda: tomevit.convert(path, own.with_name("out.safetensors"), model="deit_ti16"),
            lambda: tomevit.create("deit_ti16", pretrained=path),
            lambda: tomevit.verify(own),
        ):
            ctypes.CDLL(None).malloc_trim(0)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit * 2**20, -1))
            try:
                found = call()
                said.append("".join(each.found for each in found if not each.passed) if type(found) is tuple else "")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            found = None
print(json.dumps(said))
"""


@NO_ROOM
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit address space so")
def test_lack_of_memory_is_no_damage(tmp_path: Path) -> None:
    model = tomevit.create("deit_ti16")
    paths = [tmp_path / name for name in ("timm.safetensors", "deit.pth", "big_vision.npz", "own.safetensors")]
    for path in paths[:-1]:
        tomevit.export(model, path, path.stem)
    tomevit.save(model, paths[-1])
    said = json.loads(run_child(LITTLE_MEMORY, *paths))
    lacking = [each for each in said if each]
    assert lacking
    assert [each for each in lacking if not each.startswith("MemoryError") and "fit into memory" not in each] == []


@NO_ROOM
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to mmap 133000 bytes from file </x>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_every_lack_of_memory_is_one_sentence(error: Exception, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for module, name in ((files, "read_tensors"), (sources.shards.OpenFiles, "sha256")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            with pytest.raises(MemoryError, match=r"model\.safetensors does not fit into memory"):
                tomevit.convert(encoder, encoder.with_name("out.safetensors"), model="vit_ti16")

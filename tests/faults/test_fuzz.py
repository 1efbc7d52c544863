"""Whatever is in a file, it opens as a checkpoint or ends in CheckpointError: in little memory, without a warning."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile import TENSORS, VALID, as_numpy, legacy, npz, saved, torch_zip, zip_of
from tests.outcomes import survives
from tomevit.errors import CheckpointError
from tomevit.weights.files import open_checkpoint

EXAMPLES = 300
MEMORY = 300 * 2**20


def _entry(archive: bytes, suffix: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        return entries.read(next(name for name in entries.namelist() if name.endswith(suffix)))


def _pickle(zipped: bytes) -> bytes:
    return _entry(zipped, "data.pkl")


# Behind a sum, damage is found at once: to reach what is behind, it is made before the sum.
PICKLED = _pickle(saved({"model": {"weight": TENSORS["weight"]}, "epoch": 3}))
TRAINING = _pickle(VALID["torch zip"]())
TARGETS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    **{kind: (content(), bytes) for kind, content in VALID.items()},
    "pickle in a zip": (PICKLED, lambda content: torch_zip(content, TENSORS["weight"].numpy().tobytes())),
    "training pickle in a zip": (TRAINING, lambda content: _with_data(content)),
    "pickle in an old file": (PICKLED, legacy),
    "npy in an npz": (
        _entry(npz(as_numpy(TENSORS)), "weight.npy"),
        lambda content: zip_of({"a.npy": content}),
    ),
    "nothing": (b"", bytes),
}


def _with_data(pickled: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(VALID["torch zip"]())) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return zip_of({name: pickled if name.endswith("data.pkl") else content for name, content in entries.items()})


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Up to four mutations: bytes, numbers, and ranges that are lost, doubled, moved or from another container."""
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=2)))
        middle = content[start:end]
        at = draw(st.integers(0, len(content)))
        match draw(
            st.sampled_from(["flip", "flip", "number", "number", "insert", "cut", "lose", "double", "move", "splice"])
        ):
            case "flip":
                flipped = bytearray(content)
                if at < len(flipped):
                    flipped[at] ^= draw(st.integers(1, 255))
                content = bytes(flipped)
            case "number":
                value = draw(
                    st.sampled_from([0, 1, 2, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1])
                )
                number = struct.pack("<Q", value)[: draw(st.sampled_from([1, 2, 4, 8]))]
                content = content[:at] + number + content[at + len(number) :]
            case "insert":
                content = content[:at] + draw(st.binary(max_size=16)) + content[at:]
            case "cut":
                content = content[:at]
            case "lose":
                content = content[:start] + content[end:]
            case "double":
                content = content[:at] + middle + content[at:]
            case "move":
                rest = content[:start] + content[end:]
                content = rest[:at] + middle + rest[at:]
            case _:
                other = draw(st.sampled_from([target for target, _ in TARGETS.values()]))
                content = content[:at] + other[draw(st.integers(0, len(other))) :]
    return content


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let this process take no more than `size` bytes beyond what it has: what asks for more raises MemoryError."""
    gc.collect()  # or what earlier tests left would make room later
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_limit_holds() -> None:
    with memory_limit(MEMORY):
        bytearray(MEMORY // 2)
        with pytest.raises(MemoryError):
            bytearray(2 * MEMORY)
    bytearray(2 * MEMORY)


@survives(
    "checkpoints",
    "up to four mutations of a sound file: bytes, numbers, ranges lost, doubled, moved, or from another container",
    "opens, or ends in one printable sentence, in 300 MB",
)
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files(target: str, tmp_path: Path) -> None:
    content, wrap = TARGETS[target]
    path = tmp_path / "weights"

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(damage(content))
    def opens_or_is_refused(damaged: bytes) -> None:
        whole = wrap(damaged)
        path.unlink(missing_ok=True)  # not written over: tensors of the last example may be mapped from it
        path.write_bytes(whole)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            message = str(error)
            assert message.startswith(f"{path} ")
            assert message.isprintable()
            assert len(message) < 1000
            assert not re.search("can.?t allocate|cannot allocate", message, re.IGNORECASE)  # torch's MemoryError
        else:
            assert checkpoint.tensors
            total = sum(tensor.clone().numel() for tensor in checkpoint.tensors.values())
            assert total <= 8 * len(whole) + 2**26

    with memory_limit(MEMORY):
        opens_or_is_refused()

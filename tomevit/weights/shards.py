"""A checkpoint in several files, and the index that says which tensor lies in which.

transformers, accelerate and huggingface_hub write it so: beside `model-00001-of-00002.safetensors` and its like lies
`model.safetensors.index.json` (or `pytorch_model.bin.index.json`), whose `weight_map` has a file for every tensor.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tomevit.errors import CheckpointError, NotRegularFileError, printable
from tomevit.headers import MOST_TENSORS
from tomevit.opening import open_file
from tomevit.typed import parse_json

#: How one file of several is named.
PART = re.compile(r"-(\d+)-of-(?!0*1\.)(\d+)\.\w+$")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MOST_BYTES = 2**24  # of an index; of the largest models that there are it has some ten MB
MOST_FILES = 200  # that an index lists: all are open at once, and systems allow some 250
CHUNK = 2**20


@dataclass(frozen=True)
class OpenFiles:
    """The files of one checkpoint, open from the first look at them to the last: what was looked at is what is read.

    Attributes:
        path: of the file, or of the index.
        file: that file.
        parts: of an index, the files that it lists, by their paths, sorted by name; empty for a single file.
        listed: the names of the tensors in each of these, as the index has them.
    """

    path: Path
    file: BinaryIO
    parts: Mapping[Path, BinaryIO] = field(default_factory=dict)
    listed: Mapping[str, set[str]] = field(default_factory=dict)
    _versions: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._read_versions())

    @property
    def all(self) -> tuple[BinaryIO, ...]:
        return (self.file, *self.parts.values())

    @property
    def size(self) -> int:
        """Bytes, of all together."""
        return sum(size for size, _ in self._versions)

    def sha256(self) -> str:
        """Of the file, or of an index and the files that it lists, one after the other."""
        digest = hashlib.sha256()
        for file in self.all:
            file.seek(0)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if one of them was written to since it was opened."""
        if self._read_versions() != self._versions:
            raise CheckpointError(f"{self.path} was changed while it was read")

    def _read_versions(self) -> list[tuple[int, int]]:
        return [(stat.st_size, stat.st_mtime_ns) for stat in (os.fstat(file.fileno()) for file in self.all)]


@contextmanager
def open_files(path: Path) -> Iterator[OpenFiles]:
    """A checkpoint's file, or the index and the files that it lists, open as long as the context.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file.
        CheckpointError: as `files_of`; or one is no regular file.
    """
    with ExitStack() as opened:

        def open_one(path: Path) -> BinaryIO:
            try:
                return opened.enter_context(open_file(path))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"there is no file {path}") from error
            except IsADirectoryError as error:
                raise IsADirectoryError(f"{path} is a directory, not a checkpoint file") from error
            except NotRegularFileError as error:
                raise CheckpointError(f"{path} is not a regular file") from error

        file = open_one(path)
        listed = _parse_index(path, file) if _says_index(path, file) else {}
        yield OpenFiles(path, file, {part: open_one(part) for part in _find_parts(path, listed)}, listed)


def is_index(path: Path) -> bool:
    """Whether a file is an index of others, by its name or by what it says first."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with open_file(path) as file:
        return _says_index(path, file)


def _says_index(path: Path, file: BinaryIO) -> bool:
    return path.suffix == ".json" and (".index." in path.name or b'"weight_map"' in file.read(2**16))


def read_index(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file that an index lists, the files sorted by name.

    Raises:
        CheckpointError: it is malformed, or lists what is not the name of a file beside it.
    """
    with open_file(index) as file:
        return _parse_index(index, file)


def _parse_index(index: Path, file: BinaryIO) -> dict[str, set[str]]:
    if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
        raise CheckpointError(f"{index} has {size:,} bytes, and is no index of a checkpoint's files")
    file.seek(0)
    try:
        content = parse_json(file.read(size))
    except ValueError as error:
        raise CheckpointError(f"{index} is not JSON: {printable(str(error))}") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map, which says in which file each tensor lies")
    if len(listed) > MOST_TENSORS:
        raise CheckpointError(f"{index} lists {len(listed):,} tensors, and tomevit reads up to {MOST_TENSORS:,}")
    files: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        # Of a name with a colon Windows makes a place on another drive.
        if not isinstance(name, str) or not name or set(name) & set("/\\:\0") or name in (".", ".."):
            raise CheckpointError(f"{index} lists {reprlib.repr(name)}, and must list names of files beside it")
        files.setdefault(name, set()).add(tensor)
    if len(files) > MOST_FILES:
        raise CheckpointError(f"{index} lists {len(files):,} files, and tomevit reads up to {MOST_FILES}")
    return dict(sorted(files.items()))


def files_of(path: Path) -> tuple[Path, ...]:
    """A file, and if it is an index, the files that it lists, sorted by name.

    Raises:
        CheckpointError: as `read_index`; or a listed file is missing, or lies elsewhere, behind a link.
    """
    return (path, *_find_parts(path, read_index(path) if is_index(path) else ()))


def _find_parts(path: Path, names: Iterable[str]) -> list[Path]:
    # The hub's cache keeps files in blobs/, and in snapshots/COMMIT/ links to them.
    places = (path.parent.resolve(), (path.parent / "../../blobs").resolve())
    listed = [path.parent / name for name in names]
    for file in listed:
        if not file.is_file():
            raise CheckpointError(f"{path} lists {printable(file.name)}, which is missing: it must lie beside it")
        if file.is_symlink() and file.resolve().parent not in places:
            raise CheckpointError(
                f"{path} lists {printable(file.name)}, which is a link to {file.resolve()}, elsewhere"
            )
    return listed


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of an index and the files that it lists: see `OpenFiles.sha256`.

    Raises:
        CheckpointError, OSError: as `open_files`.
    """
    with open_files(path) as files:
        return files.sha256()


def check_whole(path: Path) -> None:
    """Raises CheckpointError if a file is one of several, by its name or by the index beside it."""
    listing = [path.with_name(name) for name in INDICES if _lists(path.with_name(name), path.name)]
    numbered = PART.search(path.name)
    if listing or numbered:
        which = f"part {int(numbered[1])} of {int(numbered[2])}" if numbered else "one part"
        instead = listing[0] if listing else "the directory with all parts and their index, such as " + INDICES[0]
        raise CheckpointError(f"{path} is {which} of a checkpoint in several files: give {instead}")


def _lists(index: Path, name: str) -> bool:
    """Whether an index lists a file as one of several."""
    with suppress(OSError, CheckpointError):
        return name in (listed := read_index(index)) and len(listed) > 1
    return False

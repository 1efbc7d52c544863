"""A checkpoint in several files, and the index that says which tensor lies in which.

transformers, accelerate and huggingface_hub write it so: beside `model-00001-of-00002.safetensors` and its like lies
`model.safetensors.index.json` (or `pytorch_model.bin.index.json`), whose `weight_map` has a file for every tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from contextlib import suppress
from pathlib import Path

from tomevit.errors import CheckpointError, printable

#: How one file of several is named.
PART = re.compile(r"-(\d+)-of-(?!0*1\.)(\d+)\.\w+$")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MOST_BYTES = 2**26  # of an index; of the largest models that there are it has some ten MB
CHUNK = 2**20


def is_index(path: Path) -> bool:
    """Whether a file is an index of others, by its name or by what it says first."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return ".index." in path.name or b'"weight_map"' in file.read(2**16)


def read_index(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file that an index lists, the files sorted by name.

    Raises:
        CheckpointError: it is malformed, or lists what is not the name of a file beside it.
    """
    if (size := index.stat().st_size) > MOST_BYTES:
        raise CheckpointError(f"{index} has {size:,} bytes, and is no index of a checkpoint's files")
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not JSON: {printable(str(error))}") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no weight_map, which says in which file each tensor lies")
    files: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        # Of a name with a colon Windows makes a place on another drive.
        if not isinstance(name, str) or not name or set(name) & set("/\\:\0") or name in (".", ".."):
            raise CheckpointError(f"{index} lists {reprlib.repr(name)}, and must list names of files beside it")
        files.setdefault(name, set()).add(tensor)
    return dict(sorted(files.items()))


def files_of(path: Path) -> tuple[Path, ...]:
    """A file, and if it is an index, the files that it lists, sorted by name.

    Raises:
        CheckpointError: as `read_index`; or a listed file is missing, or lies elsewhere, behind a link.
    """
    if not is_index(path):
        return (path,)
    # The hub's cache keeps files in blobs/, and in snapshots/COMMIT/ links to them.
    places = (path.parent.resolve(), (path.parent / "../../blobs").resolve())
    listed = [path.parent / name for name in read_index(path)]
    for file in listed:
        if not file.is_file():
            raise CheckpointError(f"{path} lists {printable(file.name)}, which is missing: it must lie beside it")
        if file.is_symlink() and file.resolve().parent not in places:
            raise CheckpointError(
                f"{path} lists {printable(file.name)}, which is a link to {file.resolve()}, elsewhere"
            )
    return (path, *listed)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of an index and the files that it lists, one behind the other as `files_of` has them.

    Raises:
        CheckpointError: as `files_of`.
    """
    digest = hashlib.sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


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

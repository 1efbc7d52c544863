"""Where results are put: whole or not at all, never over an input, and never in place of what is no regular file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from tomevit.errors import OutputError, check_path, join_with_or

#: What an ending promises, everywhere.
ENDINGS = {
    ".json": "JSON",
    ".csv": "CSV",
    ".md": "Markdown",
    ".txt": "text",
    ".html": "a page",
    ".htm": "a page",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "an image"),
    **dict.fromkeys((".svg", ".pdf", ".ps", ".eps"), "a drawing"),
    ".safetensors": "safetensors",
    **dict.fromkeys((".pth", ".pt", ".bin", ".torch", ".ckpt"), "a checkpoint of torch's"),
    ".npz": "arrays of numpy's",
    ".onnx": "ONNX",
    ".pt2": "a program of torch's",
    ".parquet": "parquet",
    **dict.fromkeys((".tar", ".gz", ".zip", ".py", ".toml", ".yaml", ".yml"), "something else"),
}

#: A disk that is full, in the words of several systems.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}
_DRAFT = re.compile(r"\.(?P<host>[\w-]*)-(?P<pid>\d+)-[0-9a-f]{8}\.draft")


def check_output(
    path: str | os.PathLike[str],
    *,
    endings: Collection[str] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
    writable: bool = False,
) -> Path:
    """A path where a result can be put, as far as that can be known before the work.

    Args:
        path: a file, there or not; or a pipe or device, such as /dev/stdout.
        endings: of the names that such a result may have, as in (".json",); empty: any. Names whose ending promises
            nothing (`ENDINGS`) may have any content.
        inputs: files that are read for it.
        writable: try whether its directory can be written to.

    Raises:
        ValueError: the name's ending promises something else, or it is one of the inputs.
        IsADirectoryError, FileNotFoundError: it is a directory, or lies in none.
        OutputError: nothing can be written there.
    """
    check_path("path", path, "the file to write")
    path = Path(path)
    if is_stream(path):
        return path
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name the file to write")
    if endings and path.suffix.lower() in ENDINGS.keys() - set(endings):
        raise ValueError(f"{path} would hold something else than its name says: it must end in {join_with_or(endings)}")
    target = _target(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} into")
    if target.exists():
        for source in inputs:
            if os.path.exists(source) and os.path.samefile(target, source):  # noqa: PTH110, PTH121
                raise ValueError(f"{path} is what would be read: name another file to write")
        if not os.access(target, os.W_OK):
            raise OutputError(errno.EACCES, path)
    if writable:
        try:
            tempfile.TemporaryFile(dir=target.parent).close()
        except OSError as error:
            raise OutputError(error.errno or errno.EIO, path) from error
    return path


def check_outputs(*paths: Path | None, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Before the minutes of work whose results are to go there; None: nowhere.

    Raises:
        ValueError, OSError: as `check_output`; or two results would go to one file.
    """
    inputs, places = list(inputs), set()
    for path in filter(None, paths):
        place = path if is_stream(check_output(path, inputs=inputs, writable=True)) else _target(path)
        if place in places:
            raise ValueError(f"{path} is named for two results: name two files")
        places.add(place)


def make_directory(path: Path) -> None:
    """A directory for results, and those above it, unless it is there.

    Raises:
        OutputError: there can be none, or nothing can be written into it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OutputError(error.errno or errno.EIO, path) from error


@contextmanager
def new_file(
    path: str | os.PathLike[str],
    *,
    endings: Collection[str] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends well, and vanishes otherwise.

    It lies beside the file that `path` is or is a link to, and gets that file's mode. What is no regular file, such as
    a pipe, is written to when all is ready. What killed processes left of earlier files for this path is removed.

    Args, Raises: as `check_output`; OutputError also where the disk is full.
    """
    path = check_output(path, endings=endings, inputs=inputs)
    if is_stream(path):
        with tempfile.TemporaryDirectory(prefix="tomevit-") as folder:
            draft = Path(folder) / "output"
            yield draft
            with explain_os_errors(path, draft), draft.open("rb") as ready, _open_stream(path) as stream:
                shutil.copyfileobj(ready, stream)
        return
    target = _target(path)
    _sweep(target)
    draft = target.with_name(f"{_stem(target)}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.draft")
    try:
        with explain_os_errors(path, draft):
            draft.touch()  # or each writer would tell in its own words what the system refuses
            yield draft
            if target.exists():
                draft.chmod(stat.S_IMODE(target.stat().st_mode))
            draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def explain_os_errors(path: Path, draft: Path | None = None) -> Iterator[None]:
    """While `path` is written, maybe under the name of a draft: what the system refuses is told in one sentence.

    Raises:
        OutputError: in place of an OSError of these two files, or of a full disk, which names none.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        ours = isinstance(error, OSError) and error.filename in {p and os.fspath(p) for p in (path, draft)} - {None}
        if number is not None and (
            ours or isinstance(error, SafetensorError) or (not error.filename and number in (*FULL, errno.EIO))
        ):
            raise OutputError(number, path) from error
        raise


def error_number(error: OSError | SafetensorError) -> int | None:
    """The operating system's number of an error; safetensors tells it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def _descriptor(path: Path) -> int | None:
    """The file descriptor of this process that a path names, as /dev/stdout does."""
    name = os.path.abspath(path)  # noqa: PTH100
    if found := re.fullmatch(r"/dev/(stdin|stdout|stderr)", name):
        return _STANDARD[found[1]]
    found = re.fullmatch(r"(?:/dev|/proc/self)/fd/(\d+)", name)
    return None if found is None else int(found[1])


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device or the like, which must be written to and not replaced."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_stream(path: Path) -> BinaryIO:
    number = _descriptor(path)
    # Opened anew by its name, a file behind standard output would be cut to nothing.
    return path.open("wb") if number is None else os.fdopen(os.dup(number), "wb")


def _target(path: Path) -> Path:
    """The file that a path is, or is a link to."""
    return Path(os.path.realpath(path))


def _stem(target: Path) -> str:
    """How the names of a target's drafts begin: hidden, and no longer than file systems take."""
    return "." + target.name.encode("utf-8", "surrogateescape")[:160].decode("utf-8", "ignore")


def _host() -> str:
    return re.sub(r"[^\w-]", "", socket.gethostname())[:40]


def _sweep(target: Path) -> None:
    """Remove drafts of a target whose processes, on this machine, are no more."""
    if os.name != "posix":  # elsewhere a signal to ask whether a process lives may end it
        return
    stem, host = _stem(target), _host()
    with suppress(PermissionError), os.scandir(target.parent) as entries:  # a directory may be open to writing alone
        for entry in entries:
            found = _DRAFT.fullmatch(entry.name.removeprefix(stem)) if entry.name.startswith(stem) else None
            if found is not None and found["host"] == host and not _is_alive(int(found["pid"])):
                Path(entry.path).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True

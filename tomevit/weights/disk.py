"""What is put on a disk, and what the system says where that cannot be: one sentence, with the variable that helps."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tomevit.errors import DownloadError, OutputError, printable
from tomevit.output import FULL, error_number

REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOLCK),
)


class DiskError(DownloadError):
    """No place for a file: another source would not help."""


def no_home(variable: str) -> str:
    """That the system knows no home directory of this user, and what to do."""
    return f"this user has no home directory to keep weights in: set {variable} to a directory that you can write to"


def disk_error(number: int, path: Path, variable: str = "TOMEVIT_HOME", needed: int | None = None) -> DiskError:
    """That a path cannot be written, for the system's reason, and that a variable names another place.

    Args:
        needed: bytes, where the disk is full.
    """
    sentence = printable(str(OutputError(number, path)))
    if number not in FULL:
        return DiskError(f"{sentence}: set {variable} to a directory that you can write to")
    there = next(place for place in (path, *path.parents) if os.path.exists(place))  # noqa: PTH110 - raises nothing
    needs = "the file does not fit" if needed is None else f"{needed / 1e6:.1f} MB do not fit"
    return DiskError(
        f"{sentence}: {needs} into the {shutil.disk_usage(there).free / 1e6:.1f} MB that are left: "
        f"free some space, or set {variable} to a directory on a larger disk"
    )


@contextmanager
def explain_disk_errors(path: Path, variable: str = "TOMEVIT_HOME", needed: int | None = None) -> Iterator[None]:
    """While files are written at or under a path: that the disk is full or not writable is told as `disk_error`."""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        where = Path(os.fsdecode(getattr(error, "filename", None) or path))
        # A directory can be lacking where none can be made, as in /proc.
        if number not in (*FULL, *REFUSED) and not (number == errno.ENOENT and path.is_relative_to(where)):
            raise
        raise disk_error(number or errno.EIO, where, variable, needed) from error


def remove(path: Path) -> None:
    """Whatever lies at a path goes: a file, a link, a pipe, a directory with all that is in it, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unless_file(path: Path) -> None:
    """What lies at a path and is no regular file goes, so that one can be written there."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, where a power failure no longer takes it; or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # of a file system that cannot
            raise
    finally:
        os.close(descriptor)

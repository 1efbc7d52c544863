"""Locks between processes: a process that ends lets go of what it held, however it ended."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger("tomevit")

#: Seconds to wait in silence for another process.
PATIENCE = 2.0
#: What file systems say that have no locks, as some across a network.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def hold_lock(path: Path, doing: str) -> Iterator[bool]:
    """Hold a lock while the block runs, after all other processes that hold it; its file is made if need be.

    A wait is said; and so it is where the file system has no locks, and the block runs without. The value tells which.

    Args:
        path: of the file, in a directory that is there.
        doing: what who holds it is doing, as in "fetching vit_b16".

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            log.warning("waiting for another process, which is %s (it holds %s)", doing, path)
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked where it lies: no other process must be %s now", path, doing)
    try:
        yield lock.is_locked
    finally:
        lock.release()

"""WebDataset shards: tar files of samples, each read from front to back by one process.

A sample is a run of members whose names agree up to the first dot behind the last slash. That is its key, and what
follows the dot says what a member holds; the library webdataset groups them alike. Here tarfile does, since an
interrupted run is to pass over what it has done without reading it, and a shard that ends too early is to be named.
"""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tomevit.data.images import SUFFIXES, find, prepare_image
from tomevit.data.workers import load_batches
from tomevit.errors import ImageError
from tomevit.transform import Transform

#: How the name of a shard ends.
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

#: The key and the kind of a member, and the names of members that belong to no sample.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")

#: What tarfile and the decompressors raise at damaged files.
DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, lzma.LZMAError)


def find_shards(source: str | PathLike[str]) -> list[str]:
    """The shards that a source names, sorted; none if it names something else.

    Args:
        source: a shard, a folder of shards, or a pattern with the shell's wildcards.

    Raises:
        ValueError: there is no such file, or a folder holds both shards and images.
    """
    folder = Path(source)
    if not folder.is_dir():
        found = find([source])
        return found if all(name.lower().endswith(ENDINGS) for name in found) else []
    inside = sorted(str(path) for path in folder.iterdir() if path.name.lower().endswith(ENDINGS))
    if inside and any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*")):
        raise ValueError(f"{folder} holds both shards and images: name the ones or the others by a pattern")
    return inside


def expand_braces(pattern: str) -> list[str]:
    """A pattern's braces, {000..099} and {train,val}, expanded as a shell does; a name that exists is left alone."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if braces is None or Path(pattern).exists():
        return [pattern]
    if braces[3] is not None:
        inside = braces[3].split(",")
    else:
        ends = braces[1], braces[2]
        first, last = map(int, ends)
        width = max(map(len, ends)) if any(end != "0" and end.startswith("0") for end in ends) else 1
        step = 1 if first <= last else -1
        inside = [f"{number:0{width}}" for number in range(first, last + step, step)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return list(dict.fromkeys(name for middle in inside for name in expand_braces(before + middle + after)))


class Sample(NamedTuple):
    """What stands in a shard under one key."""

    key: str
    name: str  # of the member that is its image; the key if it has none
    image: bytes | None
    kinds: list[str]  # what its members hold, as in ["cls", "jpg"]


def samples(shard: str | PathLike[str], begin: int = 0) -> Iterator[Sample]:
    """The samples of a shard in order, from the given number on.

    Raises:
        ImageError: it is no tar file, or damaged, or cut off, or holds no samples; behind all samples before that.
    """
    count = 0
    try:
        with tarfile.open(shard) as tar:
            for key, members in groupby(_members(tar), key=lambda member: member.key):
                if count >= begin:
                    yield _read_sample(tar, key, members)
                count += 1
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if count:
            reason = f"damaged behind {count} sample{'s' * (count > 1)}: {reason}"
        elif isinstance(error, tarfile.ReadError):
            reason = "damaged, or no tar file"
        raise ImageError(fspath(shard), reason) from error
    if not count:
        raise ImageError(fspath(shard), "there are no samples in it")


class _Member(NamedTuple):
    key: str
    kind: str
    info: tarfile.TarInfo


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    try:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # where tarfile would keep all of them
            named = MEMBER.fullmatch(info.name)
            if named is not None and info.isreg() and META.match(info.name) is None:
                yield _Member(named[1], named[2].lower(), info)
        # A header that makes no sense is the end to tarfile, and so is a part of one.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("no header where one should be")
    except DAMAGED:
        yield _Member("\0", "", tarfile.TarInfo())  # it ends the sample in front, which is whole
        raise


def _read_sample(tar: tarfile.TarFile, key: str, members: Iterable[_Member]) -> Sample:
    """A sample with its image: the first member of a kind in SUFFIXES, else the first whose kind ends so (left.jpg)."""
    kinds: list[str] = []
    name, image, best = key, None, 0
    for _, kind, info in members:
        kinds.append(kind)
        fits = 2 if f".{kind}" in SUFFIXES else 1 if f".{kind.rpartition('.')[2]}" in SUFFIXES else 0
        if fits > best:
            file = tar.extractfile(info)
            assert file is not None  # it is a regular file
            name, image, best = info.name, file.read(), fits
    return Sample(key, name, image, kinds)


def prepare_sample(sample: Sample, transform: Transform, *, upright: bool = False) -> Tensor | str:
    """The image of a sample as a model takes it, (C, H, W) float32; or why there is none. Arguments as the stream's."""
    if sample.image is None:
        return f"no image in this sample, which holds {', '.join(sample.kinds)}"
    return prepare_image(sample.image, transform, upright=upright)


class Batch(NamedTuple):
    """Samples that follow each other in a shard."""

    shard: int  # its place among all
    first: int  # number of the batch's first sample
    keys: list[str]  # of those that were read
    images: Tensor  # (B, C, H, W) float32, prepared for the model
    unreadable: list[tuple[str, str]]  # names and reasons
    last: bool  # the shard ends here


def stream_samples(
    shards: Sequence[str],
    transform: Transform,
    *,
    batch: int = 32,
    workers: int = 0,
    begin: Sequence[tuple[int, int]] | None = None,
    upright: bool = False,
) -> Iterator[Batch]:
    """The samples of shards as batches for a model, read and prepared by several processes, each on a shard of its own.

    Of one shard batches come in order; those of as many shards as there are processes come in turns. What cannot be
    read is named in its batch, which is so much smaller. A shard's last batch may be empty.

    Args:
        shards: all of them.
        transform: the model's (`tomevit.transform`).
        batch: samples per batch.
        workers: processes that read; 0: this one.
        begin: the places of the shards to read, each with its first sample to read; None: all.
        upright: as in `tomevit.data.images.read`.
    """
    begin = [(place, 0) for place in range(len(shards))] if begin is None else begin
    todo = [(place, shards[place], first) for place, first in begin]
    # A process without a shard would only take memory.
    yield from load_batches(_Shards(todo, transform, batch, upright), min(workers, len(todo)), batch_size=None)


class _Shards(IterableDataset[Batch]):
    def __init__(self, shards: Sequence[tuple[int, str, int]], transform: Transform, batch: int, upright: bool) -> None:
        self.shards, self.transform, self.batch, self.upright = shards, transform, batch, upright

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        for place, shard, first in self.shards if worker is None else self.shards[worker.id :: worker.num_workers]:
            yield from self._batches(place, shard, first)

    def _batches(self, place: int, shard: str, first: int) -> Iterator[Batch]:
        found = samples(shard, first)
        last = False
        while not last:
            keys: list[str] = []
            images: list[Tensor] = []
            unreadable: list[tuple[str, str]] = []
            count = 0
            try:
                for count, sample in enumerate(islice(found, self.batch), 1):  # noqa: B007
                    image = prepare_sample(sample, self.transform, upright=self.upright)
                    if isinstance(image, Tensor):
                        keys.append(sample.key)
                        images.append(image)
                    else:
                        unreadable.append((f"{shard}/{sample.name}", image))
                last = count < self.batch
            except ImageError as error:  # of the shard
                unreadable.append((shard, error.reason))
                last = True
            yield Batch(
                place, first, keys, torch.stack(images) if images else torch.empty(0, device="cpu"), unreadable, last
            )
            first += count

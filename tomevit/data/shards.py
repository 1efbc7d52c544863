"""WebDataset shards: tar files of samples, each read from front to back by one process.

A sample is a run of members whose names agree up to the first dot after the last slash. That is its key, and what
follows the dot says what a member holds; the library webdataset groups them alike, but refuses a kind that comes twice,
which begins another sample here. Of tarfile only the blocks of headers are used: it trusts whatever they say, of sizes
to read and of places to go to, and goes on in a sparse member beyond what there is.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tomevit.data.images import SUFFIXES, find, prepare_image, quiet
from tomevit.data.workers import load_batches
from tomevit.errors import ImageError
from tomevit.opening import open_file
from tomevit.transform import Transform

#: How the name of a shard ends.
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

#: The key and the kind of a member, and the names of members that belong to no sample.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__(/|$)")

#: Bytes that an image may have, and the extended header of a member: long names and attributes.
MOST, MOST_OF_HEADER = 2**28, 2**20
#: How much more than itself a compressed shard may hold, and how many times as much: what is larger is no data set.
EXPANDED, EXPANSION = 2**28, 200
#: So many kinds of members are named, of a sample without an image.
LISTED = 10
#: Names that one pattern may have braces for.
MOST_NAMES = 10**6

#: How compressed files begin, and what reads them.
PACKED: dict[bytes, Callable[[BinaryIO], gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
#: Headers that say more of the member after them.
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
#: A record of an extended header: its length, and what it is of.
RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")

#: What the decompressors and tarfile raise at damaged files.
DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, lzma.LZMAError)


def find_shards(source: str | PathLike[str]) -> list[str]:
    """The shards that a source names, sorted; none if it names something else.

    Args:
        source: a shard, a folder of shards, or a pattern with the shell's wildcards. Hidden files in a folder, whose
            names begin with a dot, are none.

    Raises:
        ValueError: there is no such file, or a folder holds both shards and images.
    """
    folder = Path(source)
    if not folder.is_dir():
        found = find([source])
        return found if all(name.lower().endswith(ENDINGS) for name in found) else []
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    inside = sorted(str(path) for path in visible if path.name.lower().endswith(ENDINGS) and not path.is_dir())
    if inside and any(
        path.suffix.lower() in SUFFIXES
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ):
        raise ValueError(f"{folder} holds both shards and images: name the ones or the others by a pattern")
    return inside


def expand_braces(pattern: str) -> list[str]:
    """A pattern's braces, {000..099} and {train,val}, expanded as a shell does; a name that exists is left alone.

    Raises:
        ValueError: that would be more than MOST_NAMES.
    """
    braces = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if braces is None or Path(pattern).exists():
        return [pattern]
    if braces[3] is not None:
        inside = braces[3].split(",")
    else:
        ends = braces[1], braces[2]
        first, last = map(int, ends)
        if abs(last - first) >= MOST_NAMES:
            raise ValueError(f"{pattern} names {abs(last - first) + 1:,} files, more than {MOST_NAMES:,}")
        width = max(map(len, ends)) if any(end != "0" and end.startswith("0") for end in ends) else 1
        step = 1 if first <= last else -1
        inside = [f"{number:0{width}}" for number in range(first, last + step, step)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return list(dict.fromkeys(name for middle in inside for name in expand_braces(before + middle + after)))


# -------------------------------------------------------------------------------------------------------------- samples


class Sample(NamedTuple):
    """What stands in a shard under one key."""

    key: str
    name: str  # of the member that is its image; the key if it has none
    image: bytes | None
    kinds: list[str]  # what its members hold, as in ["cls", "jpg"]
    problem: str = ""  # why there is no image, if a member is one
    left_out: tuple[str, ...] = ()  # names of members that are its image as much as the first of them


def samples(shard: str | PathLike[str], begin: int = 0) -> Iterator[Sample]:
    """The samples of a shard in order, from the given number on.

    The image of a sample is its first member of a kind in SUFFIXES, else the first whose kind ends so (left.jpg).

    Raises:
        ImageError: it is no tar file, or damaged, or cut off, or holds no samples; after all samples before that.
    """
    count, draft = 0, None
    try:
        with open_file(shard) as file:
            data = _Content(file)
            for member in _members(data):
                if draft is not None and (isinstance(member, Exception) or not draft.takes(member)):
                    if count >= begin:
                        yield draft.sample()
                    count, draft = count + 1, None
                if isinstance(member, Exception):
                    raise member
                draft = draft or _Draft(member.key)
                draft.add(member, data if count >= begin else None)
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.removeprefix(f"{fspath(shard)} ")
        if count:
            reason = f"damaged after {count} sample{'s' * (count > 1)}: {reason}"
        elif isinstance(error, tarfile.ReadError):
            reason = "damaged, or no tar file"
        raise ImageError(fspath(shard), reason) from error
    if draft is not None and count >= begin:
        yield draft.sample()
    if draft is None:
        raise ImageError(fspath(shard), "there are no samples in it")


class _Member(NamedTuple):
    key: str
    kind: str
    name: str
    size: int
    sparse: bool  # its size is what it would expand to, and not what is stored


@dataclass
class _Draft:
    """A sample whose members come one by one."""

    key: str
    name: str = ""
    image: bytes | None = None
    problem: str = ""
    kinds: dict[str, None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    best: int = 0  # how well its image fits

    def takes(self, member: _Member) -> bool:
        return member.key == self.key and member.kind not in self.kinds

    def add(self, member: _Member, data: _Content | None) -> None:
        """Take a member; its image is read if there is data to read it from, which is behind its header."""
        kind = member.kind
        self.kinds[kind] = None
        fits = 2 if f".{kind}" in SUFFIXES else 1 if f".{kind.rpartition('.')[2]}" in SUFFIXES else 0
        if data is None or not fits:
            return
        if fits > self.best:
            self.name, self.best, self.left_out, self.image = member.name, fits, [], None
            if member.sparse:
                self.problem = "it is stored as a sparse file, which is not read"
            elif member.size > MOST:
                self.problem = f"it has {member.size:,} bytes, more than the {MOST:,} that are read"
            else:
                self.problem, self.image = "", data.read(member.size)
        elif fits == self.best:
            self.left_out.append(member.name)

    def sample(self) -> Sample:
        return Sample(self.key, self.name or self.key, self.image, list(self.kinds), self.problem, tuple(self.left_out))


class _Content:
    """What is in a shard, unpacked, from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        begin = file.peek(6)  # type: ignore[attr-defined]  # what `open_file` opens has a buffer
        self.unpacked = next((read(file) for magic, read in PACKED.items() if begin.startswith(magic)), None)
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def read(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            tarfile.ReadError: there are fewer; or a small file expands without end.
        """
        found = self.read_most(size) if self.unpacked is not None or self.at + size <= self.size else b""
        if len(found) < size:
            raise tarfile.ReadError("unexpected end of data")
        return found

    def read_most(self, size: int) -> bytes:
        """So many bytes, or what there is."""
        found = (self.unpacked or self.file).read(size)
        self.at += len(found)
        if self.unpacked is not None and self.at > EXPANDED + EXPANSION * self.file.tell():
            raise tarfile.ReadError(f"it expands to more than {EXPANSION} times its size")
        return found

    def skip(self, size: int) -> None:
        """Pass over so many bytes. Raises: as `read`."""
        if self.unpacked is None:
            if self.at + size > self.size:
                raise tarfile.ReadError("unexpected end of data")
            self.file.seek(size, os.SEEK_CUR)
            self.at += size
            return
        while size > 0:
            size -= len(self.read(min(size, 2**20)))


def _members(data: _Content) -> Iterator[_Member | Exception]:
    """The members of samples, each before what it holds is read; if the shard is damaged, at the end by what."""
    try:
        while (header := _next_header(data)) is not None:
            info, records = header
            path = records.get(b"GNU.sparse.name") or records.get(b"path")
            name = info.name if path is None else path.decode("utf-8", "surrogateescape")
            size = int(records.get(b"size", info.size))
            if size < 0:
                raise tarfile.ReadError("a size is negative")
            end = (
                data.at if info.islnk() or info.issym() or info.isdir() or info.isdev() else data.at + _in_blocks(size)
            )
            named = MEMBER.fullmatch(name)
            if named is not None and info.isreg() and META.match(name) is None:
                sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records)
                yield _Member(named[1], named[2].lower(), name, size, sparse)
            data.skip(end - data.at)
    except DAMAGED as error:
        yield error


def _next_header(data: _Content) -> tuple[tarfile.TarInfo, dict[bytes, bytes]] | None:
    """The next member's header, and the records of the extended headers before it; None: the shard ends here."""
    records: dict[bytes, bytes] = {}
    extended = False
    while True:
        block = data.read_most(tarfile.BLOCKSIZE)
        if not extended and data.at and not block.strip(b"\0"):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            reason = "truncated header" if extended else "no header where one should be"
            raise tarfile.ReadError(reason) from error
        if info.type not in EXTENDED:
            if info.type == tarfile.GNUTYPE_SPARSE:
                more = block[482]
                while more:  # blocks of the map of what is stored
                    more = data.read(tarfile.BLOCKSIZE)[504]
            return info, records
        extended = True
        if not 0 <= info.size <= MOST_OF_HEADER:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        body = data.read(_in_blocks(info.size))[: info.size]
        if info.type == tarfile.GNUTYPE_LONGNAME:
            records[b"path"] = body.partition(b"\0")[0]
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records.update(_records(body))


def _records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """What an extended header of POSIX says: each record is "LENGTH KEY=VALUE" and a line feed."""
    begin = 0
    while found := RECORD.match(body, begin):
        end = begin + int(found[1])
        if not found.end() < end <= len(body):
            raise tarfile.ReadError("an extended header that makes no sense")
        yield found[2], body[found.end() : end - 1]
        begin = end


def _in_blocks(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def prepare_sample(sample: Sample, transform: Transform, *, upright: bool = False) -> Tensor | str:
    """The image of a sample as a model takes it, (C, H, W) float32; or why there is none. Arguments as the stream's."""
    if sample.image is None:
        more = ["…"] * (len(sample.kinds) > LISTED)
        return sample.problem or f"no image in this sample, which holds {', '.join(sample.kinds[:LISTED] + more)}"
    return prepare_image(sample.image, transform, upright=upright)


class Batch(NamedTuple):
    """Samples that follow each other in a shard."""

    shard: int  # its place among all
    first: int  # number of the batch's first sample
    keys: list[str]  # of those that were read
    images: Tensor  # (B, C, H, W) float32, prepared for the model
    unreadable: list[tuple[str, str]]  # names and reasons, also of the other images of samples that have several
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
    dataset = _Shards(todo, transform, batch, upright)
    yield from load_batches(dataset, min(workers, len(todo)), batch_size=None, worker_init_fn=quiet)


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
                    unreadable += [(f"{shard}/{name}", f"another image of {sample.key}") for name in sample.left_out]
                last = count < self.batch
            except ImageError as error:  # of the shard
                unreadable.append((shard, error.reason))
                last = True
            yield Batch(
                place, first, keys, torch.stack(images) if images else torch.empty(0, device="cpu"), unreadable, last
            )
            first += count

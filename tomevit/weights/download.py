"""Files from the network, by URL: resumed where they broke off, tried again where that may help.

A URL is read without credentials: those that huggingface_hub's client has are for the hub. All URLs can come from a
mirror: with TOMEVIT_MIRROR=http://mirror, https://host/path is read as http://mirror/host/path.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from tomevit.errors import DownloadError
from tomevit.opening import open_file, read_small_file
from tomevit.progress import progress_bar
from tomevit.typed import conform
from tomevit.weights.disk import DiskError, disk_error, explain_disk_errors, remove_unless_file, sync
from tomevit.weights.servers import (
    Interrupted,
    check_answer,
    get,
    http_library,
    is_offline,
    number,
    retry,
    watch,
    words,
)

ATTEMPTS = 5  # in a row that do not bring `least_bytes`
MOST_INFLATED = 100  # times the size of what comes compressed; weights shrink by a tenth
CHUNK = 2**20


def is_web_page(path: Path) -> bool:
    with open_file(path) as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(
        (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<body", b"<title", b"<meta", b"<script")
    )


def download(url: str, path: Path) -> None:
    """Bring a URL to a path, in as many attempts as it takes, also of several processes one after another.

    Beside it lie, until it is whole, PATH.part with its beginning, and PATH.json, which tells what that is of.

    Raises:
        DownloadError: it cannot be had, or not be stored.
    """
    note, part = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.part")
    if path.is_file() and (begun := _read_note(note)) and begun.url == url:
        return
    if is_offline():
        raise DownloadError(f"{url} is not here, and HF_HUB_OFFLINE is set")
    address = _address(url)
    try:
        with explain_disk_errors(part):
            for leftover in (path, part, note):
                remove_unless_file(leftover)
            retry(lambda: _continue(url, address, part, note), ATTEMPTS, lambda: _size(part))
            if is_web_page(part):
                part.unlink()
                raise DownloadError(f"{address} answered with a web page, not with a file")
            sync(part)
            part.replace(path)
    except DiskError:
        part.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Note:
    """What the part beside it is the beginning of."""

    url: str = ""
    validator: str | None = None  # by which the server knows this very file again
    size: int | None = None  # of the whole


def _continue(url: str, address: str, part: Path, note: Path) -> None:
    """One request, for what is missing from a part if the server still has the same file, else for all of it."""
    begun, have = _read_note(note), _size(part)
    if begun is None or begun.url != url or not begun.validator:
        begun, have = None, 0
    if begun is not None and have and have == begun.size:
        return
    wanted = {"Range": f"bytes={have}-", "If-Range": begun.validator or ""} if begun and have else {}
    with get(address, wanted) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)  # it is longer than the server's file
        check_answer(response, address, partial=bool(wanted))
        headers = response.headers
        compressed = _is_compressed(headers, address)
        length = None if compressed else number(headers.get("Content-Length", ""))
        if begun and response.status_code == 206:
            size = begun.size if compressed else _size_if_continued(headers, have, begun)
            if compressed or size is None:
                part.unlink()
                raise Interrupted(f"{address} answered with another part than the one asked for")
        else:
            have, size = 0, length
        if size is not None and shutil.disk_usage(part.parent).free < size - have:
            raise disk_error(errno.ENOSPC, part, needed=size)
        with explain_disk_errors(part, needed=size):
            if have == 0:
                part.unlink(missing_ok=True)  # first: bytes must never meet another file's note
                new = _Note(url, None if compressed else _validator(headers), size)
                note.write_text(json.dumps(asdict(new)), encoding="utf-8")
            chunks = watch(response.iter_raw(), address)
            _append(_inflate(chunks, address) if compressed else chunks, address, part, size)


def _size_if_continued(headers: Mapping[str, str], have: int, begun: _Note) -> int | None:
    """The size of the whole file, if an answer is the rest of the one that was begun."""
    match = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", headers.get("Content-Range", ""), re.ASCII)
    if match is None or _validator(headers) != begun.validator:
        return None
    start, end, size = map(int, match.groups())
    return size if start == have and end == size - 1 and begun.size in (None, size) else None


def _append(chunks: Iterator[bytes], address: str, part: Path, size: int | None) -> None:
    """Write the body of an answer after a part, which shall then have a size."""
    bar = progress_bar(desc=part.stem, total=size, initial=_size(part), in_bytes=True)
    try:
        with bar, part.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
                bar.update(len(chunk))
    except http_library().HTTPError as error:
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes ({words(error)})") from error
    if _size(part) != size and (size is not None or not _size(part)):
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes")


def _is_compressed(headers: Mapping[str, str], address: str) -> bool:
    """Whether the body is the file as gzip packs it, though it was asked for as it is."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise DownloadError(f"{address} answered with a file packed as {words(encoding)}, not with the file as it is")
    return "gzip" in encoding


def _inflate(chunks: Iterator[bytes], address: str) -> Iterator[bytes]:
    """What gzip packed, in pieces of bounded size.

    Raises:
        DownloadError: it is no such thing, or much larger than weights can be.
        Interrupted: it ends too early.
    """
    inflater, came, made = zlib.decompressobj(wbits=31), 0, 0
    for chunk in chunks:
        came += len(chunk)
        piece = rest = chunk
        while piece and not inflater.eof and (rest or len(piece) == CHUNK):
            try:
                piece = inflater.decompress(rest, CHUNK)
            except zlib.error as error:
                raise DownloadError(f"{address} answered with a damaged file, packed as gzip ({error})") from error
            rest = inflater.unconsumed_tail
            made += len(piece)
            if made > MOST_INFLATED * came + CHUNK:
                raise DownloadError(f"{address} answered with {came} bytes that gzip makes {made} of, and more")
            yield piece
    if not inflater.eof:
        raise Interrupted(f"{address} ended after {came} bytes of a file packed as gzip")


def _address(url: str) -> str:
    """Where a URL is read: from the mirror, if there is one."""
    mirror = os.environ.get("TOMEVIT_MIRROR")
    url = f"{mirror.rstrip('/')}/{url.partition('://')[2]}" if mirror else url
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is neither http:// nor https://")
    return quote(url, safe="%/:=&?~+!$,;'@()*[]")


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range takes: a strong ETag, else the date."""
    etag = headers.get("ETag", "")
    found = etag if etag.startswith('"') else headers.get("Last-Modified")
    return found if found and len(found) <= 1000 and found.isascii() and found.isprintable() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def is_resumable(note: Path) -> bool:
    """Whether beside a note of `download` there is something of the file, or all of it."""
    whole = note.with_suffix("")
    return whole.is_file() or whole.with_name(f"{whole.name}.part").is_file()


def _read_note(path: Path) -> _Note | None:
    """None: there is none, or something else, or what a process that died has left of it."""
    try:
        note = conform(_Note, json.loads(read_small_file(path, 2**16)), "note")
    except (OSError, ValueError, RecursionError):
        return None
    assert isinstance(note, _Note)
    return note

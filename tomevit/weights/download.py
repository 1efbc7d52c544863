"""Files from the network, by URL or from the hub: resumed where they broke off, tried again where that may help.

URLs are read by the client that huggingface_hub hands out, with the proxies, certificates and whatever else its
`set_client_factory` was told of, but without credentials: those that the client has are for the hub. All URLs can come
from a mirror: with TOMEVIT_MIRROR=http://mirror, https://host/path is read as http://mirror/host/path.

No server is waited for without end. HF_HUB_DOWNLOAD_TIMEOUT bounds its silence, in seconds (10), and over three times
as long it must send `LEAST_RATE` bytes a second, which a telephone line does; else that attempt has failed. Of
redirects and errors no more is read than is shown.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import cache, partial
from pathlib import Path
from ssl import SSLCertVerificationError
from threading import Timer
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from safetensors import SafetensorError
from tqdm import tqdm

from tomevit.cards import first_line
from tomevit.config import Source
from tomevit.errors import DownloadError, OutputError, printable
from tomevit.opening import open_file, read_small_file
from tomevit.output import FULL, error_number
from tomevit.typed import conform
from tomevit.weights.other_files import shorten

log = logging.getLogger("tomevit")

ATTEMPTS = 5  # in a row that do not bring `_least_bytes`
HUB_ATTEMPTS = 3  # around huggingface_hub, which retries most failures itself
BACKOFF = 1.0  # seconds before the second attempt; doubles with each
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
REDIRECTS = 10  # at most, of one request
LEAST_RATE = 1000  # bytes a second
MOST_SAID = 2**16  # bytes of an error that are read
MOST_INFLATED = 100  # times the size of what comes compressed; weights shrink by a tenth
CHUNK = 2**20

REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOLCK),
)

T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - no error yet
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, *, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for


class UnreachableError(DownloadError):
    """The hub does not answer, or should not be asked."""


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


def words(text: object) -> str:
    """What others say, in one printable line of bounded length, in which no token stands."""
    from huggingface_hub import get_token

    said = str(text)
    if token := get_token():
        said = said.replace(token, "…")
    return shorten(printable(shorten(re.sub(r"(?i)(bearer )[^'\"]+", r"\1…", said), 1000)), 300)


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


def is_web_page(path: Path) -> bool:
    with open_file(path) as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith(
        (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<body", b"<title", b"<meta", b"<script")
    )


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def retry(attempt: Callable[[], T], attempts: int, size: Callable[[], int] = lambda: 0) -> T:
    """Call until it is no longer Interrupted, with pauses that grow.

    Args:
        attempts: after so many without progress, which is a `size` larger by `_least_bytes`, it is given up.

    Raises:
        DownloadError: given up.
    """
    failures, most = 0, 0
    while True:
        try:
            return attempt()
        except Interrupted as error:
            advanced = size() >= most + _least_bytes()
            failures = 1 if advanced else failures + 1
            most = size() if advanced else most
            if failures >= attempts:
                raise DownloadError(f"{error}; gave up after {failures} attempts") from error
            pause = BACKOFF * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            pause = min(max(error.wait, pause), LONGEST_WAIT)
            log.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)


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
    with _get(address, wanted) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)  # it is longer than the server's file
        _check_answer(response, address, partial=bool(wanted))
        headers = response.headers
        compressed = _is_compressed(headers, address)
        length = None if compressed else _number(headers.get("Content-Length", ""))
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
            chunks = _watch(response.iter_raw(), address)
            _append(_inflate(chunks, address) if compressed else chunks, address, part, size)


def _size_if_continued(headers: Mapping[str, str], have: int, begun: _Note) -> int | None:
    """The size of the whole file, if an answer is the rest of the one that was begun."""
    match = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", headers.get("Content-Range", ""), re.ASCII)
    if match is None or _validator(headers) != begun.validator:
        return None
    start, end, size = map(int, match.groups())
    return size if start == have and end == size - 1 and begun.size in (None, size) else None


def _append(chunks: Iterator[bytes], address: str, part: Path, size: int | None) -> None:
    """Write the body of an answer behind a part, which shall then have a size."""
    bar = tqdm(
        desc=part.stem, total=size, initial=_size(part), unit="B", unit_scale=True, delay=2, leave=False, disable=None
    )
    try:
        with bar, part.open("ab") as file:
            for chunk in chunks:
                file.write(chunk)
                bar.update(len(chunk))
    except _http_library().HTTPError as error:
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes ({words(error)})") from error
    if _size(part) != size and (size is not None or not _size(part)):
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes")


def _seconds_watched() -> float:
    from huggingface_hub import constants

    return 3.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT


def _least_bytes() -> float:
    """That must come in `_seconds_watched`."""
    return max(1.0, LEAST_RATE * _seconds_watched())


def _watch(chunks: Iterator[bytes], address: str, most: float = math.inf) -> Iterator[bytes]:
    """The chunks of a body as they come.

    Args:
        most: bytes, of which the last chunk may exceed; what comes behind is left.

    Raises:
        Interrupted: they come too slowly.
    """
    seconds, least = _seconds_watched(), _least_bytes()
    begun, came, total = time.monotonic(), 0, 0
    for chunk in chunks:
        yield chunk
        came, total, now = came + len(chunk), total + len(chunk), time.monotonic()
        if total >= most:
            return
        if now - begun >= seconds:
            if came < least:
                raise Interrupted(f"{address} is too slow: it sent {came} bytes in {now - begun:.0f} s")
            begun, came = now, 0


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


@contextmanager
def _get(address: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer of a server, of whatever status, whose body can be read while the context lasts."""
    from huggingface_hub import constants, get_session

    http = _http_library()
    headers = {"User-Agent": "tomevit", "Accept-Encoding": "identity", **headers}
    watch = _HeadWatch()
    try:
        client = get_session()
        request = client.build_request("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.headers.pop("Authorization", None)  # which a client of the user's own may have for the hub
        for _ in range(REDIRECTS):
            request.extensions["trace"] = watch
            response = client.send(request, auth=None, stream=True, follow_redirects=False)
            if response.next_request is None:
                break
            response.close()
            if response.next_request.url.scheme not in ("https", request.url.scheme):
                place = response.headers["Location"]
                raise DownloadError(
                    f"{request.url} redirects to {words(place)}, which is less safe than where it began"
                )
            request = response.next_request
        else:
            raise DownloadError(f"{address} redirects more than {REDIRECTS} times")
    except DownloadError:
        raise
    except (http.InvalidURL, ImportError, ValueError) as error:  # of the address, or a proxy that it cannot speak to
        raise DownloadError(f"{address}: {words(error)}") from error
    except (http.HTTPError, OSError) as error:
        if _is_about_certificates(error):
            raise DownloadError(f"{address}: {words(error)}") from error
        reason = "it is too slow to begin its answer" if watch.ended else words(error) or type(error).__name__
        raise Interrupted(f"{address} cannot be reached ({reason})") from error
    with closing(response):
        yield response


def _http_library() -> Any:
    """httpx, or what else huggingface_hub is built on: since its version 2, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


class _HeadWatch:
    """Ends a new connection whose server dribbles the head of its answer: the timeout is of each silence alone.

    It is what httpx calls the trace of a request.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.timer: Timer | None = None
        self.ended = False

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.stream = info["return_value"]
        elif event.endswith("receive_response_headers.started") and self.stream is not None:
            self.timer = Timer(_seconds_watched(), self.end)
            self.timer.daemon = True
            self.timer.start()
        elif self.timer is not None and event.endswith(("headers.complete", "headers.failed")):
            self.timer.cancel()
            self.timer = None

    def end(self) -> None:
        self.ended = True
        with suppress(OSError):  # it is closed by now
            socket.socket.shutdown(self.stream.get_extra_info("socket"), socket.SHUT_RDWR)


#: How many bytes an answer may have to what is asked by us, in this thread; None: it is not by us that anything is.
_asked_by_us: ContextVar[float | None] = ContextVar("_asked_by_us", default=None)


@contextmanager
def bounded_answers(most: float = math.inf) -> Iterator[None]:
    """While huggingface_hub asks for us: redirects and errors are read up to `MOST_SAID`, and all else is watched.

    Its client would read a redirect of any size into memory. It is the process's, and gets hooks that do nothing for
    others' requests.

    Args:
        most: bytes of an answer that are read.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _bound_answer not in hooks["response"]:
        hooks["response"].append(_bound_answer)
        hooks["request"].append(_bound_head)
    token = _asked_by_us.set(most)
    try:
        yield
    finally:
        _asked_by_us.reset(token)


def _bound_head(request: Any) -> None:
    # What is sent may take its time to be answered.
    if _asked_by_us.get() is not None and request.method in ("GET", "HEAD"):
        request.extensions.setdefault("trace", _HeadWatch())


def _bound_answer(response: Any) -> None:
    if (most := _asked_by_us.get()) is not None:
        response.stream = _watched_stream()(response, most if response.is_success else MOST_SAID)


@cache
def _watched_stream() -> Any:
    class WatchedStream(_http_library().SyncByteStream):  # type: ignore[misc]
        def __init__(self, response: Any, most: float) -> None:
            self.address, self.stream, self.most = str(response.request.url), response.stream, most

        def __iter__(self) -> Iterator[bytes]:
            return _watch(self.stream, self.address, self.most)

        def close(self) -> None:
            self.stream.close()

    return WatchedStream


def _check_answer(response: Any, address: str, *, partial: bool) -> None:
    """Raises DownloadError or Interrupted unless an answer holds a file, or the part of one that was asked for."""
    status = response.status_code
    if status not in (200, 203, 206 if partial else 200):
        reason = f"{address} answered {status} {words(response.reason_phrase)}"
        if status in (408, 416, 425, 429) or status >= 500:
            raise Interrupted(reason, wait=_seconds_to_wait(response.headers.get("Retry-After", "")))
        raise DownloadError(reason)
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise DownloadError(f"{address} answered with a web page, not with a file")


def _seconds_to_wait(value: str) -> float:
    """What a server asks for, as a number or as a date."""
    if (seconds := _number(value)) is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value[:100]).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _number(text: str) -> int | None:
    """A header's, unless it is none, or larger than anything is."""
    return int(text) if re.fullmatch(r"\s*\d{1,20}\s*", text, re.ASCII) else None


def _is_about_certificates(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


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


def files_on_hub(source: Source, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Those of some files that a repository has, with their paths in huggingface_hub's cache.

    Each is downloaded when it is its turn. Where the hub cannot be reached, they are those in that cache.

    Raises:
        UnreachableError: at the end, after what the cache has.
        DownloadError: the hub refuses, or fails.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: Exception | None = None
    for name in names:
        try:
            path = retry(partial(_try_hub, source, name, local=unreachable is not None), HUB_ATTEMPTS)
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except EntryNotFoundError:
            continue
        else:
            yield name, path
    if unreachable is not None:
        cause = words(first_line(unreachable.__cause__ or unreachable))
        offline = "is not in Hugging Face's cache, and HF_HUB_OFFLINE is set"
        why = offline if is_offline() else f"cannot be reached ({cause})"
        raise UnreachableError(f"{source.hub} {why}") from unreachable


def _try_hub(source: Source, name: str, *, local: bool) -> Path:
    """One attempt; its EntryNotFoundError: there is no such file, LocalEntryNotFoundError: the hub cannot be asked."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert source.hub
    repo, cache = source.hub, Path(constants.HF_HUB_CACHE)
    if cache.parts[:1] == ("~",):
        raise DiskError(no_home("HF_HOME"))
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        with bounded_answers(), explain_disk_errors(cache, "HF_HOME"):
            # It would warn, and then fill the disk.
            there = hf_hub_download(repo, name, revision=source.revision, local_files_only=local, dry_run=True)
            place = next(place for place in (cache, *cache.parents) if place.exists())
            if there.will_download and (there.file_size or 0) > shutil.disk_usage(place).free:
                raise disk_error(errno.ENOSPC, cache, "HF_HOME", there.file_size)
            return Path(hf_hub_download(repo, name, revision=source.revision, local_files_only=local))
    except (DiskError, EntryNotFoundError, Interrupted):
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} on the hub is gated: accept its licence at {constants.ENDPOINT}/{repo}, and {log_in}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"there is no {repo} on the hub, or it is private: check the name, or {log_in}") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} on the hub has no revision {source.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{repo} on the hub answered {status} for {name}"
        if status == 408 or status >= 500:
            raise Interrupted(reason) from error
        hint = f": the token is refused, {log_in}" if status in (401, 403) else ""
        raise DownloadError(reason + hint) from error
    except HFValidationError as error:
        raise DownloadError(f"{repo!r} is no name on the hub, which has the form owner/repo") from error
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        raise Interrupted(f"{name} of {repo} could not be read from the hub ({words(first_line(error))})") from error

"""From a published source to a verified local file, and the cache of converted files.

Everything lies under `home()`, with one name per set of weights ("vit_b16.augreg_in21k_ft_in1k"):

    weights/NAME-HASH.safetensors   the converted file; HASH begins the sha256 of the file it was made from
    records/NAME.json               by source: the whole sha256 and size of what came from it, and the converted file
    downloads/NAME/FILE             what someone without a network brings; only read, never removed
    unfinished/NAME/                a download under way, which the next process resumes, and a conversion's draft
    locks/NAME.lock                 held by the one process that fills the above

A file appears in weights/ and records/ whole or not at all. Finding converted weights needs no lock, and no
right to write. Files from the Hugging Face hub stay in the cache of huggingface_hub, which reads HF_HOME, HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE. All other URLs can come from a mirror: with TOMEVIT_MIRROR=http://mirror, https://host/path
is read as http://mirror/host/path.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import logging
import os
import random
import re
import shutil
import ssl
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from tomevit.config import Card, Source
from tomevit.errors import CheckpointError, DownloadError
from tomevit.output import FULL
from tomevit.output import error_number as errno_of
from tomevit.weights import files

log = logging.getLogger("tomevit")

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # the usual names, the preferred first

ATTEMPTS = 5  # in a row without a new byte
HUB_ATTEMPTS = 3  # around huggingface_hub, which retries most failures itself
BACKOFF = 1.0  # seconds before the second attempt; doubles with each
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
CHUNK = 2**20  # bytes

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

T = TypeVar("T")


class Fetched(NamedTuple):
    """A source's file on this machine."""

    path: Path
    source: Source  # completed: the whole sha256, the file's name, and the hub's commit as revision
    ours: bool  # a download of tomevit's own, which goes when its conversion is done


class _Interrupted(Exception):  # noqa: N818 - no error yet
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, *, wait: float = 0.0, progress: bool = False):
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for
        self.progress = progress  # there are more bytes here than after any attempt before


class _DiskError(DownloadError):
    """No place for a file: another source would not help."""


def home() -> Path:
    """The directory of all that tomevit keeps: TOMEVIT_HOME, else tomevit in XDG_CACHE_HOME, else ~/.cache/tomevit."""
    if ours := os.environ.get("TOMEVIT_HOME"):
        return Path(ours).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "tomevit"


def cached(card: Card, convert: Callable[[Fetched, Path], None]) -> Path:
    """The converted file of a card's weights, fetched and converted on first use.

    One process fetches and converts; others that want the same weights wait for it.

    Args:
        card: with sources, tried in order, first those whose file someone brought to downloads/.
        convert: writes the converted file; called with the fetched file and the path to write to. What it may write
            beside that path is removed.

    Raises:
        DownloadError: no source can be reached, or no place to write.
        CheckpointError: a file has another hash than the published one, or than on its first use here.
    """
    for source in card.sources:
        if source.package and source.format == "tomevit":
            return _shipped(source)
    if (found := _find(card)) is not None:
        return found
    with _telling(home()), _sole(card.full_name) as unfinished:
        if (found := _find(card)) is not None:  # by now, made by the process that this one waited for
            return found
        where, fetched = _first_available(card, unfinished)
        try:
            return _convert(card, where, fetched, convert, unfinished / "converted")
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def fetch(card: Card) -> Iterator[Fetched]:
    """The verified file of a card's weights as published; a download of tomevit's own lasts as long as the context.

    Raises:
        DownloadError, CheckpointError: as `cached`.
    """
    with _sole(card.full_name) as unfinished:
        with _telling(unfinished):
            fetched = _first_available(card, unfinished)[1]
        try:
            yield fetched
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def beside(source: Source, names: Iterable[str]) -> dict[str, Path]:
    """Those of some files that lie in the same repository and revision on the hub; offline, those in its cache.

    Raises:
        DownloadError: the hub has the repository, and fails.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found, unreachable = {}, False
    for name in names:
        try:
            found[name] = Path(_persist(partial(_try_hub, source, name, unreachable), HUB_ATTEMPTS))
        except LocalEntryNotFoundError:
            unreachable = True
        except EntryNotFoundError:
            continue
    return found


def _find(card: Card) -> Path | None:
    record = _read_record(card)
    for source in card.sources:
        entry = record.get(_where(source))
        if entry is not None and _contradiction(source, entry.source) is None:
            path = home() / "weights" / entry.converted
            # Names are durable before contents are: a power failure can leave a short file behind a good name.
            if path.is_file() and path.stat().st_size == entry.converted_size:
                return path
    return None


def _first_available(card: Card, unfinished: Path) -> tuple[str, Fetched]:
    if not card.sources:
        raise DownloadError(f"{card.full_name} is not published anywhere that tomevit knows of")
    sources = sorted(card.sources, key=lambda source: _brought(source, card.full_name) is None)
    if card.licence and re.search(r"\bnc\b", card.licence.lower()):
        log.warning(
            "%s is under %s, not for commercial use (%s)", card.full_name, card.licence, _address(card.sources[0])
        )
    reasons = []
    for source in sources:
        try:
            fetched = _fetch(source, card.full_name, unfinished)
        except _DiskError:
            raise
        except DownloadError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("%s is read from %s: %s", card.full_name, _where(source), "; ".join(reasons))
        _check_unchanged(card, source, fetched)
        return _where(source), fetched
    bring = _bring(sources[0], card.full_name)
    if _offline():
        raise DownloadError(f"{card.full_name} is not in the cache, and HF_HUB_OFFLINE is set: {bring}")
    if len(reasons) == 1:
        raise DownloadError(f"{reasons[0]}; without a network, {bring}")
    raise DownloadError("\n  ".join([f"{card.full_name} could not be fetched; without a network, {bring}", *reasons]))


def _check_unchanged(card: Card, published: Source, fetched: Fetched) -> None:
    """Where no hash is published, the first one met counts."""
    before = _read_record(card).get(_where(published))
    if published.sha256 or published.md5 or before is None or before.source.sha256 == fetched.source.sha256:
        return
    if fetched.ours:
        fetched.path.unlink()
    raise CheckpointError(
        f"{_where(published)} has changed: its sha256 was {before.source.sha256} when it was first used here, and is "
        f"{fetched.source.sha256}; to accept that, delete {_record_path(card)}"
    )


def _convert(card: Card, where: str, fetched: Fetched, convert: Callable[[Fetched, Path], None], drafts: Path) -> Path:
    source = fetched.source
    assert source.sha256 is not None
    shutil.rmtree(drafts, ignore_errors=True)  # of a process that died
    drafts.mkdir()
    draft = drafts / "converted.safetensors"
    size = fetched.path.stat().st_size
    with _telling(drafts, size):
        convert(fetched, draft)
    path = home() / "weights" / f"{_safe(card.full_name)}-{source.sha256[:16]}.safetensors"
    entry = _Entry(source, size, path.name, draft.stat().st_size)
    path.parent.mkdir(exist_ok=True)
    draft.replace(path)
    _write_record(card, _read_record(card) | {where: entry}, drafts)
    return path


# Records: what came from where, and what was made of it.


class _Entry(NamedTuple):
    source: Source
    size: int  # bytes of the source's file
    converted: str  # name in weights/
    converted_size: int  # bytes


def _record_path(card: Card) -> Path:
    return home() / "records" / f"{_safe(card.full_name)}.json"


def _read_record(card: Card) -> dict[str, _Entry]:
    path = _record_path(card)
    known = {field.name for field in fields(Source)}
    try:
        record = {}
        for where, entry in json.loads(path.read_text(encoding="utf-8")).items():
            source = Source(**{name: value for name, value in entry["source"].items() if name in known})
            record[where] = _Entry(source, entry["size"], Path(entry["converted"]).name, entry["converted_size"])
        return record
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: delete it, and the weights are fetched again") from error


def _write_record(card: Card, record: Mapping[str, _Entry], drafts: Path) -> None:
    plain = {where: entry._asdict() | {"source": asdict(entry.source)} for where, entry in record.items()}
    draft = drafts / "record.json"
    draft.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    path = _record_path(card)
    path.parent.mkdir(exist_ok=True)
    draft.replace(path)


# Places and names.


def _where(source: Source) -> str:
    if source.url:
        return source.url
    if source.hub:
        return f"hf-hub:{source.hub}{f'@{source.revision}' if source.revision else ''}" + (
            f"/{source.file}" if source.file else ""
        )
    return f"package:{source.package}"


def _names(source: Source) -> tuple[str, ...]:
    """The file names under which a source's file may be published."""
    if source.hub:
        return (source.file,) if source.file else HUB_FILES
    return (unquote(urlsplit(source.url or "").path).rpartition("/")[2] or "checkpoint",)


def _address(source: Source) -> str:
    """The URL that a person would open."""
    if source.hub:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{source.hub}/resolve/{source.revision or 'main'}/{_names(source)[0]}"
    return _where(source)


def _brought_path(folder: str, name: str) -> Path:
    return home() / "downloads" / _safe(folder) / _safe(name.rpartition("/")[2])


def _brought(source: Source, folder: str) -> str | None:
    """Which of a source's names someone brought a file of."""
    return next((name for name in _names(source) if _brought_path(folder, name).is_file()), None)


def _bring(source: Source, folder: str) -> str:
    return f"download {_address(source)} elsewhere and put it at {_brought_path(folder, _names(source)[0])}"


def _shipped(source: Source) -> Path:
    assert source.package
    return Path(str(resources.files("tomevit") / source.package))


def _safe(name: str) -> str:
    """A file name that every platform takes; different names stay different."""
    plain = re.sub(r"[^\w.-]|^[.-]+|[.]+$", "_", name, flags=re.ASCII)[:120]
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", plain, flags=re.IGNORECASE)
    if plain == name and not reserved and name:
        return name
    distinct = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"_{Path(plain).stem[:90]}-{distinct}{Path(plain).suffix[:20]}"


# Locks, disks, hashes.


@contextmanager
def _sole(name: str) -> Iterator[Path]:
    """Hold the lock of one name, and with it a directory for unfinished files."""
    unfinished = home() / "unfinished" / _safe(name)
    path = home() / "locks" / f"{_safe(name)}.lock"
    with _telling(home()):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=2)
        except Timeout:
            log.warning("waiting for another process, which is fetching %s (it holds %s)", name, path)
            lock.acquire()
    try:
        with _telling(home()):
            unfinished.mkdir(parents=True, exist_ok=True)
        yield unfinished
    finally:
        if not any(unfinished.glob("*.part")):  # nothing to resume
            shutil.rmtree(unfinished, ignore_errors=True)
        lock.release()


@contextmanager
def _telling(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Tell a user of a disk that is full or not writable in one sentence."""
    try:
        yield
    except DownloadError:
        raise
    except (OSError, SafetensorError) as error:
        number = errno_of(error)
        if number in FULL:
            raise _no_space(directory, needed) from error
        if number in DENIED:
            raise _not_writable(getattr(error, "filename", None) or directory, number) from error
        raise


def _not_writable(place: Path | str, number: int, variable: str = "TOMEVIT_HOME") -> _DiskError:
    return _DiskError(
        f"cannot write to {place} ({os.strerror(number)}): set {variable} to a directory that you can write to"
    )


def _no_space(directory: Path, needed: int | None, variable: str = "TOMEVIT_HOME") -> _DiskError:
    there = next(place for place in (directory, *directory.parents) if place.exists())
    needs = "the file does not fit" if needed is None else f"{needed / 1e6:.1f} MB do not fit"
    return _DiskError(
        f"{needs} into {directory}, where {shutil.disk_usage(there).free / 1e6:.1f} MB are left: "
        f"free some space, or set {variable} to a directory on a larger disk"
    )


def _is_page(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def _hashed(source: Source, path: Path) -> Source:
    """The source with the whole hashes of a file."""
    return replace(source, sha256=files.sha256(path), md5=files.md5(path) if source.md5 else None)


def _check(published: Source, found: Source, path: Path) -> None:
    with path.open("rb") as file:
        if _is_page(file.read(64)):
            raise CheckpointError(f"{path} is a web page, not weights")
    if differ := _contradiction(published, found):
        raise CheckpointError(f"{path}, from {_where(published)}, has {differ}")


def _contradiction(published: Source, found: Source) -> str | None:
    for kind in ("sha256", "md5"):
        prefix, whole = getattr(published, kind), getattr(found, kind)
        if prefix and not (whole or "").startswith(prefix.lower()):
            return f"{kind} {whole}, published is {prefix}"
    return None


# Fetching.


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _fetch(source: Source, folder: str, unfinished: Path) -> Fetched:
    ours = False
    if source.package:
        path = _shipped(source)
        found = _hashed(source, path)
    elif name := _brought(source, folder):
        path = _brought_path(folder, name)
        found = _hashed(replace(source, file=name), path)
    elif source.hub:
        path, found = _from_hub(source)
    else:
        assert source.url, f"{source} is neither a URL nor on the hub nor in the package"
        ours, name = True, _names(source)[0]
        path = unfinished / _safe(name)
        _download(source.url, path)
        found = _hashed(replace(source, file=name), path)
    try:
        _check(source, found, path)
    except CheckpointError:
        if ours:
            path.unlink()
        raise
    return Fetched(path, found, ours)


def _persist(attempt: Callable[[], T], attempts: int) -> T:
    """Call until it succeeds, with pauses that grow, and give up after some attempts without progress."""
    failures = 0
    while True:
        try:
            return attempt()
        except _Interrupted as error:
            failures = 1 if error.progress else failures + 1
            if failures >= attempts:
                raise DownloadError(f"{error}; gave up after {failures} attempts") from error
            pause = BACKOFF * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            pause = min(max(error.wait, pause), LONGEST_WAIT)
            log.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)


def _from_hub(source: Source) -> tuple[Path, Source]:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert source.hub
    unreachable: Exception | None = None
    for name in _names(source):
        try:
            path = Path(_persist(partial(_try_hub, source, name, bool(unreachable)), HUB_ATTEMPTS))
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            continue
        except EntryNotFoundError:
            continue
        # …/snapshots/COMMIT/FILE is a link to …/blobs/ETAG, and the ETag of a large file is its sha256.
        etag = path.readlink().name if path.is_symlink() else ""
        found = _hashed(replace(source, file=name, revision=path.parents[name.count("/")].name), path)
        if re.fullmatch(r"[0-9a-f]{64}", etag) and found.sha256 != etag:
            path.resolve().unlink()  # or huggingface_hub would hand it out for ever
            path.unlink()
            raise CheckpointError(
                f"{name} of {source.hub} came damaged: it has sha256 {found.sha256}, the hub says {etag}; try again"
            )
        return path, found
    if unreachable is None:
        raise DownloadError(
            f"{source.hub}{f' at {source.revision}' if source.revision else ''} on the hub has no "
            f"{' and no '.join(_names(source))}"
        )
    if _offline():
        raise DownloadError(f"{source.hub} is not in Hugging Face's cache, and HF_HUB_OFFLINE is set") from unreachable
    cause = str(unreachable.__cause__ or unreachable).strip().splitlines()
    raise DownloadError(f"{source.hub} cannot be reached ({cause[0] if cause else 'no answer'})") from unreachable


def _try_hub(source: Source, name: str, local: bool) -> str:
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
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        with warnings.catch_warnings():  # it warns, and then fills the disk
            warnings.filterwarnings("error", "Not enough free disk space", UserWarning)
            return hf_hub_download(repo, name, revision=source.revision, local_files_only=local)
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} on the hub is gated: accept its conditions at {constants.ENDPOINT}/{repo}, and {log_in}"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"there is no {repo} on the hub, or it is private: check the name, or {log_in}") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} on the hub has no revision {source.revision}") from error
    except EntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{repo} on the hub answered {status} for {name}"
        if status == 408 or status >= 500:
            raise _Interrupted(reason) from error
        hint = f": the token is refused, {log_in}" if status in (401, 403) else ""
        raise DownloadError(reason + hint) from error
    except HFValidationError as error:
        raise DownloadError(f"{repo!r} is no name on the hub, which has the form owner/repo") from error
    except UserWarning as warning:
        match = re.search(r"size is: ([\d.]+) MB", str(warning))
        needed = int(float(match[1]) * 1e6) if match else None
        raise _no_space(cache, needed, "HF_HOME") from warning
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        if isinstance(error, OSError) and error.errno in FULL:
            raise _no_space(cache, None, "HF_HOME") from error
        if isinstance(error, OSError) and error.errno in DENIED:
            raise _not_writable(error.filename or cache, error.errno, "HF_HOME") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Interrupted(f"{name} of {repo} could not be read from the hub ({reason})") from error


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            fp.close()
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is less safe than where it began")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _mirrored(url: str) -> str:
    mirror = os.environ.get("TOMEVIT_MIRROR")
    url = f"{mirror.rstrip('/')}/{url.partition('://')[2]}" if mirror else url
    return quote(url, safe="%/:=&?~+!$,;'@()*[]")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    from huggingface_hub import constants

    address = _mirrored(url)
    if urlsplit(address).scheme not in ("http", "https"):
        raise DownloadError(f"{address} is neither http:// nor https://")
    headers = {"User-Agent": "tomevit", "Accept-Encoding": "identity"} | headers
    try:
        response: http.client.HTTPResponse = build_opener(_Redirects).open(
            Request(address, headers=headers), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        return response
    except HTTPError as error:
        error.close()
        reason = f"{address} answered {error.code} {error.reason}"
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _Interrupted(reason, wait=_retry_after(error.headers.get("Retry-After", ""))) from error
        raise DownloadError(reason) from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError | http.client.InvalidURL):
            raise DownloadError(f"{address}: {cause}") from error
        raise _Interrupted(f"{address} cannot be reached ({cause})") from error


def _retry_after(value: str) -> float:
    """Seconds that a server asks for, as a number or as a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _download(url: str, path: Path) -> None:
    """Bring a URL to a path, in as many attempts as it takes, also of several processes one after another."""
    note = path.with_name(f"{path.name}.json")  # what the bytes in .part are of
    if path.is_file() and _read_note(note).get("url") == url:
        return
    if _offline():
        raise DownloadError(f"{url} is not here, and HF_HUB_OFFLINE is set")
    part = path.with_name(f"{path.name}.part")
    most = 0

    def attempt() -> None:
        nonlocal most
        try:
            _continue(url, part, note)
        except _Interrupted as error:
            size = part.stat().st_size if part.exists() else 0
            error.progress, most = size > most, max(most, size)
            raise

    _persist(attempt, ATTEMPTS)
    part.replace(path)


def _continue(url: str, part: Path, note: Path) -> None:
    """One request, for what is missing from part if the server still has the same file, else for all of it."""
    begun = _read_note(note)
    have = part.stat().st_size if begun.get("url") == url and begun.get("validator") and part.exists() else 0
    if have and have == begun.get("size"):
        return
    ranges = {"Range": f"bytes={have}-", "If-Range": begun["validator"]} if have else {}
    try:
        response = _open(url, ranges)
    except _Interrupted as error:
        if have and isinstance(error.__cause__, HTTPError) and error.__cause__.code == 416:
            part.unlink()
        raise
    with response:
        validator = _validator(response.headers)
        if have and response.status == 206:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != have or validator not in (None, begun["validator"]):
                part.unlink()
                raise _Interrupted(f"{_mirrored(url)} answered with another part than the one asked for")
        else:
            have = 0
        length = response.headers.get("Content-Length", "")
        size = have + int(length) if length.isdecimal() else None
        if size is not None and shutil.disk_usage(part.parent).free < size - have:
            part.unlink(missing_ok=True)
            raise _no_space(part.parent, size)
        chunk = _read(response, url)
        if response.headers.get_content_type() == "text/html" or (have == 0 and _is_page(chunk)):
            raise DownloadError(f"{_mirrored(url)} answered with a web page, not with a file")
        try:
            if have == 0:
                part.unlink(missing_ok=True)  # first: bytes must never meet another file's note
                note.write_text(json.dumps({"url": url, "validator": validator, "size": size}), encoding="utf-8")
            with (
                part.open("ab") as file,
                tqdm(
                    desc=part.stem,
                    total=size,
                    initial=have,
                    delay=2,
                    unit="B",
                    unit_scale=True,
                    leave=False,
                    disable=None,
                ) as bar,
            ):
                while chunk:
                    file.write(chunk)
                    have += len(chunk)
                    bar.update(len(chunk))
                    chunk = _read(response, url)
        except OSError as error:
            if error.errno in FULL:
                part.unlink(missing_ok=True)
                raise _no_space(part.parent, size) from error
            raise
    if size is not None and have != size:
        raise _Interrupted(f"{_mirrored(url)} ended after {have} of {size} bytes")


def _read(response: http.client.HTTPResponse, url: str) -> bytes:
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"{_mirrored(url)} broke off ({error or type(error).__name__})") from error


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What If-Range takes: a strong ETag, else the date."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or of a process that died writing it
        return {}
    return note if isinstance(note, dict) else {}

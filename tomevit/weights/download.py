"""Files from the network, by URL or from the hub: resumed where they broke off, tried again where that may help.

URLs are read by the client that huggingface_hub hands out, with the proxies, certificates and whatever else its
`set_client_factory` was told of, but without credentials: those that the client has are for the hub. All URLs can come
from a mirror: with TOMEVIT_MIRROR=http://mirror, https://host/path is read as http://mirror/host/path.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from safetensors import SafetensorError
from tqdm import tqdm

from tomevit.config import Source
from tomevit.errors import DownloadError, OutputError
from tomevit.output import FULL, error_number

log = logging.getLogger("tomevit")

ATTEMPTS = 5  # in a row without a new byte
HUB_ATTEMPTS = 3  # around huggingface_hub, which retries most failures itself
BACKOFF = 1.0  # seconds before the second attempt; doubles with each
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
REDIRECTS = 10  # at most, of one request

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

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
    sentence = str(OutputError(number, path))
    if number not in FULL:
        return DiskError(f"{sentence}: set {variable} to a directory that you can write to")
    there = next(place for place in (path, *path.parents) if place.exists())
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
        if number not in (*FULL, *REFUSED):
            raise
        raise disk_error(number, Path(getattr(error, "filename", None) or path), variable, needed) from error


def is_web_page(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def retry(attempt: Callable[[], T], attempts: int, size: Callable[[], int] = lambda: 0) -> T:
    """Call until it is no longer Interrupted, with pauses that grow.

    Args:
        attempts: after so many without progress, which is a `size` larger than ever before, it is given up.

    Raises:
        DownloadError: given up.
    """
    failures, most = 0, 0
    while True:
        try:
            return attempt()
        except Interrupted as error:
            failures = 1 if size() > most else failures + 1
            most = max(most, size())
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
    if path.is_file() and _read_note(note).get("url") == url:
        return
    if is_offline():
        raise DownloadError(f"{url} is not here, and HF_HUB_OFFLINE is set")
    address = _address(url)
    try:
        with explain_disk_errors(part):
            retry(lambda: _continue(url, address, part, note), ATTEMPTS, lambda: _size(part))
            if is_web_page(part):
                part.unlink()
                raise DownloadError(f"{address} answered with a web page, not with a file")
            part.replace(path)
    except DiskError:
        part.unlink(missing_ok=True)
        raise


def _continue(url: str, address: str, part: Path, note: Path) -> None:
    """One request, for what is missing from a part if the server still has the same file, else for all of it."""
    begun, have = _read_note(note), _size(part)
    if begun.get("url") != url or not begun.get("validator"):
        have = 0
    if have and have == begun.get("size"):
        return
    with _get(address, {"Range": f"bytes={have}-", "If-Range": begun["validator"]} if have else {}) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)  # it is longer than the server's file
        _check_answer(response, address)
        validator = _validator(response.headers)
        if have and response.status_code == 206:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != have or validator not in (None, begun["validator"]):
                part.unlink()
                raise Interrupted(f"{address} answered with another part than the one asked for")
        else:
            have = 0
        length = response.headers.get("Content-Length", "")
        size = have + int(length) if length.isdecimal() else None
        if size is not None and shutil.disk_usage(part.parent).free < size - have:
            raise disk_error(errno.ENOSPC, part, needed=size)
        with explain_disk_errors(part, needed=size):
            if have == 0:
                part.unlink(missing_ok=True)  # first: bytes must never meet another file's note
                note.write_text(json.dumps({"url": url, "validator": validator, "size": size}), encoding="utf-8")
            _append(response, address, part, size)


def _append(response: Any, address: str, part: Path, size: int | None) -> None:
    """Write the body of an answer behind a part, which shall then have a size."""
    bar = tqdm(
        desc=part.stem, total=size, initial=_size(part), unit="B", unit_scale=True, delay=2, leave=False, disable=None
    )
    try:
        with bar, part.open("ab") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.update(len(chunk))
    except _http_library().HTTPError as error:
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes ({error})") from error
    if size is not None and _size(part) != size:
        raise Interrupted(f"{address} ended after {_size(part)} of {size} bytes")


@contextmanager
def _get(address: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer of a server, of whatever status, whose body can be read while the context lasts."""
    from huggingface_hub import constants, get_session

    http = _http_library()
    headers = {"User-Agent": "tomevit", "Accept-Encoding": "identity", **headers}
    try:
        client = get_session()
        request = client.build_request("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.headers.pop("Authorization", None)  # which a client of the user's own may have for the hub
        for _ in range(REDIRECTS):
            response = client.send(request, auth=None, stream=True, follow_redirects=False)
            if response.next_request is None:
                break
            response.close()
            if response.next_request.url.scheme not in ("https", request.url.scheme):
                place = response.headers["Location"]
                raise DownloadError(f"{request.url} redirects to {place}, which is less safe than where it began")
            request = response.next_request
        else:
            raise DownloadError(f"{address} redirects more than {REDIRECTS} times")
    except DownloadError:
        raise
    except (http.InvalidURL, ImportError, ValueError) as error:  # of the address, or a proxy that it cannot speak to
        raise DownloadError(f"{address}: {error}") from error
    except (http.HTTPError, OSError) as error:
        if _is_about_certificates(error):
            raise DownloadError(f"{address}: {error}") from error
        raise Interrupted(f"{address} cannot be reached ({error})") from error
    with closing(response):
        yield response


def _http_library() -> Any:
    """httpx, or what else huggingface_hub is built on: since its version 2, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def _check_answer(response: Any, address: str) -> None:
    status = response.status_code
    if not response.is_success:
        reason = f"{address} answered {status} {response.reason_phrase}"
        if status in (408, 416, 425, 429) or status >= 500:
            raise Interrupted(reason, wait=_seconds_to_wait(response.headers.get("Retry-After", "")))
        raise DownloadError(reason)
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise DownloadError(f"{address} answered with a web page, not with a file")


def _seconds_to_wait(value: str) -> float:
    """What a server asks for, as a number or as a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


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
    return etag if etag.startswith('"') else headers.get("Last-Modified")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def is_resumable(note: Path) -> bool:
    """Whether beside a note of `download` there is something of the file, or all of it."""
    whole = note.with_suffix("")
    return whole.exists() or whole.with_name(f"{whole.name}.part").exists()


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # none, or of a process that died writing it
        return {}
    return note if isinstance(note, dict) else {}


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
        cause = (str(unreachable.__cause__ or unreachable).strip() or "no answer").splitlines()[0]
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
        with warnings.catch_warnings(), explain_disk_errors(cache, "HF_HOME"):
            warnings.filterwarnings("error", "Not enough free disk space", UserWarning)  # it would fill the disk
            return Path(hf_hub_download(repo, name, revision=source.revision, local_files_only=local))
    except (DiskError, EntryNotFoundError):
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} on the hub is gated: accept its conditions at {constants.ENDPOINT}/{repo}, and {log_in}"
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
    except UserWarning as warning:
        match = re.search(r"size is: ([\d.]+) MB", str(warning))
        needed = int(float(match[1]) * 1e6) if match else None
        raise disk_error(errno.ENOSPC, cache, "HF_HOME", needed) from warning
    except Exception as error:  # of httpx, httpx2 or hf_xet, which have no base class in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Interrupted(f"{name} of {repo} could not be read from the hub ({reason})") from error

"""How servers are asked, and how much of what they say is read: by the client that huggingface_hub hands out, with the
proxies, certificates and whatever else its `set_client_factory` was told of.

No server is waited for without end. HF_HUB_DOWNLOAD_TIMEOUT bounds its silence, in seconds (10), and over three times
as long it must send `LEAST_RATE` bytes a second, which a telephone line does; else that attempt has failed. Of
redirects and errors no more is read than is shown. Where no server is reached at all, the second attempt is the last.
"""

from __future__ import annotations

import errno
import importlib
import logging
import math
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from ssl import SSLCertVerificationError
from threading import Timer
from typing import Any, TypeVar

from tomevit.errors import DownloadError, printable
from tomevit.weights.other_files import shorten

log = logging.getLogger("tomevit")

BACKOFF = 1.0  # seconds before the second attempt; doubles with each
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
UNREACHED_ATTEMPTS = 2  # in a row, where no server was reached before
NO_WAY = (errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH)
REDIRECTS = 10  # at most, of one request
LEAST_RATE = 1000  # bytes a second
MOST_SAID = 2**16  # bytes of an error that are read
T = TypeVar("T")


class Interrupted(Exception):  # noqa: N818 - no error yet
    """An attempt failed in a way that another may not."""

    def __init__(self, reason: str, *, wait: float = 0.0, unreached: bool = False):
        super().__init__(reason)
        self.wait = wait  # seconds that the server asks for
        self.unreached = unreached  # there is no way to the server, which a minute will hardly change


class UnreachedError(Exception):
    """No server is reached at all: raised in huggingface_hub's client, which would try for half a minute."""


def words(text: object) -> str:
    """What others say, in one printable line of bounded length, in which no token stands."""
    from huggingface_hub import get_token

    said = str(text)
    if token := get_token():
        said = said.replace(token, "…")
    return shorten(printable(shorten(re.sub(r"(?i)(bearer )[^'\"]+", r"\1…", said), 1000)), 300)


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def retry(attempt: Callable[[], T], attempts: int, size: Callable[[], int] = lambda: 0) -> T:
    """Call until it is no longer Interrupted, with pauses that grow.

    Args:
        attempts: after so many without progress, which is a `size` larger by `least_bytes`, it is given up; after
            `UNREACHED_ATTEMPTS` where no server was reached in any.

    Raises:
        DownloadError: given up.
    """
    failures, most, reached = 0, 0, False
    while True:
        try:
            return attempt()
        except Interrupted as error:
            advanced = size() >= most + least_bytes()
            failures = 1 if advanced else failures + 1
            most = size() if advanced else most
            reached = reached or advanced or not error.unreached
            if failures >= (attempts if reached else min(attempts, UNREACHED_ATTEMPTS)):
                hint = "" if reached else ": is there a network?"
                raise DownloadError(f"{error}; gave up after {failures} attempts{hint}") from error
            pause = BACKOFF * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
            pause = min(max(error.wait, pause), LONGEST_WAIT)
            log.warning("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)


def _seconds_watched() -> float:
    from huggingface_hub import constants

    return 3.0 * constants.HF_HUB_DOWNLOAD_TIMEOUT


def least_bytes() -> float:
    """That must come in `_seconds_watched`."""
    return max(1.0, LEAST_RATE * _seconds_watched())


def watch(chunks: Iterator[bytes], address: str, most: float = math.inf) -> Iterator[bytes]:
    """The chunks of a body as they come.

    Args:
        most: bytes, of which the last chunk may exceed; what comes after is left.

    Raises:
        Interrupted: they come too slowly.
    """
    seconds, least = _seconds_watched(), least_bytes()
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


@contextmanager
def get(address: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The answer of a server, of whatever status, whose body can be read while the context lasts."""
    from huggingface_hub import constants, get_session

    http = http_library()
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
        raise Interrupted(f"{address} cannot be reached ({reason})", unreached=_is_unreached(error)) from error
    with closing(response):
        yield response


def http_library() -> Any:
    """httpx, or what else huggingface_hub is built on: since its version 2, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


class _HeadWatch:
    """Ends a new connection whose server dribbles the head of its answer: the timeout is of each silence alone.

    It is what httpx calls the trace of a request.
    """

    def __init__(self, asked: _Asked | None = None) -> None:
        self.asked = asked
        self.stream: Any = None
        self.timer: Timer | None = None
        self.ended = False

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.stream = info["return_value"]
            if self.asked is not None:
                self.asked.reached = True
        elif event.endswith("connect_tcp.failed"):
            if self.asked is not None and _is_unreached(info["exception"]):
                self.asked.failures += 1
                if not self.asked.reached and self.asked.failures >= UNREACHED_ATTEMPTS:
                    raise UnreachedError(words(info["exception"])) from info["exception"]
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


@dataclass
class _Asked:
    """What is asked by us, in this thread."""

    most: float  # bytes that an answer may have
    reached: bool = False  # a server was
    failures: int = 0  # of attempts to reach one


#: None: it is not by us that anything is asked.
_asked_by_us: ContextVar[_Asked | None] = ContextVar("_asked_by_us", default=None)


@contextmanager
def bounded_answers(most: float = math.inf) -> Iterator[None]:
    """While huggingface_hub asks for us: redirects and errors are read up to `MOST_SAID`, and all else is watched.

    Where it reaches no server it would try for half a minute: the last of `UNREACHED_ATTEMPTS` ends that.

    Its client would read a redirect of any size into memory. It is the process's, and gets hooks that do nothing for
    others' requests.

    Args:
        most: bytes of an answer that are read.

    Raises:
        UnreachedError: from within its calls.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _bound_answer not in hooks["response"]:
        hooks["response"].append(_bound_answer)
        hooks["request"].append(_bound_head)
    token = _asked_by_us.set(_Asked(most))
    try:
        yield
    finally:
        _asked_by_us.reset(token)


def _bound_head(request: Any) -> None:
    # What is sent may take its time to be answered.
    if (asked := _asked_by_us.get()) is None or request.method not in ("GET", "HEAD"):
        return
    request.extensions.setdefault("trace", _HeadWatch(asked))


def _bound_answer(response: Any) -> None:
    if (asked := _asked_by_us.get()) is not None:
        response.stream = _watched_stream()(response, asked.most if response.is_success else MOST_SAID)


@cache
def _watched_stream() -> Any:
    class WatchedStream(http_library().SyncByteStream):  # type: ignore[misc]
        def __init__(self, response: Any, most: float) -> None:
            self.address, self.stream, self.most = str(response.request.url), response.stream, most

        def __iter__(self) -> Iterator[bytes]:
            return watch(self.stream, self.address, self.most)

        def close(self) -> None:
            self.stream.close()

    return WatchedStream


def check_answer(response: Any, address: str, *, partial: bool) -> None:
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
    if (seconds := number(value)) is not None:
        return float(seconds)
    try:
        return max(0.0, parsedate_to_datetime(value[:100]).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def number(text: str) -> int | None:
    """A header's, unless it is none, or larger than anything is."""
    return int(text) if re.fullmatch(r"\s*\d{1,20}\s*", text, re.ASCII) else None


def _is_unreached(error: BaseException | None) -> bool:
    """Whether no connection was made, for its name means nothing, nobody listens there, or no way leads there."""
    while error is not None:
        if isinstance(error, socket.gaierror | ConnectionRefusedError) or getattr(error, "errno", None) in NO_WAY:
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_about_certificates(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None

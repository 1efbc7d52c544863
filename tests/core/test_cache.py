"""Weights from the network: a real server, real processes, and everything that goes wrong between them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from tests.elsewhere import Elsewhere
from tests.fetching import (
    CUT,
    DATA,
    OTHER,
    at,
    card,
    convert,
    converted_from,
    kept,
    obtain,
    on_hub,
    sha256,
    until,
)
from tests.outcomes import survives
from tests.server import Fault, Server
from tomevit.cards import Card, Header, encode_header
from tomevit.config import Source
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, DownloadError, UnreadableError
from tomevit.weights import cache, servers
from tomevit.weights.cache import Fetched, cached, fetch, home

FULL = survives(
    "cache and network", "a disk that is full, or fills up on the way", "what was there stays; one sentence"
)
READ_ONLY_CACHE = survives("cache and network", "a cache that cannot be written to", "is read; else one sentence")
KILLED = survives("cache and network", "a kill or Ctrl-C in mid-download or mid-conversion", "the next process goes on")
PASSES = survives("cache and network", "an answer that fails, hangs or is cut", "tried again, from where it broke off")
AT_ONCE = survives("cache and network", "several processes that want the same weights at once", "share one download")

pytestmark = pytest.mark.usefixtures("set_environment", "naps")


def http_library() -> Any:
    """httpx or httpx2, whichever huggingface_hub uses."""
    return servers.http_library()


# Plain URLs.


def test_first_use_fetches_and_converts_and_the_second_reads_only_our_file(server: Server) -> None:
    given = card(at(server.put("/a/weights.pth", DATA)))
    seen: list[Fetched] = []

    def look(given: Card, fetched: Fetched, draft: Path) -> None:
        seen.append(fetched)
        assert fetched.path.name == "weights.pth"
        convert(given, fetched, draft)

    path = obtain(given, look)
    assert converted_from(path) == DATA
    assert path == home() / "weights" / f"vit_x1.tag-{sha256(DATA)[:16]}.safetensors"
    assert seen[0].ours
    assert seen[0].source == at(server.url + "/a/weights.pth", sha256=sha256(DATA), file="weights.pth")
    assert kept() == [f"weights/{path.name}"]

    server.requests.clear()
    assert obtain(given, look) == path
    assert not server.requests
    assert len(seen) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final_and_named(server: Server, status: int) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.faults["/w.pth"] = [Fault(status=status)]
    with pytest.raises(DownloadError, match=rf"{server.url}/w.pth answered {status} ") as caught:
        obtain(given)
    assert str(home() / "downloads" / "vit_x1.tag" / "w.pth") in str(caught.value)
    assert len(server.requests) == 1
    assert kept() == []
    assert converted_from(obtain(given)) == DATA


PASSING = {
    "500, 503": [Fault(status=500), Fault(status=503)],
    "408, 429": [Fault(status=408), Fault(status=429)],
    "cut": [Fault(cut=CUT)],
    "cut at once": [Fault(cut=0)],
    "cut again and again": [Fault(cut=40_000)] * 6,
    "hang": [Fault(hang=2)],
    "hang in mid-body": [Fault(cut=CUT, hang=2)],
    "trickle": [Fault(trickle=100_000)],
}


@PASSES
@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_what_passes_is_waited_for(server: Server, faults: list[Fault | None]) -> None:
    given = card(at(server.put("/w.pth", DATA), sha256=sha256(DATA)[:8]))
    server.faults["/w.pth"] = list(faults)
    assert converted_from(obtain(given)) == DATA
    assert server.faults["/w.pth"] == []
    assert len(kept()) == 1


@PASSES
def test_a_cut_download_is_resumed(server: Server) -> None:
    server.faults["/w.pth"] = [Fault(cut=CUT), Fault(cut=CUT)]
    obtain(card(at(server.put("/w.pth", DATA))))
    assert [request.range for request in server.requests] == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]


@pytest.mark.parametrize("switch", ["ranges", "etags"])
def test_without_ranges_or_without_etags_a_cut_download_begins_again(server: Server, switch: str) -> None:
    setattr(server, switch, False)
    server.faults["/w.pth"] = [Fault(cut=CUT)]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA


def test_without_etags_the_date_tells_whether_the_file_is_the_same(server: Server) -> None:
    server.etags = False
    date = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    server.faults["/w.pth"] = [Fault(cut=CUT, headers=date)]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA
    assert server.requests[-1].range == f"bytes={CUT}-"


def test_a_file_that_changes_between_two_parts_is_never_mixed(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.faults["/w.pth"] = [Fault(cut=CUT)] + [Fault(status=500)] * 4
    with pytest.raises(DownloadError, match="500"):
        obtain(given)
    assert any(name.endswith(".part") for name in kept("unfinished"))
    server.put("/w.pth", OTHER)
    assert converted_from(obtain(given)) == OTHER


@pytest.mark.parametrize(
    "headers", [{"Content-Range": "bytes 99999-299999/300000"}, {"ETag": '"of another file"'}, {"Content-Range": "?"}]
)
def test_a_part_that_was_not_asked_for_is_not_taken(server: Server, headers: dict[str, str]) -> None:
    server.faults["/w.pth"] = [Fault(cut=CUT), Fault(headers=headers)]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA
    assert [request.range for request in server.requests] == [None, f"bytes={CUT}-", None]


def test_a_range_that_cannot_be_satisfied_begins_again(server: Server) -> None:
    server.faults["/w.pth"] = [Fault(cut=CUT), Fault(status=416)]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA
    assert [request.range for request in server.requests] == [None, f"bytes={CUT}-", None]


def test_a_whole_part_needs_no_request(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.forever["/w.pth"] = Fault(cut=CUT)
    server.ranges = False
    with pytest.raises(DownloadError):
        obtain(given)
    (part,) = home().rglob("*.part")
    part.write_bytes(DATA)  # as if killed before the last rename
    server.requests.clear()
    assert converted_from(obtain(given)) == DATA
    assert not server.requests


HOPELESS = {
    "500": (Fault(status=500), "answered 500"),
    "429": (Fault(status=429, headers={"Retry-After": "7"}), "answered 429"),
    "cut": (Fault(cut=0), "ended after 0 of 300000 bytes"),
    "hang": (Fault(hang=2), "timed out"),
}


@PASSES
@pytest.mark.parametrize(("fault", "reason"), HOPELESS.values(), ids=HOPELESS)
def test_what_does_not_pass_is_given_up(
    server: Server, naps: list[float], fault: Fault, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.hang:  # the variable takes whole seconds only
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    given = card(at(server.put("/w.pth", DATA)))
    server.forever["/w.pth"] = fault
    with pytest.raises(DownloadError, match=f"{reason}.*gave up after 5 attempts"):
        obtain(given)
    assert len(server.requests) == 5
    pauses = [nap for nap in naps if nap > 0.2]
    assert len(pauses) == 4
    if fault.headers:
        assert min(pauses) >= 7
    else:
        assert all(later > earlier for earlier, later in pairwise(pauses))
    del server.forever["/w.pth"]
    assert converted_from(obtain(given)) == DATA


def test_a_server_without_ranges_that_always_cuts_is_given_up(server: Server) -> None:
    server.ranges = False
    server.forever["/w.pth"] = Fault(cut=CUT)
    with pytest.raises(DownloadError, match="ended after 100000 of 300000 bytes"):
        obtain(card(at(server.put("/w.pth", DATA))))
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("value", "least", "most"), [("3", 3, 3), ("a date", 20, 41), ("86400", 60, 60), ("soon", 0, 2)]
)
def test_a_server_may_ask_for_a_pause(server: Server, naps: list[float], value: str, least: float, most: float) -> None:
    if value == "a date":
        value = formatdate(time.time() + 40)
    server.faults["/w.pth"] = [Fault(status=429, headers={"Retry-After": value})]
    obtain(card(at(server.put("/w.pth", DATA))))
    assert least <= max(naps) <= most


#: Of a server that is not reached: nobody listens there, and no name of these means anything (RFC 2606).
UNREACHED = ["http://127.0.0.1:{closed}", "http://tomevit.invalid"]


@pytest.fixture(params=UNREACHED)
def unreached(request: pytest.FixtureRequest) -> str:
    with Server() as closed:
        port = closed.url.rpartition(":")[2]
    address: str = request.param
    return address.format(closed=port)


def test_without_a_network_it_is_given_up_in_seconds(unreached: str, naps: list[float]) -> None:
    with pytest.raises(DownloadError, match=r"/w\.pth cannot be reached .*after 2 attempts: is there a network"):
        obtain(card(at(f"{unreached}/w.pth")))
    assert sum(naps) < 3


def test_so_is_the_hub(unreached: str, naps: list[float], set_environment: Callable[..., None]) -> None:
    set_environment(HF_ENDPOINT=unreached)
    with pytest.raises(DownloadError, match=r"owner/repo cannot be reached \(.*\): is there a network"):
        obtain(card(on_hub()))
    assert sum(naps) < 3


def test_a_network_that_fails_on_the_way_is_waited_for(
    server: Server, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/w.pth", DATA)
    server.faults["/w.pth"] = [Fault(cut=CUT)]
    connect, calls = socket.create_connection, []

    def failing(*args: Any, **how: Any) -> Any:
        calls.append(args)
        if 2 <= len(calls) <= 4:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return connect(*args, **how)

    monkeypatch.setattr(socket, "create_connection", failing)
    assert converted_from(obtain(card(at(url)))) == DATA
    assert len(calls) == 5


@pytest.mark.parametrize(
    "fault",
    [
        Fault(headers={"Content-Type": "text/html; charset=utf-8"}),
        Fault(body=b"\n<!DOCTYPE html>\n<html>log in first</html>"),
        Fault(body=b"<html>" + b" " * 10_000),
    ],
)
def test_a_web_page_is_not_weights(server: Server, fault: Fault) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.faults["/w.pth"] = [fault]
    with pytest.raises(DownloadError, match=rf"{server.url}/w.pth answered with a web page"):
        obtain(given)
    assert kept() == []
    assert converted_from(obtain(given)) == DATA


@pytest.mark.parametrize(
    "published", [{"sha256": sha256(DATA)[:8]}, {"sha256": sha256(DATA)}, {"md5": hashlib.md5(DATA).hexdigest()[:6]}]
)
def test_a_wrong_hash_is_refused_and_the_file_removed(server: Server, published: dict[str, str]) -> None:
    elsewhere = at(server.put("/second.pth", DATA))
    given = card(at(server.put("/w.pth", DATA), **published), elsewhere)
    server.faults["/w.pth"] = [Fault(body=OTHER)]
    kind = next(iter(published))
    found = hashlib.new(kind, OTHER).hexdigest()
    with pytest.raises(CheckpointError, match=f"has {kind} {found}, published is {published[kind]}"):
        obtain(given)
    assert kept() == []
    for _ in range(2):
        assert converted_from(obtain(given)) == DATA
    assert server.paths() == ["/w.pth", "/w.pth"]  # and no other source, which would hide it


def test_a_published_hash_may_have_capitals(server: Server) -> None:
    obtain(card(at(server.put("/w.pth", DATA), sha256=sha256(DATA)[:8].upper())))


def test_a_file_that_changes_after_its_first_use_is_reported(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    path = obtain(given)
    server.put("/w.pth", OTHER)
    with pytest.raises(CheckpointError, match="has changed") as caught:
        fetch(given).__enter__()
    assert sha256(DATA) in str(caught.value)
    assert sha256(OTHER) in str(caught.value)
    assert f"delete {path}" in str(caught.value)
    assert kept() == [f"weights/{path.name}"]
    path.unlink()
    assert converted_from(obtain(given)) == OTHER


def test_other_published_weights_are_fetched_anew(server: Server) -> None:
    url = server.put("/w.pth", DATA)
    old = obtain(card(at(url, sha256=sha256(DATA))))
    server.put("/w.pth", OTHER)
    new = obtain(card(at(url, sha256=sha256(OTHER))))
    assert converted_from(old) == DATA
    assert converted_from(new) == OTHER


def test_a_cached_file_that_lost_its_end_is_made_again(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    path = obtain(given)
    os.truncate(path, 1000)
    assert converted_from(obtain(given)) == DATA


def test_a_cached_file_of_another_source_is_not_taken(server: Server) -> None:
    first = obtain(card(at(server.put("/first.pth", DATA))))
    given = card(at(server.put("/second.pth", OTHER)))
    second = obtain(given)
    assert (converted_from(first), converted_from(second)) == (DATA, OTHER)
    with fetch(given) as fetched:  # whose hash is compared with the second's, not the first's
        assert fetched.path.read_bytes() == OTHER
    assert obtain(card(at(f"{server.url}/none.pth"), at(f"{server.url}/first.pth"))) == first


def test_a_file_at_an_unknown_address_is_found_whatever_its_header_tells(server: Server) -> None:
    given = Card(name="url-1234", sources=(at(server.put("/w.pth", DATA)),))
    for origin in (None, Source(format="timm", hub="owner/repo", sha256=sha256(OTHER))):

        def convert_known(given: Card, fetched: Fetched, draft: Path, origin: Source | None = origin) -> None:
            known = Card(name="vit_x1", weights="tag", origin=origin)
            save_file({"x": np.zeros(1)}, draft, metadata=encode_header(Header(known, "of the tensors")))

        path = obtain(given, convert_known)
        server.requests.clear()
        assert obtain(given) == path
        assert not server.requests
        path.unlink()


DAMAGED = {
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"not a safetensors file",
    "of others": save({"x": np.zeros(1)}),
    "of a newer version": save({"x": np.zeros(1)}, {"tomevit": '{"version": 1000}'}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_cached_file_that_cannot_be_read_is_made_again(server: Server, content: bytes) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    path = obtain(given)
    path.write_bytes(content)
    assert obtain(given) == path
    assert converted_from(path) == DATA


def test_a_file_that_is_no_checkpoint_leaves_nothing(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))

    def fail(given: Card, fetched: Fetched, draft: Path) -> None:
        draft.write_bytes(b"half")
        draft.with_name(".draft.123").write_bytes(b"half")
        raise UnreadableError("no weights")

    with pytest.raises(CheckpointError, match="no weights"):
        obtain(given, fail)
    assert kept() == []
    assert converted_from(obtain(given)) == DATA


QUESTIONS = {
    "a question": AmbiguousCheckpointError("it fits two models", "model", ["a", "b"]),
    "a wrong answer": CheckpointError("it has nothing at 'modle'"),
    "Ctrl-C": KeyboardInterrupt(),
    "no memory": MemoryError(),
    "a bug": RuntimeError(),
}


@pytest.mark.parametrize("error", QUESTIONS.values(), ids=QUESTIONS)
def test_a_download_stays_until_its_conversion_is_done(server: Server, error: BaseException) -> None:
    given = Card(name="url-1234", sources=(at(server.put("/w.pth", DATA)),))
    leftover = ["unfinished/url-1234/w.pth", "unfinished/url-1234/w.pth.json"]

    def fail(given: Card, fetched: Fetched, draft: Path) -> None:
        draft.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        cached(given, partial(fail, given), variant="first")
    assert kept() == leftover
    with pytest.raises(type(error)), fetch(given):
        raise error
    assert kept() == leftover
    path = cached(given, partial(convert, given), variant="second")
    assert converted_from(path) == DATA
    assert kept() == [f"weights/url-1234-second-{sha256(DATA)[:16]}.safetensors"]
    assert server.paths() == ["/w.pth"]


def test_a_download_that_stayed_is_checked_again(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA), sha256=sha256(DATA)))
    with pytest.raises(KeyboardInterrupt), fetch(given):
        raise KeyboardInterrupt
    (home() / "unfinished" / "vit_x1.tag" / "w.pth").write_bytes(OTHER)
    with pytest.raises(CheckpointError, match="has sha256"):
        obtain(given)
    assert kept() == []
    assert converted_from(obtain(given)) == DATA


def test_redirects_are_followed_but_not_to_less_safe_places(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.put("/moved.pth", DATA)
    for location in ("ftp://127.0.0.1/w.pth", "file:///etc/passwd"):
        server.faults["/w.pth"] = [Fault(status=302, headers={"Location": location})]
        with pytest.raises(DownloadError, match=location):
            obtain(given)
    server.faults["/w.pth"] = [Fault(status=302, headers={"Location": f"{server.storage}/moved.pth"})]
    assert converted_from(obtain(given)) == DATA
    assert server.paths()[-1] == "/moved.pth"


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/w.pth", "file:///etc/passwd", "w.pth"])
def test_only_http(url: str) -> None:
    with pytest.raises(DownloadError, match="neither http:// nor https://"):
        obtain(card(at(url)))


def test_an_impossible_url_is_not_tried_again(naps: list[float]) -> None:
    with pytest.raises(DownloadError, match="Invalid port: 'port'"):
        obtain(card(at("http://127.0.0.1:port/w.pth")))
    assert not [nap for nap in naps if nap > 0.2]


def test_a_mirror_takes_the_place_of_every_host(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(TOMEVIT_MIRROR=f"{server.url}/mirror/")
    server.put("/mirror/dl.example.org/x/big file.pth", DATA)
    given = card(at("https://dl.example.org/x/big%20file.pth", sha256=sha256(DATA)[:8]))
    assert converted_from(obtain(given)) == DATA
    server.requests.clear()
    set_environment(TOMEVIT_MIRROR="")
    assert converted_from(obtain(given)) == DATA  # found by its publisher's address
    assert not server.requests


def test_a_redirect_without_end_is_given_up(server: Server) -> None:
    url = server.put("/w.pth", DATA)
    server.forever["/w.pth"] = Fault(status=302, headers={"Location": url})
    with pytest.raises(DownloadError, match=f"{url} redirects more than 10 times"):
        obtain(card(at(url)))


# The client that reads URLs.


@pytest.fixture
def use_client() -> Iterator[Callable[..., list[Any]]]:
    """Have huggingface_hub use a client of the user's own; returns a list that counts how many were made."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    def use(**options: Any) -> list[Any]:
        made: list[Any] = []

        def make() -> Any:
            made.append(http_library().Client(**options))
            return made[-1]

        set_client_factory(make)
        return made

    yield use
    set_client_factory(_http.default_client_factory)


def test_a_client_of_the_users_own_is_used_and_its_credentials_are_not(
    server: Server, use_client: Callable[..., list[Any]]
) -> None:
    made = use_client(headers={"Authorization": "Bearer hf_secret"}, follow_redirects=True)
    server.put("/moved.pth", DATA)
    for location in (f"{server.url}/moved.pth", f"{server.storage}/moved.pth"):
        server.forever["/w.pth"] = Fault(status=302, headers={"Location": location})
        with fetch(card(at(f"{server.url}/w.pth"))) as fetched:
            assert fetched.path.read_bytes() == DATA
    assert len(made) == 1
    made = use_client(auth=("user", "secret"))
    cached_file = obtain(card(at(f"{server.url}/moved.pth")))
    assert converted_from(cached_file) == DATA
    assert len(made) == 1
    assert [request.authorization for request in server.requests] == [None] * 5


@pytest.mark.parametrize(("first", "second"), [("https", "http"), ("https", "ftp"), ("http", "https")])
def test_a_redirect_may_become_safer_only(use_client: Callable[..., list[Any]], first: str, second: str) -> None:
    asked: list[str] = []

    def answer(request: Any) -> Any:
        asked.append(str(request.url))
        if len(asked) == 1:
            return http_library().Response(302, headers={"Location": f"{second}://127.0.0.2/moved.pth"})
        return http_library().Response(200, content=iter([DATA]))

    use_client(transport=http_library().MockTransport(answer))
    given = card(at(f"{first}://127.0.0.1/w.pth"))
    if second == "https":
        assert converted_from(obtain(given)) == DATA
    else:
        with pytest.raises(DownloadError, match=f"redirects to {second}://127.0.0.2/moved.pth, which is less safe"):
            obtain(given)
        assert len(asked) == 1


def test_a_size_that_the_client_does_not_check_is_checked(use_client: Callable[..., list[Any]]) -> None:
    def answer(request: Any) -> Any:
        return http_library().Response(200, headers={"Content-Length": "300000"}, content=iter([DATA[:CUT]]))

    use_client(transport=http_library().MockTransport(answer))
    with pytest.raises(DownloadError, match="ended after 100000 of 300000 bytes"):
        obtain(card(at("http://127.0.0.1/w.pth")))


def read_anew_by_url(url: str) -> bytes:
    return converted_from(obtain(card(at(url))))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate")
def test_a_certificate_that_nobody_knows_is_named(
    server: Server, environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    about = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *about)
    subprocess.run(make, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    url = server.put("/w.pth", DATA).replace("http://", "https://")
    with pytest.raises(DownloadError, match=f"{url}: .*certificate verify failed"):
        read_anew_by_url(url)
    assert "trying again" not in caplog.text
    assert Elsewhere(environment | {"SSL_CERT_FILE": certificate}, read_anew_by_url, url).result() == DATA


def test_a_proxy_is_asked(server: Server, environment: dict[str, str]) -> None:
    server.put("/w.pth", DATA)
    url = "http://dl.example.org/w.pth"
    assert Elsewhere(environment | {"HTTP_PROXY": server.url}, read_anew_by_url, url).result() == DATA
    assert [request.host for request in server.requests] == ["dl.example.org"]
    shutil.rmtree(home())
    for proxy in ("nonsense://127.0.0.1", "http://127.0.0.1:port"):
        with pytest.raises(DownloadError, match=r"http://dl\.example\.org/w\.pth: "):
            Elsewhere(environment | {"HTTP_PROXY": proxy}, read_anew_by_url, url).result()


# Several sources, licences, names.


def test_the_next_source_is_taken_and_named(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.put("/second.pth", DATA)
    given = card(at(f"{server.url}/first.pth"), at(f"{server.url}/second.pth"))
    assert converted_from(obtain(given)) == DATA
    (record,) = [record for record in caplog.records if record.name == "tomevit"]
    assert record.levelno == logging.WARNING
    assert f"vit_x1.tag is read from {server.url}/second.pth" in record.message
    assert "first.pth answered 404" in record.message
    server.requests.clear()
    obtain(given)
    assert not server.requests


def test_sources_do_not_mix(server: Server) -> None:
    first, second = server.put("/first/w.pth", DATA), server.put("/second/w.pth", OTHER)
    server.faults["/first/w.pth"] = [Fault(cut=CUT)] + [Fault(status=500)] * 4
    assert converted_from(obtain(card(at(first), at(second)))) == OTHER
    assert server.requests[-1].range is None


def test_what_is_left_of_one_source_goes_once_another_served(server: Server) -> None:
    first, second = server.put("/first.pth", DATA), server.put("/second.pth", OTHER)
    given = card(at(first), at(second, sha256=sha256(OTHER)))
    server.faults["/first.pth"] = [Fault(cut=CUT), *[Fault(status=500)] * 4, Fault(status=404), Fault(status=404)]
    server.faults["/second.pth"] = [Fault(body=DATA)]
    with pytest.raises(CheckpointError, match="published is"):
        obtain(given)
    assert "vit_x1.tag/second.pth" not in kept("unfinished")
    assert "vit_x1.tag/first.pth.part" in kept("unfinished")
    assert converted_from(obtain(given)) == OTHER
    assert kept("unfinished") == []


def test_when_no_source_answers_all_are_listed(server: Server) -> None:
    with pytest.raises(DownloadError) as caught:
        obtain(card(at(f"{server.url}/first.pth"), on_hub("nobody/nothing"), at(f"{server.url}/third.pth")))
    first, *reasons = str(caught.value).splitlines()
    assert f"download {server.url}/first.pth elsewhere and put it at {home()}" in first
    assert [next(word for word in ("first", "nobody", "third") if word in line) for line in reasons] == [
        "first",
        "nobody",
        "third",
    ]


def test_the_licence_of_non_commercial_weights_is_shown_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    given = card(at(server.put("/w.pth", DATA)), licence="cc-by-nc-4.0")
    obtain(given)
    obtain(given)
    (record,) = [record for record in caplog.records if record.name == "tomevit"]
    for word in ("vit_x1.tag", "cc-by-nc-4.0", "not for commercial use", f"{server.url}/w.pth"):
        assert word in record.message


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("TOMEVIT_HOME", "~/mine")
    assert home() == tmp_path / "mine"
    monkeypatch.delenv("TOMEVIT_HOME")
    assert home() == tmp_path / ".cache" / "tomevit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "tomevit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert home() == tmp_path / ".cache" / "tomevit"
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.one_of(st.text(max_size=300), st.sampled_from(["con", "NUL.pth", "../a", "a/b", "a\\b", "..", ""]))))
def test_any_name_becomes_a_file_name(names: list[str]) -> None:
    safe = {name: cache._file_name(name) for name in names}
    assert len(set(safe.values())) == len(safe)
    for name in safe.values():
        assert name.isascii()
        assert 0 < len(name) <= 128
        assert not set(name) & set('/\\:*?"<>| ')
        assert name[0] != "."
        assert name[-1] != "."
        assert name.partition(".")[0].lower() not in {"con", "prn", "aux", "nul", "com1", "lpt9"}
        assert cache._file_name(name) == name


def test_a_card_without_sources_says_so() -> None:
    with pytest.raises(DownloadError, match=r"vit_x1\.tag is not published"):
        obtain(card())


def test_what_ships_with_tomevit_is_used_in_place() -> None:
    source = Source(format="tomevit", package="assets/digits_p1_plain.safetensors")
    path = obtain(card(source))
    assert path.name == "digits_p1_plain.safetensors"
    with fetch(card(source)) as fetched:
        assert (fetched.path, fetched.ours) == (path, False)
        assert fetched.source.sha256 == sha256(path.read_bytes())
    assert path.exists()


def test_fetch_lends_a_file(server: Server) -> None:
    server.put("/w.pth", DATA)
    given = card(at(f"{server.url}/no.pth"), at(f"{server.url}/w.pth"))
    with fetch(given) as fetched:
        assert fetched.path.read_bytes() == DATA
        assert fetched.ours
    assert not fetched.path.exists()
    assert kept() == []
    obtain(given)
    server.put("/w.pth", OTHER)
    with pytest.raises(CheckpointError, match="has changed"):
        fetch(given).__enter__()
    assert not kept("unfinished")


def test_errors_of_others_are_left_alone(server: Server, tmp_path: Path) -> None:
    url = server.put("/w.pth", DATA)
    with pytest.raises(PermissionError, match="theirs"), fetch(card(at(url))):
        raise PermissionError(13, "theirs")
    with pytest.raises(FileNotFoundError):
        obtain(card(at(url)), lambda given, fetched, draft: (tmp_path / "none" / "x").write_bytes(b""))  # type: ignore[arg-type,return-value]


# Without a network.


@pytest.mark.parametrize("source", [at("https://example.org/w.pth"), on_hub(file="w.pth"), on_hub(file="sub/w.pth")])
def test_offline_one_sentence_says_what_to_bring_and_bringing_it_helps(
    server: Server, set_environment: Callable[..., None], source: Source
) -> None:
    set_environment(HF_HUB_OFFLINE="1")
    place = home() / "downloads" / "vit_x1.tag" / "w.pth"
    with pytest.raises(DownloadError) as caught:
        obtain(card(source))
    address = source.url or f"{server.url}/owner/repo/resolve/main/{source.file}"
    assert str(caught.value) == (
        f"vit_x1.tag is not in the cache, and HF_HUB_OFFLINE is set: download {address} elsewhere and put it at {place}"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(DATA)
    assert converted_from(obtain(card(source))) == DATA
    assert place.read_bytes() == DATA
    assert not server.requests


def test_a_file_that_was_brought_comes_first_and_is_checked(server: Server) -> None:
    given = card(at(f"{server.url}/first.pth"), at(server.put("/w.pth", OTHER), sha256=sha256(DATA)[:8]))
    place = home() / "downloads" / "vit_x1.tag" / "w.pth"
    place.parent.mkdir(parents=True)
    for wrong, message in ((OTHER, "published is"), (b"<!doctype html><title>w.pth", "is a web page")):
        place.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=message) as caught:
            obtain(given)
        assert str(place) in str(caught.value)
        assert place.read_bytes() == wrong
    place.write_bytes(DATA)
    assert converted_from(obtain(given)) == DATA
    assert not server.requests


def test_hugging_faces_cache_is_read_offline(server: Server, set_environment: Callable[..., None]) -> None:
    server.put_hub("owner/repo", "pytorch_model.bin", DATA)
    obtain(card(on_hub()))
    shutil.rmtree(home())
    server.requests.clear()
    set_environment(HF_HUB_OFFLINE="1")
    assert converted_from(obtain(card(on_hub()))) == DATA
    assert not server.requests


def test_hugging_faces_cache_is_read_when_nobody_listens(
    server: Server, set_environment: Callable[..., None], naps: list[float]
) -> None:
    server.put_hub("owner/repo", "pytorch_model.bin", DATA)
    obtain(card(on_hub()))
    shutil.rmtree(home())
    with Server() as closed:
        set_environment(HF_ENDPOINT=closed.url)
    assert converted_from(obtain(card(on_hub()))) == DATA
    naps.clear()
    with pytest.raises(DownloadError, match="owner/other cannot be reached"):
        obtain(card(on_hub("owner/other")))
    assert sum(naps) < 3


# The cache.


@pytest.mark.parametrize("data", [DATA, DATA[:500]], ids=["large", "small"])
def test_the_hub(server: Server, data: bytes) -> None:
    server.put_hub("owner/repo", "pytorch_model.bin", OTHER)
    commit = server.put_hub("owner/repo", "model.safetensors", data)
    seen: list[Fetched] = []

    def look(given: Card, fetched: Fetched, draft: Path) -> None:
        seen.append(fetched)
        convert(given, fetched, draft)

    path = obtain(card(on_hub()), look)
    assert converted_from(path) == data
    assert seen[0].source == on_hub(file="model.safetensors", revision=commit, sha256=sha256(data))
    assert not seen[0].ours
    assert seen[0].path.exists()
    server.requests.clear()
    assert obtain(card(on_hub()), look) == path
    assert not server.requests


def test_a_pinned_revision_stays(server: Server) -> None:
    commit = server.put_hub("owner/repo", "weights/w.pth", DATA)
    server.put_hub("owner/repo", "weights/w.pth", OTHER)
    pinned = on_hub(revision=commit, file="weights/w.pth")
    with fetch(card(pinned)) as fetched:
        assert fetched.path.read_bytes() == DATA
        assert fetched.source.revision == commit
    assert converted_from(obtain(card(pinned))) == DATA
    assert converted_from(obtain(card(on_hub(file="weights/w.pth")))) == OTHER


def test_what_the_hub_does_not_have_is_named(server: Server, set_environment: Callable[..., None]) -> None:
    server.put_hub("owner/repo", "README.md", b"nothing here")
    server.put_hub("owner/private", "model.safetensors", DATA, token="hf_secret")
    server.put_hub("owner/gated", "model.safetensors", DATA, token="hf_secret", gated=True)
    for source, message in {
        on_hub(): "owner/repo on the hub has no model.safetensors and no pytorch_model.bin",
        on_hub(file="w.pth"): r"owner/repo on the hub has no w\.pth",
        on_hub(revision="v2"): "owner/repo on the hub has no revision v2",
        on_hub("owner/none"): "there is no owner/none on the hub, or it is private: .* HF_TOKEN",
        on_hub("owner/private"): "there is no owner/private on the hub, or it is private: .* HF_TOKEN",
        on_hub("owner/gated"): f"owner/gated on the hub is gated: accept its licence at {server.url}/owner/gated",
        on_hub("a/b/c"): "'a/b/c' is no name on the hub, which has the form owner/repo",
    }.items():
        with pytest.raises(DownloadError, match=message) as caught:
            obtain(card(source))
        assert len(str(caught.value).splitlines()) == 1
    set_environment(HF_TOKEN="hf_secret")
    for repo in ("owner/private", "owner/gated"):
        assert converted_from(obtain(card(on_hub(repo)))) == DATA


def test_the_token_goes_to_the_endpoint_only(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(HF_TOKEN="hf_secret")
    server.put_hub("owner/repo", "model.safetensors", DATA, token="hf_secret")
    obtain(card(on_hub()))
    obtain(card(at(server.put("/w.pth", DATA))))
    endpoint = server.url.removeprefix("http://")
    for request in server.requests:
        resolves = "/resolve/" in request.path
        assert request.authorization == ("Bearer hf_secret" if resolves else None)
        assert (request.host == endpoint) == (resolves or request.path == "/w.pth")
    assert [request.method for request in server.requests] == ["HEAD", "HEAD", "GET", "GET"]


@PASSES
@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_what_passes_on_the_hub_is_waited_for(server: Server, faults: list[Fault | None]) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    queue: list[Fault | None] = list(faults)
    server.faults[f"/storage/{sha256(DATA)}"] = queue
    assert converted_from(obtain(card(on_hub()))) == DATA
    assert queue == []
    assert not list(Path(os.environ["HF_HOME"]).rglob("*.incomplete"))


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_stays_down_is_given_up_and_the_next_source_taken(server: Server, status: int) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    server.forever["/owner/repo/resolve/main/model.safetensors"] = Fault(status=status)
    with pytest.raises(DownloadError, match=f"owner/repo cannot be reached .*{status}"):
        obtain(card(on_hub()))
    server.forever = {f"/storage/{sha256(DATA)}": Fault(status=status)}
    with pytest.raises(DownloadError, match=f"owner/repo on the hub answered {status}"):
        obtain(card(on_hub()))
    given = card(on_hub(), at(server.put("/w.pth", OTHER)))
    assert converted_from(obtain(given)) == OTHER


def test_damage_on_the_way_from_the_hub_is_found_and_mended(server: Server) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    damaged = bytearray(DATA)
    damaged[1234] ^= 1
    server.faults[f"/storage/{sha256(DATA)}"] = [Fault(body=bytes(damaged))]
    with pytest.raises(CheckpointError, match=r"model.safetensors of owner/repo came damaged"):
        obtain(card(on_hub()))
    assert kept() == []
    assert converted_from(obtain(card(on_hub()))) == DATA


def test_a_published_hash_counts_on_the_hub_too(server: Server) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    with pytest.raises(CheckpointError, match=f"from hf-hub:owner/repo, has sha256 {sha256(DATA)}, published is 1234"):
        obtain(card(on_hub(sha256="1234")))


def test_files_beside_the_weights(server: Server, set_environment: Callable[..., None]) -> None:
    commit = server.put_hub("owner/repo", "config.json", b"{}")
    commit = server.put_hub("owner/repo", "model.safetensors", DATA)
    server.put_hub("owner/repo", "other.json", b"later")
    names = ("other.json", "config.json")
    with fetch(card(on_hub(revision=commit))) as fetched:
        found = cache.beside(fetched.source, names)
    assert {name: path.read_bytes() for name, path in found.items()} == {"config.json": b"{}"}
    set_environment(HF_HUB_OFFLINE="1")
    assert cache.beside(fetched.source, names) == found
    set_environment(HF_HUB_OFFLINE="0")
    with pytest.raises(DownloadError, match="no revision"):
        cache.beside(on_hub(revision="none"), names)


def read_anew(url: str) -> tuple[bytes, bool]:
    before = "huggingface_hub" in sys.modules
    return converted_from(obtain(card(on_hub("owner/repo")))), before


def test_a_fresh_process_reads_the_environment(server: Server, environment: dict[str, str]) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA, token="hf_secret")
    token = {"HF_TOKEN": "hf_secret"}
    assert Elsewhere(environment | token, read_anew, server.url).result() == (DATA, False)
    assert kept("weights")
    shutil.rmtree(home())
    server.requests.clear()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert Elsewhere(offline, read_anew, server.url).result() == (DATA, False)
    assert not server.requests
    shutil.rmtree(home())
    nothing = offline | {"HF_HOME": environment["HF_HOME"] + "2"}
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set: download"):
        Elsewhere(nothing, read_anew, server.url).result()


# Several processes, and such as die.


def convert_and_count(given: Card, fetched: Fetched, draft: Path) -> None:
    with (home() / "conversions").open("a") as file:
        file.write(".")
    convert(given, fetched, draft)
    threading.Event().wait(0.1)


def read_counting(source: Source) -> tuple[str, bytes]:
    path = obtain(card(source), convert_and_count)
    return str(path), converted_from(path)


@AT_ONCE
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("kind", ["url", "hub"])
def test_processes_at_once_share_one_download(
    server: Server, environment: dict[str, str], count: int, kind: str
) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    source = on_hub() if kind == "hub" else at(server.put("/w.pth", DATA))
    path = f"/storage/{sha256(DATA)}" if kind == "hub" else "/w.pth"
    server.faults[path] = [Fault(cut=CUT, hang=0.5)]  # time for all to arrive
    processes = [Elsewhere(environment, read_counting, source) for _ in range(count)]
    results = [process.result() for process in processes]
    assert len(set(results)) == 1
    assert results[0][1] == DATA
    assert server.paths().count(path) == 2
    assert (home() / "conversions").read_text() == "."
    assert len(kept()) == 2


@AT_ONCE
def test_threads_at_once_share_one_download(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)))
    server.faults["/w.pth"] = [Fault(trickle=100_000)]
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(obtain(given))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert len(server.requests) == 1


@KILLED
def test_killed_in_mid_download(server: Server, environment: dict[str, str]) -> None:
    source = at(server.put("/w.pth", DATA))
    server.faults["/w.pth"] = [Fault(cut=CUT, hang=30)]
    process = Elsewhere(environment, read_counting, source)
    part = home() / "unfinished" / "vit_x1.tag" / "w.pth.part"
    until(lambda: part.exists() and part.stat().st_size)
    process.kill()
    assert kept("weights") == []
    size = part.stat().st_size
    assert converted_from(obtain(card(source))) == DATA
    assert server.requests[-1].range == f"bytes={size}-"
    assert len(kept()) == 1


@KILLED
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_interrupted_by_the_user_in_mid_download(server: Server, environment: dict[str, str]) -> None:
    source = at(server.put("/w.pth", DATA))
    server.faults["/w.pth"] = [Fault(cut=CUT, hang=30)]
    process = Elsewhere(environment, read_counting, source)
    part = home() / "unfinished" / "vit_x1.tag" / "w.pth.part"
    until(lambda: part.exists() and part.stat().st_size)
    assert process.process.pid
    os.kill(process.process.pid, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        process.result()
    assert part.stat().st_size == CUT
    assert converted_from(obtain(card(source))) == DATA
    assert server.requests[-1].range == f"bytes={CUT}-"


def stop_halfway(given: Card, fetched: Fetched, draft: Path) -> None:
    draft.write_bytes(b"half")
    draft.with_name(".another").write_bytes(b"half")
    (home() / "halfway").touch()
    threading.Event().wait(60)


def convert_half(source: Source) -> None:
    obtain(card(source), stop_halfway)


@KILLED
@pytest.mark.parametrize("kind", ["url", "hub"])
def test_killed_in_mid_conversion(server: Server, environment: dict[str, str], kind: str) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    source = on_hub() if kind == "hub" else at(server.put("/w.pth", DATA))
    process = Elsewhere(environment, convert_half, source)
    until(lambda: (home() / "halfway").exists())
    process.kill()
    assert kept("weights") == []
    server.requests.clear()
    assert converted_from(obtain(card(source))) == DATA
    assert server.paths() == []  # what the other had downloaded still serves
    assert len(kept()) == 2


@KILLED
def test_killed_in_mid_download_from_the_hub(server: Server, environment: dict[str, str]) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    server.faults[f"/storage/{sha256(DATA)}"] = [Fault(cut=CUT, hang=30)]
    process = Elsewhere(environment, read_counting, on_hub())
    until(lambda: list(Path(environment["HF_HOME"]).rglob("*.incomplete")))
    process.kill()
    assert converted_from(obtain(card(on_hub()))) == DATA


def test_who_waits_long_is_told(server: Server, environment: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    source = at(server.put("/w.pth", DATA))
    process = Elsewhere(environment, convert_half, source)
    until(lambda: (home() / "halfway").exists())
    timer = threading.Timer(2.5, process.kill)
    timer.start()
    assert converted_from(obtain(card(source))) == DATA
    timer.join()
    assert "waiting for another process, which is fetching vit_x1.tag" in caplog.text


# Full and unwritable disks.


@FULL
def test_too_little_space_is_known_before_anything_is_written(server: Server) -> None:
    given = card(at(server.put("/w.pth", DATA)), at(server.put("/second.pth", DATA)))
    server.faults["/w.pth"] = [Fault(headers={"Content-Length": str(10**18)})]
    with pytest.raises(DownloadError, match=r"1000000000000\.0 MB do not fit into .*set TOMEVIT_HOME to a directory"):
        obtain(given)
    assert kept() == []
    assert len(server.requests) == 1  # another source would need as much
    assert converted_from(obtain(given)) == DATA


@FULL
def test_too_little_space_for_the_hub(server: Server) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    path = "/owner/repo/resolve/main/model.safetensors"
    headers = {
        "X-Repo-Commit": "0" * 40,
        "X-Linked-Size": str(10**18),
        "X-Linked-ETag": f'"{sha256(DATA)}"',
        "Location": f"{server.storage}/storage/{sha256(DATA)}",
    }
    server.forever[path] = Fault(status=302, headers=headers)
    with pytest.raises(DownloadError, match=r"1000000000000\.0 MB do not fit into .*set HF_HOME to a directory"):
        obtain(card(on_hub()))
    del server.forever[path]
    assert converted_from(obtain(card(on_hub()))) == DATA


def convert_large(given: Card, fetched: Fetched, draft: Path) -> None:
    save_file({"bytes": np.zeros(10**6, dtype=np.uint8)}, draft)


def with_file_limit(source: Source, limit: int, converter: Callable[[Card, Fetched, Path], None]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    obtain(card(source), converter)


@FULL
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("kind", ["download", "conversion", "hub"])
def test_a_disk_that_fills_up(server: Server, environment: dict[str, str], kind: str) -> None:
    old = obtain(card(at(server.put("/w.pth", OTHER), sha256=sha256(OTHER))))
    commit = server.put_hub("owner/repo", "model.safetensors", DATA)
    source = at(server.put("/w.pth", DATA), sha256=sha256(DATA))
    if kind == "hub":
        source = on_hub(revision=commit)
    limit, converter = (500_000, convert_large) if kind == "conversion" else (200_000, convert)
    with pytest.raises(
        DownloadError, match=r"cannot be written: .* MB that are left: free some space, or set \w+_HOME to"
    ) as caught:
        Elsewhere(environment, with_file_limit, source, limit, converter).result()
    assert environment["HF_HOME" if kind == "hub" else "TOMEVIT_HOME"] in str(caught.value)
    stays = ["unfinished/vit_x1.tag/w.pth", "unfinished/vit_x1.tag/w.pth.json"] if kind == "conversion" else []
    assert kept() == [*stays, f"weights/{old.name}"]
    assert not list(Path(environment["HF_HOME"]).rglob("*.incomplete"))
    assert converted_from(old) == OTHER
    assert converted_from(obtain(card(source))) == DATA


def on_small_disk(sources: list[Source], directory: str) -> list[str]:
    """What is said on a disk of 400 kB, in a mount namespace of our own, which needs no privileges on most Linuxes."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users, private = 0x00020000, 0x10000000, 0x44000
    users = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    Path(directory).mkdir()
    if libc.unshare(new_mounts | new_users) == 0:
        try:
            for name, text in users.items():
                Path("/proc/self", name).write_text(text)
        except PermissionError as error:
            return [f"no namespace: {error}"]
    elif libc.unshare(new_mounts):
        return [f"no namespace: {os.strerror(ctypes.get_errno())}"]
    mount = libc.mount(b"none", b"/", None, private, None)
    if mount or libc.mount(b"tmpfs", directory.encode(), b"tmpfs", 0, b"size=400k"):
        return [f"no mount: {os.strerror(ctypes.get_errno())}"]
    said = []
    for source in sources:
        try:
            obtain(card(source))
        except DownloadError as error:
            said.append(str(error))
        said.append(" ".join(kept()))
    return said


@FULL
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")
def test_a_small_disk(server: Server, environment: dict[str, str]) -> None:
    large = random.Random(2).randbytes(600_000)
    sources = [at(server.put("/early.pth", large)), at(server.put("/late.pth", large)), at(server.put("/w.pth", DATA))]
    server.faults["/late.pth"] = [Fault(headers={"Content-Length": None})]
    result = Elsewhere(environment, on_small_disk, sources, environment["TOMEVIT_HOME"]).result()
    if result[0].startswith("no "):
        pytest.skip(result[0])
    early, after_early, late, after_late, conversion, after_conversion = result
    assert "early.pth.part cannot be written: No space left on device: 0.6 MB do not fit into the 0.4 MB" in early
    assert "late.pth.part cannot be written: No space left on device: the file does not fit into" in late
    assert "converted cannot be written: No space left on device: 0.3 MB do not fit into" in conversion
    assert after_early == after_late == ""
    assert after_conversion == "unfinished/vit_x1.tag/w.pth unfinished/vit_x1.tag/w.pth.json"


def without_privileges(source: Source) -> str:
    if os.geteuid() == 0:  # without its capabilities even root heeds permissions
        version, process, none = 0x20080522, 0, (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version, process), none) == 0
    return str(obtain(card(source)))


@pytest.fixture
def seal() -> Iterator[Callable[[Path], None]]:
    """Take the right to write from a directory and all in it, until the test is over."""
    sealed: list[Path] = []

    def seal(directory: Path) -> None:
        sealed.extend((directory, *directory.rglob("*")))
        for path in sealed:
            path.chmod(0o555 if path.is_dir() else 0o444)

    yield seal
    for path in sealed:
        path.chmod(0o755)


READ_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no read-only directories")


@READ_ONLY_CACHE
@READ_ONLY
def test_a_read_only_cache_can_be_read(
    server: Server, environment: dict[str, str], seal: Callable[[Path], None]
) -> None:
    source = at(server.put("/w.pth", DATA))
    path = obtain(card(source))
    seal(home())
    server.requests.clear()
    assert Elsewhere(environment, without_privileges, source).result() == str(path)
    assert not server.requests
    other = at(server.put("/other.pth", OTHER))
    with pytest.raises(DownloadError, match=rf"{home()}/.* cannot be written: .* set TOMEVIT_HOME to a directory"):
        Elsewhere(environment, without_privileges, other).result()
    assert not server.requests


@READ_ONLY_CACHE
@READ_ONLY
@pytest.mark.parametrize("variable", ["TOMEVIT_HOME", "HF_HOME"])
def test_a_cache_that_cannot_be_made(
    server: Server, environment: dict[str, str], seal: Callable[[Path], None], variable: str
) -> None:
    server.put_hub("owner/repo", "model.safetensors", DATA)
    place = Path(environment[variable]).parent / "sealed"
    place.mkdir()
    seal(place)
    changed = environment | {variable: str(place / "cache")}
    with pytest.raises(DownloadError, match=rf"{place}/cache\S* cannot be written: .* set {variable} to a directory"):
        Elsewhere(changed, without_privileges, on_hub()).result()
    assert list(place.iterdir()) == []
    assert Elsewhere(environment, without_privileges, on_hub()).result()


def test_a_file_in_the_cache_directorys_place(server: Server, environment: dict[str, str]) -> None:
    Path(environment["TOMEVIT_HOME"]).write_text("")
    with pytest.raises(DownloadError, match=r"cannot be written: .* set TOMEVIT_HOME to"):
        obtain(card(at(server.put("/w.pth", DATA))))

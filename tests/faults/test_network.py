"""Servers and proxies that are broken or hostile: each ends in time, in one printable sentence, or does not matter."""

from __future__ import annotations

import gzip
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tests.elsewhere import Elsewhere
from tests.fetching import CUT, DATA, OTHER, at, card, converted_from, kept, obtain, on_hub, sha256
from tests.outcomes import survives
from tests.server import Fault, RawServer, Server
from tomevit.errors import DownloadError
from tomevit.weights import hub
from tomevit.weights.cache import home

pytestmark = pytest.mark.usefixtures("set_environment", "naps")

KIND = "cache and network"
ENDLESS = survives(KIND, "redirects and errors with bodies without end", "no more is read than is shown")
REDIRECTS = survives(KIND, "redirects that lead nowhere, in circles, to files or to less safe places", "one sentence")
PARTS = survives(KIND, "the rest of another file, after a download was cut", "never continues what was begun")
LENGTHS = survives(KIND, "answers shorter, longer or of other lengths than they say", "tried again, then one sentence")
GZIP = survives(KIND, "answers packed by gzip, though asked for as they are", "unpacked; refused if they grow too far")
SLOW = survives(KIND, "a server that sends a byte now and then", "given up in bounded time, however often it sends")
NONSENSE = survives(KIND, "answers that are no HTTP, with control characters, or 60 kB in a line", "one printable line")
PAGES = survives(KIND, "a login page where a file should be", "is named as a web page")
THREADS = survives(KIND, "downloads in several threads", "no global setting of the process is touched")


def refused(url: str, *says: str) -> str:
    """What is said of a URL that cannot be had: one printable line."""
    with pytest.raises(DownloadError) as caught:
        obtain(card(at(url)))
    said = str(caught.value)
    assert said.isprintable(), said
    assert len(said) < 1500
    for expected in says:
        assert expected in said
    assert not [name for name in kept() if "weights/" in name]
    return said


def endless(head: bytes) -> Callable[[socket.socket, bytes], None]:
    """Answers with a head and zeros for ever."""

    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(bytes(2**16))

    return answer


@ENDLESS
@pytest.mark.parametrize("length", [b"Content-Length: 10000000000\r\n", b"Connection: close\r\n"])
@pytest.mark.parametrize("status", [b"302 Found\r\nLocation: /w.pth", b"404 Not Found", b"500 Oops"])
@pytest.mark.parametrize("kind", ["url", "hub"])
def test_bodies_without_end_are_not_read(
    status: bytes, length: bytes, kind: str, set_environment: Callable[..., None]
) -> None:
    head = b"HTTP/1.1 " + status + b"\r\n" + length + b"\r\n"
    found = b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "a"\r\nX-Repo-Commit: ' + b"0" * 40 + b"\r\n\r\n"

    def answer(connection: socket.socket, asked: bytes) -> None:
        if asked.startswith(b"HEAD"):
            connection.sendall(found)
        else:
            endless(head)(connection, asked)

    with RawServer(answer) as server:
        set_environment(HF_ENDPOINT=server.url)
        began = time.monotonic()
        with pytest.raises(DownloadError):
            obtain(card(at(f"{server.url}/w.pth") if kind == "url" else on_hub(file="w.pth")))
        assert time.monotonic() - began < 5
    assert kept() == []


def read_measured(url: str) -> int:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DownloadError):
        obtain(card(on_hub(file="w.pth")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


@ENDLESS
def test_a_redirect_of_the_hubs_takes_no_memory(server: Server, environment: dict[str, str]) -> None:
    server.put_hub("owner/repo", "w.pth", DATA)
    server.forever[f"/storage/{sha256(DATA)}"] = Fault(status=302, headers={"Location": "/none"}, body=bytes(10**8))
    assert Elsewhere(environment, read_measured, "").result() < 60_000  # kB, of which importing the client takes most


@REDIRECTS
@pytest.mark.parametrize(
    ("location", "says"),
    [
        (None, "answered 302 Found"),
        ("", "redirects more than 10 times"),
        ("http://[", ""),
        ("http://127.0.0.1:99999999/", ""),
        ("file:///etc/passwd", "less safe"),
        ("data:text/plain,weights", ""),
        ("//", ""),
        ("ftp://127.0.0.1/\u202e" + "a" * 5000, "less safe"),
    ],
)
def test_odd_redirects(server: Server, location: str | None, says: str) -> None:
    headers = {"Location": location and location.encode().decode("latin-1")}
    server.forever["/w.pth"] = Fault(status=302, headers=headers)
    refused(server.put("/w.pth", DATA), says)


@REDIRECTS
def test_redirects_in_a_circle(server: Server) -> None:
    for here, there in (("/a.pth", "/b.pth"), ("/b.pth", "/a.pth")):
        server.forever[here] = Fault(status=307, headers={"Location": there})
    refused(f"{server.url}/a.pth", "redirects more than 10 times")


ETAG = '"an etag"'
REST = {"Content-Range": f"bytes {CUT}-{len(DATA) - 1}/{len(DATA)}", "ETag": ETAG}


@PARTS
@pytest.mark.parametrize(
    "changed",
    [
        {"ETag": None},
        {"ETag": '"another"'},
        {"ETag": f"W/{ETAG}"},
        {"Content-Range": f"bytes {CUT}-{len(DATA) - 1}/{len(DATA) + 1}"},
        {"Content-Range": f"bytes {CUT}-{len(DATA) - 1}/*"},
        {"Content-Range": f"bytes {CUT}-{len(DATA) - 2}/{len(DATA)}"},
        {"Content-Range": f"bytes {CUT + 1}-{len(DATA)}/{len(DATA)}"},
        {"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"},
        {"Content-Range": "bytes " + "9" * 5000 + "-1/2"},
        {"Content-Range": None},
        {"Content-Encoding": "gzip"},
    ],
)
def test_another_part_does_not_continue_what_was_begun(server: Server, changed: dict[str, str | None]) -> None:
    server.faults["/w.pth"] = [
        Fault(cut=CUT, headers={"ETag": ETAG}),
        Fault(status=206, headers=REST | changed, body=OTHER[: len(DATA) - CUT]),
    ]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA
    assert [request.range for request in server.requests] == [None, f"bytes={CUT}-", None]


@PARTS
def test_a_part_that_nobody_asked_for_is_no_file(server: Server) -> None:
    server.forever["/w.pth"] = Fault(status=206, headers=REST, body=OTHER)
    refused(server.put("/w.pth", DATA), "answered 206 Partial Content")


@PARTS
def test_the_rest_of_the_same_file_is_taken(server: Server) -> None:
    server.faults["/w.pth"] = [Fault(cut=CUT, headers={"ETag": ETAG}), Fault(status=206, headers=REST, body=DATA[CUT:])]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA))))) == DATA
    assert len(server.requests) == 2


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


@LENGTHS
@pytest.mark.parametrize(
    ("head", "body", "says"),
    [
        (b"Content-Length: -5", DATA, "gave up"),
        (b"Content-Length: 5\r\nContent-Length: 6", DATA, "gave up"),
        (b"Content-Length: " + b"9" * 5000, DATA, "gave up"),
        (b"Content-Length: lots", DATA, "gave up"),
        (b"Content-Length: 400000", DATA, "gave up"),
        (b"Transfer-Encoding: chunked", chunked(DATA), "gave up"),
        (b"Transfer-Encoding: chunked", b"zz\r\n" + DATA, "gave up"),
        (b"Transfer-Encoding: chunked", b"ffffffffffffffffffffffff\r\n" + DATA, "gave up"),
        (b"Transfer-Encoding: nonsense", DATA, "gave up"),
    ],
)
def test_lengths_that_lie(head: bytes, body: bytes, says: str) -> None:
    with RawServer(lambda to, _: to.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)) as server:
        refused(f"{server.url}/w.pth", says)


@LENGTHS
@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 300000", DATA + b"more"),
        (b"Connection: close", DATA),
        (b"Transfer-Encoding: chunked", chunked(DATA[:7], DATA[7:]) + b"0\r\n\r\n"),
        (b"Content-Length: 300000\r\nContent-Length: 300000", DATA),
    ],
)
def test_lengths_that_can_be_made_out(head: bytes, body: bytes) -> None:
    with RawServer(lambda to, _: to.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)) as server:
        assert converted_from(obtain(card(at(f"{server.url}/w.pth")))) == DATA


@pytest.mark.parametrize("status", [201, 202, 204, 205])
def test_a_success_without_a_file_is_none(server: Server, status: int) -> None:
    server.forever["/w.pth"] = Fault(status=status)
    refused(server.put("/w.pth", DATA), f"answered {status}")


PACKED = gzip.compress(DATA)


@GZIP
@pytest.mark.parametrize("cut", [[], [Fault(headers={"Content-Encoding": "gzip"}, body=PACKED, cut=CUT)] * 2])
def test_what_comes_packed_is_stored_as_it_is(server: Server, cut: list[Fault | None]) -> None:
    server.faults["/w.pth"] = [*cut, Fault(headers={"Content-Encoding": "GZip"}, body=PACKED)]
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA), sha256=sha256(DATA))))) == DATA
    assert {request.range for request in server.requests} == {None}


@GZIP
@pytest.mark.parametrize(
    ("encoding", "body", "says"),
    [
        ("gzip", gzip.compress(bytes(10**8)), "bytes that gzip makes"),
        ("gzip", DATA, "damaged file, packed as gzip"),
        ("gzip", PACKED[:-9], "gave up"),
        ("gzip", b"", "gave up"),
        ("br", DATA, "packed as br, not with the file as it is"),
        ("zstd", DATA, "packed as zstd"),
        ("gzip, gzip", DATA, "packed as gzip, gzip"),
        ("x" * 60_000, DATA, "packed as xxx"),
    ],
)
def test_packed_files_that_are_refused(server: Server, encoding: str, body: bytes, says: str) -> None:
    server.forever["/w.pth"] = Fault(headers={"Content-Encoding": encoding}, body=body)
    refused(server.put("/w.pth", DATA), says)


@GZIP
def test_a_file_of_zeros_is_unpacked_too(server: Server) -> None:
    zeros = bytes(2**20)  # whose last piece is exactly as large as a piece may be
    server.forever["/w.pth"] = Fault(headers={"Content-Encoding": "gzip"}, body=gzip.compress(zeros))
    assert converted_from(obtain(card(at(server.put("/w.pth", zeros))))) == zeros


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n"


def drip(head: bytes, body: bytes, pause: float = 0.02) -> Callable[[socket.socket, bytes], None]:
    """Answers with a head at once, and a byte of the body now and then."""

    def answer(connection: socket.socket, _: bytes) -> None:
        wait = threading.Event()
        connection.sendall(head)
        for i in range(len(body)):
            connection.sendall(body[i : i + 1])
            wait.wait(pause)

    return answer


@SLOW
@pytest.mark.parametrize(
    ("head", "body"), [(HEAD + b"\r\n", DATA), (HEAD, b"X: " + b"a" * 10**5), (b"", b"HTTP/1.1 200 " + b"a" * 10**5)]
)
def test_a_server_that_drips_is_given_up(head: bytes, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    with RawServer(drip(head, body)) as server:
        began = time.monotonic()
        refused(f"{server.url}/w.pth", "gave up after 5 attempts")
        assert time.monotonic() - began < 10
        assert len(server.heads) == 5


@SLOW
def test_so_is_a_hub_that_drips(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.put_hub("owner/repo", "w.pth", DATA)
    server.forever[f"/storage/{sha256(DATA)}"] = Fault(trickle=1)
    with pytest.raises(DownloadError, match=r"is too slow: it sent \d+ bytes in 1 s; gave up after 3 attempts"):
        obtain(card(on_hub(file="w.pth")))


@SLOW
def test_so_is_one_that_drips_its_head(
    set_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    with RawServer(drip(b"", b"HTTP/1.1 200 " + b"a" * 10**5)) as server:
        set_environment(HF_ENDPOINT=server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        with pytest.raises(DownloadError, match=r"owner/repo could not be read from the hub .*gave up"):
            obtain(card(on_hub()))
    assert sum(naps) < 30


@SLOW
def test_a_server_that_cuts_after_every_few_bytes_is_given_up(server: Server) -> None:
    server.forever["/w.pth"] = Fault(cut=5)
    refused(server.put("/w.pth", DATA), "ended after 25 of 300000 bytes")
    assert len(server.requests) == 5


@SLOW
def test_a_slow_line_is_no_fault(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.forever["/w.pth"] = Fault(trickle=100)  # 2 kB a second
    assert converted_from(obtain(card(at(server.put("/w.pth", DATA[:2000]))))) == DATA[:2000]
    assert len(server.requests) == 1


@NONSENSE
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 " + b"a" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 404 \x1b[31mred\r\n\r\n",
        b"HTTP/1.1 404 \xe2\x80\xae\xff\xfe\r\n\r\n",
        b"HTTP/1.1 404\r\n\r\n",
        b"HTTP/1.1 999 What\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 -1 OK\r\n\r\n",
        b"<html>a page as HTTP/0.9 had it</html>",
        b"\x1b]0;title\x07" * 100,
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00" * 100,
        b"\r\n" * 100,
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 50_000 + b"\r\n",
        b"HTTP/1.1 503 Wait\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 503 Wait\r\nRetry-After: Wed, 99 Xyz 99999999 99:99:99\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_nonsense_is_one_printable_line(answer: bytes) -> None:
    with RawServer(lambda connection, _: connection.sendall(answer)) as server:
        refused(f"{server.url}/w.pth", server.url)


@NONSENSE
def test_an_odd_etag_does_not_come_back(server: Server) -> None:
    for etag in ('"' + "a" * 60_000 + '"', '"\xe9"'):
        server.faults["/w.pth"] = [Fault(cut=CUT, headers={"ETag": etag})]
        assert converted_from(obtain(card(at(server.put("/w.pth", DATA), sha256=sha256(DATA))))) == DATA
        assert server.requests[-1].range is None
        shutil.rmtree(home())


@PAGES
@pytest.mark.parametrize(
    "page", [b"<!-- portal --><html>", b"\r\n" * 300 + b"<!DOCTYPE html>", b"<script>location='/login'</script>"]
)
def test_a_login_page_is_named(server: Server, page: bytes) -> None:
    server.forever["/w.pth"] = Fault(body=page)
    refused(server.put("/w.pth", DATA), "answered with a web page, not with a file")


@THREADS
def test_threads_leave_the_process_as_it_was(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    server.put_hub("owner/repo", "w.pth", DATA)
    both, real, before = threading.Barrier(2), huggingface_hub.hf_hub_download, list(warnings.filters)
    seen: list[Any] = []

    def meet(*args: Any, **kwargs: Any) -> Any:
        seen.append(list(warnings.filters))
        both.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", meet)
    found: list[list[Any]] = []
    ask = lambda: found.append(list(hub.files_on_hub(on_hub(), ["w.pth"])))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] != []
    assert seen == [before] * 4
    assert list(warnings.filters) == before

"""A web server on this machine that stands in for the network: plain files, the hub's downloads, and faults on demand.

    with Server() as server:
        server.put("/weights.pth", data)
        server.put_hub("owner/repo", "model.safetensors", data)
        server.faults["/weights.pth"] = [Fault(status=503), Fault(cut=1000)]  # the first two GETs; then all is well

As a program, `python -m tests.server DIRECTORY` serves the files of a directory until its standard input closes, those
under DIRECTORY/hub/OWNER/REPO/ as the hub would, and prints its URL.

The hub's protocol, as huggingface_hub speaks it: HEAD and GET of /OWNER/REPO/resolve/REVISION/FILE answer with the
commit in X-Repo-Commit; for large files they redirect to another host, with size and sha256 in X-Linked-Size and
X-Linked-ETag. What is missing is named in X-Error-Code.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str | None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer."""

    status: int | None = None  # instead of the file
    headers: Mapping[str, str] = field(default_factory=dict)  # besides, or instead of, the usual ones
    body: bytes | None = None  # instead of the file's
    cut: int | None = None  # the connection closes after so many bytes of the body
    hang: float = 0.0  # seconds of silence, after `cut` bytes, or before the answer
    trickle: int | None = None  # bytes at a time, 20 times a second


class Repo:
    """One repository on the hub."""

    def __init__(self, *, token: str | None = None, gated: bool = False) -> None:
        self.token = token  # without it, the repository does not seem to exist
        self.gated = gated
        self.revisions: dict[str, str] = {}  # commit, by branch, tag and commit
        self.files: dict[str, dict[str, bytes]] = {}  # by commit and name


class Server:
    """Serves from memory, on a free port of 127.0.0.1, in threads of this process."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}  # content and type, by path
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, list[Fault | None]] = {}  # of the next GETs, by path; None: all well
        self.forever: dict[str, Fault] = {}  # of every GET and HEAD, by path
        self.requests: list[Request] = []
        self.ranges = True  # answer to Range with a part
        self.etags = True
        self.large = 1024  # bytes from which the hub redirects to its storage
        self.closing = threading.Event()

    def __enter__(self) -> Server:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.storage = f"http://localhost:{self.http.server_port}"  # another host, so no token may go there
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def put(self, path: str, content: bytes, *, content_type: str = "application/octet-stream") -> str:
        """Serve content at a path; returns the URL."""
        self.files[path] = content, content_type
        return self.url + path

    def put_hub(self, repo: str, file: str, content: bytes, *, revision: str = "main", **about: Any) -> str:
        """Commit a file to a branch or tag of the hub; returns the commit."""
        if repo not in self.repos or about:
            self.repos[repo] = Repo(**about)
        found = self.repos[repo]
        before = found.revisions.get(revision, "")
        commit = hashlib.sha1(f"{before}{file}".encode() + content).hexdigest()
        found.files[commit] = found.files.get(before, {}) | {file: content}
        found.revisions |= {revision: commit, commit: commit}
        self.put(_storage(content), content)
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]


def _storage(content: bytes) -> str:
    return f"/storage/{hashlib.sha256(content).hexdigest()}"


class _Handler(BaseHTTPRequestHandler):
    server_: Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        path, server, headers = unquote(urlsplit(self.path).path), self.server_, self.headers
        if path != "/api/agent-harnesses":  # huggingface_hub asks for it now and then, whatever it is used for
            server.requests.append(
                Request(self.command, path, headers["Range"], headers["Authorization"], headers["Host"])
            )
        queue = server.faults.get(path) if self.command == "GET" else None
        fault = (queue.pop(0) if queue else None) or server.forever.get(path) or Fault()
        if fault.hang and fault.cut is None:
            server.closing.wait(fault.hang)
        if fault.status is not None:
            self._send(fault.status, fault.headers, fault.body or b"", fault)
        elif path in server.files:
            content, content_type = server.files[path]
            self._send_file(content, {"Content-Type": content_type}, fault)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups(), fault)
        else:
            self._send(404, {}, b"", fault)

    def _resolve(self, repo: str, revision: str, file: str, fault: Fault) -> None:
        found = self.server_.repos.get(repo)
        if found is None or (found.token and self.headers["Authorization"] != f"Bearer {found.token}"):
            # Without a token the hub does not tell what is missing from what is private.
            gated = found is not None and found.gated
            status = 401 if not self.headers["Authorization"] else 403 if gated else 404
            self._send(status, {"X-Error-Code": "GatedRepo" if gated else "RepoNotFound"}, b"", fault)
        elif revision not in found.revisions:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", fault)
        elif file not in found.files[found.revisions[revision]]:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found.revisions[revision]}
            self._send(404, missing, b"", fault)
        else:
            content = found.files[found.revisions[revision]][file]
            headers = {"X-Repo-Commit": found.revisions[revision]}
            if len(content) < self.server_.large:
                self._send_file(content, headers, fault)
            else:
                headers["X-Linked-Size"] = str(len(content))
                headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["Location"] = self.server_.storage + _storage(content)
                self._send(302, headers, b"", fault)

    def _send_file(self, content: bytes, headers: dict[str, str], fault: Fault) -> None:
        content = content if fault.body is None else fault.body
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        status = 200
        if self.server_.etags:
            headers["ETag"] = etag
        match = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if self.server_.ranges and match and self.headers["If-Range"] in (None, etag):
            start = int(match[1])
            if start >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", fault)
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self._send(status, headers | dict(fault.headers), content, fault)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault) -> None:
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | dict(headers)).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            whole = len(body)
            body = body[: fault.cut]
            step = fault.trickle or whole or 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if fault.trickle and self.server_.closing.wait(0.05):
                    return
            if fault.hang and fault.cut is not None:
                self.wfile.flush()
                self.server_.closing.wait(fault.hang)
        except OSError:  # the client went away
            pass
        finally:
            self.close_connection = True


def main(directory: Path) -> None:
    with Server() as server:
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            if match := re.fullmatch(r"hub/([^/]+/[^/]+)/(.+)", name):
                server.put_hub(match[1], match[2], path.read_bytes())
            else:
                server.put(f"/{name}", path.read_bytes())
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

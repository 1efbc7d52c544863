"""A web server on this machine that stands in for the network: plain files, the hub, and faults on demand.

    with Server() as server:
        server.put("/weights.pth", data)
        server.put_hub("owner/repo", "model.safetensors", data)
        server.accounts["hf_token"] = "owner"  # who may create owner/repo, and commit to it
        server.faults["/weights.pth"] = [Fault(status=503), Fault(cut=1000)]  # the first two times; then all is well

As a program, `python -m tests.server DIRECTORY` serves the files of a directory until its standard input closes, those
under DIRECTORY/hub/OWNER/REPO/ as the hub would, and prints its URL.

The hub's protocol, as huggingface_hub speaks it: HEAD and GET of /OWNER/REPO/resolve/REVISION/FILE answer with the
commit in X-Repo-Commit; for large files they redirect to another host, with size and sha256 in X-Linked-Size and
X-Linked-ETag. What is missing is named in X-Error-Code. Uploads go by git-lfs: /api/repos/create makes a repository,
…/preupload/REVISION says which files are large, /OWNER/REPO.git/info/lfs/objects/batch where to PUT those, and
…/commit/REVISION takes the small ones and the hashes of the large, one JSON object a line.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

#: What variables begin with that a client of this server may read.
ENVIRONMENT = ("TOMEVIT_", "HF_", "HUGGING", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY")

#: A few that the hub knows.
LICENCES = (
    "apache-2.0",
    "apple-amlr",
    "apple-ascl",
    "bsd-3-clause",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "mit",
    "other",
    "unknown",
)


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
    headers: Mapping[str, str | None] = field(default_factory=dict)  # besides, or instead of, the usual ones; None: not
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
        self.messages: dict[str, str] = {}  # of uploads, by commit


class Server:
    """Serves from memory, on a free port of 127.0.0.1, in threads of this process."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}  # content and type, by path
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, str] = {}  # which owner a token may write for
        self.faults: dict[str, list[Fault | None]] = {}  # of the next requests but HEAD, by path; None: all well
        self.forever: dict[str, Fault] = {}  # of every request, by path
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
        return self.commit(repo, {file: content}, revision=revision)

    def commit(self, repo: str, files: Mapping[str, bytes], *, revision: str = "main") -> str:
        found = self.repos[repo]
        before = found.revisions.get(revision, "")
        commit = hashlib.sha1(before.encode() + b"".join(name.encode() + files[name] for name in files)).hexdigest()
        found.files[commit] = found.files.get(before, {}) | files
        found.revisions |= {revision: commit, commit: commit}
        for content in files.values():
            self.put(_storage(content), content)
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]


def _storage(content: bytes) -> str:
    return f"/storage/{hashlib.sha256(content).hexdigest()}"


def objections(readme: str) -> list[str]:
    """What the hub would object to in a model card's metadata."""
    match = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["there is no metadata"]
    wrong = []
    if data.get("license", "mit") not in LICENCES:
        wrong.append(f'"license" must be one of {LICENCES}')
    if data.get("license") == "other" and not re.fullmatch(r"[a-z0-9-.]+", data.get("license_name", "")):
        wrong.append('"license_name" must be lower case')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
        wrong.append('"base_model" must be a model id')
    for model in data.get("model-index", []):
        for result in model["results"]:
            for part in ("task", "dataset", "metrics"):
                entries = result[part] if part == "metrics" else [result[part]]
                wrong += [f'"{part}" has no type' for entry in entries if not isinstance(entry.get("type"), str)]
            if not isinstance(result["dataset"].get("name"), str):
                wrong.append('"dataset" has no name')
    return wrong


class _Handler(BaseHTTPRequestHandler):
    server_: Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _answer(self) -> None:
        path, server, headers = unquote(urlsplit(self.path).path), self.server_, self.headers
        if path != "/api/agent-harnesses":  # huggingface_hub asks for it now and then, whatever it is used for
            server.requests.append(
                Request(self.command, path, headers["Range"], headers["Authorization"], headers["Host"])
            )
        body = self._read_body()  # or the client, still sending, would see a broken connection instead of the answer
        queue = server.faults.get(path) if self.command != "HEAD" else None
        fault = (queue.pop(0) if queue else None) or server.forever.get(path) or Fault()
        if fault.hang and fault.cut is None:
            server.closing.wait(fault.hang)
        if fault.status is not None:
            self._send(fault.status, fault.headers, fault.body or b"", fault)
        elif self.command in ("POST", "PUT") or path.startswith("/api/"):
            self._send_json(*self._api(path, body), fault)
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

    # The hub's API. Each answers with a status and what goes out as JSON.

    def _api(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in objections(json.loads(body)["content"])]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if match := re.fullmatch(r"/upload/(\w+)", path):
            assert self.command == "PUT"
            assert self.headers["Authorization"] is None  # such URLs are signed, and of another host
            if hashlib.sha256(body).hexdigest() != match[1]:
                return 400, {"error": "The SHA256 you specified did not match what was received"}
            self.server_.put(_storage(body), body)
            return 200, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|revision)/([^/]+)", path):
            repo, action, revision = match.groups()
            if action == "revision":
                return self._info(repo)
            return self._may_write(repo) or getattr(self, f"_{action}")(repo, revision, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)[.]git/info/lfs/objects/batch", path):
            return self._may_write(match[1]) or self._batch(json.loads(body))
        return 404, {"error": f"There is no {self.command} {path}"}

    def _owner(self) -> str | None:
        return self.server_.accounts.get((self.headers["Authorization"] or "").removeprefix("Bearer "))

    def _may_write(self, repo: str) -> tuple[int, Any] | None:
        """None if so."""
        if self._owner() is None:
            return 401, {"error": "Invalid username or password."}
        if self._owner() != repo.partition("/")[0]:
            return 403, {"error": f"You don't have the rights to write to {repo}."}
        if repo not in self.server_.repos:
            return 404, {"error": "Repository not found"}
        return None

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.server_.url}/{repo}"}
        if (refusal := self._may_write(repo)) is None:
            return 409, url | {"error": "You already created this model repo"}
        if refusal[0] != 404:
            return refusal
        token = self.headers["Authorization"].removeprefix("Bearer ")
        self.server_.repos[repo] = Repo(token=token if wanted.get("visibility") == "private" else None)
        return 200, url

    def _info(self, repo: str) -> tuple[int, Any]:
        found = self.server_.repos.get(repo)
        if found is None or (found.token and self.headers["Authorization"] != f"Bearer {found.token}"):
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "private": found.token is not None, "sha": found.revisions.get("main")}

    def _preupload(self, repo: str, revision: str, body: bytes) -> tuple[int, Any]:
        found = self.server_.repos[repo]
        there = found.files.get(found.revisions.get(revision, ""), {})
        answers = []
        for file in json.loads(body)["files"]:
            large = file["size"] >= self.server_.large and not file["path"].endswith((".md", ".json", ".txt"))
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (content := there.get(file["path"])) is not None:
                blob = b"blob %d\0" % len(content) + content  # as git hashes it
                answer["oid"] = (hashlib.sha256(content) if large else hashlib.sha1(blob)).hexdigest()
            answers.append(answer)
        return 200, {"files": answers}

    def _batch(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        assert wanted["operation"] == "upload"
        assert "basic" in wanted["transfers"]
        objects: list[dict[str, Any]] = [dict(entry) for entry in wanted["objects"]]
        for entry in objects:
            if f"/storage/{entry['oid']}" not in self.server_.files:
                entry["actions"] = {"upload": {"href": f"{self.server_.storage}/upload/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, repo: str, revision: str, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif f"/storage/{value['oid']}" in self.server_.files:
                files[value["path"]] = self.server_.files[f"/storage/{value['oid']}"][0]
            else:
                return 400, {"error": f"Your push was rejected: {value['path']} was not uploaded"}
        commit = self.server_.commit(repo, files, revision=revision)
        self.server_.repos[repo].messages[commit] = lines[0]["value"]["summary"]
        return 200, {"commitOid": commit, "commitUrl": f"{self.server_.url}/{repo}/commit/{commit}"}

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_json(self, status: int, answer: Any, fault: Fault) -> None:
        self._send(status, {"Content-Type": "application/json", **fault.headers}, json.dumps(answer).encode(), fault)

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

    def _send(self, status: int, headers: Mapping[str, str | None], body: bytes, fault: Fault) -> None:
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | dict(headers)).items():
                if value is not None:
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


class RawServer:
    """Answers bytes that no honest server sends: whatever a function writes to the connection of a request."""

    def __init__(self, answer: Callable[[socket.socket, bytes], None]) -> None:
        self.answer = answer  # is given the connection and the head of the request
        self.heads: list[bytes] = []

    def __enter__(self) -> RawServer:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (received := connection.recv(2**16)):
                    return
                head += received
            self.heads.append(head)
            self.answer(connection, head)


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

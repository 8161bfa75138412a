"""A hub on this machine: the part of the Hugging Face Hub's public HTTP API that a download uses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
_REVISION = re.compile(f"/resolve/({COMMIT}|main)/")
_NO_HEADERS: Mapping[str, str] = {}
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repository:
    """What one repository holds and how it answers."""

    files: dict[str, bytes]
    card: Mapping[str, str] = field(default_factory=lambda: {"license": "apache-2.0"})
    gated: bool = False
    listed_sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing claims, where they are not those of the content."""


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class Hub:
    """Repositories, what was asked about them, and what goes wrong on the way."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.allowed_tokens: set[str] = set()
        self.requests: list[Request] = []
        self.stall_at: dict[str, int] = {}
        """File name → bytes after which nothing more comes, until `released`."""
        self.cut_at: dict[str, int] = {}
        """File name → bytes after which the connection ends, once."""
        self.corrupt: set[str] = set()
        self.status: int | None = None
        """Answered to everything."""
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.content_host = ""
        """Where large files are redirected to, if anywhere."""

    @property
    def fetched(self) -> list[str]:
        """`owner/repository/file` of every download, in order."""
        asked = [request.path for request in self.requests if request.method == "GET"]
        return [path.replace(f"/resolve/{COMMIT}", "")[1:] for path in asked if "/resolve/" in path]

    def ranges_of(self, name: str) -> list[str | None]:
        return [request.range for request in self.requests if request.path.endswith(f"/{name}")]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Yields the endpoint's URL."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = (self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.hub.requests.append(Request(*asked))
        if self.hub.status is not None:
            self._refuse(self.hub.status)
        elif path.startswith("/api/models/"):
            self._list(path.removeprefix("/api/models/"))
        elif path.startswith("/content/"):
            self._send_file(*self._found(path.removeprefix("/content/")), with_body=with_body)
        elif "/resolve/" in path:
            self._resolve(path, with_body=with_body)
        else:
            self._refuse(404)

    def _list(self, name: str) -> None:
        name = name.split("/revision/")[0]
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
            return
        siblings = [_sibling(repository, file) for file in repository.files]
        listing = {"id": name, "sha": COMMIT, "siblings": siblings, "cardData": dict(repository.card)}
        self._send(200, json.dumps(listing | {"gated": "auto" if repository.gated else False}).encode())

    def _resolve(self, path: str, *, with_body: bool) -> None:
        repository, name = self._found(_REVISION.sub("/", path[1:], count=1))
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.gated and self._token() not in self.hub.allowed_tokens:
            self._refuse(403 if self._token() else 401, "GatedRepo")
        elif name not in repository.files:
            self._refuse(404, "EntryNotFound")
        elif self.hub.content_host and name.endswith(LFS_SUFFIXES):
            content = repository.files[name]
            headers = {
                "Location": f"{self.hub.content_host}/content/{_REVISION.sub('/', path[1:], count=1)}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-ETag": f'"{_digest(name, content)}"',
                "X-Linked-Size": str(len(content)),
            }
            self._send(302, b"", headers)
        else:
            self._send_file(repository, name, with_body=with_body)

    def _found(self, path: str) -> tuple[Repository | None, str]:
        owner, repository, name = path.split("/", 2)
        return self.hub.repositories.get(f"{owner}/{repository}"), name

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _send_file(self, repository: Repository | None, name: str, *, with_body: bool) -> None:
        assert repository is not None
        content = repository.files[name]
        if name in self.hub.corrupt:
            content = bytes(255 - byte for byte in content)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{_digest(name, content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        self._send(206 if start else 200, b"", headers)
        if with_body:
            self._send_slowly(name, content, start)

    def _send_slowly(self, name: str, content: bytes, start: int) -> None:
        stall, cut = self.hub.stall_at.get(name), self.hub.cut_at.pop(name, None)
        end = min(stall or len(content), cut or len(content))
        self.wfile.write(content[start:end])
        self.wfile.flush()
        if stall is not None and start < stall:
            self.hub.stalled.set()
            self.hub.released.wait(30)
            self.close_connection = True
        elif cut is not None:
            self.close_connection = True
            self.connection.close()

    def _refuse(self, status: int, code: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = _NO_HEADERS) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sibling(repository: Repository, name: str) -> dict[str, object]:
    content = repository.files[name]
    size = repository.listed_sizes.get(name, len(content))
    entry: dict[str, object] = {"rfilename": name, "size": size}
    if name.endswith(LFS_SUFFIXES):
        lfs = {"size": size, "sha256": _digest(name, content), "pointerSize": 134}
        return entry | {"blobId": "0" * 40, "lfs": lfs}
    return entry | {"blobId": _digest(name, content)}


def _digest(name: str, content: bytes) -> str:
    """Returns a file's ETag: SHA-256 of large files, git's digest of others."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

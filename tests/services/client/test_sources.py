"""Image files of a request: from paths, bytes, URLs, Pillow, results, and from what cannot be one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path

import pytest
from PIL import Image as pillow

from klein_client import AsyncClient, Client, DeadlineExceeded, Image, InvalidRequest, sources
from tests.services.fakes.answering_orchestrator import Orchestrator, serving


@pytest.fixture
def orchestrator() -> Orchestrator:
    return Orchestrator()


@pytest.fixture
def client(orchestrator: Orchestrator) -> Iterator[Client]:
    with serving(orchestrator) as target, Client(target) as opened:
        yield opened


class Files(BaseHTTPRequestHandler):
    """Serves a file, redirects, dribbles, hangs."""

    stopped = threading.Event()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "missing":
            self.send_error(404)
            return
        if name == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
            return
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if name == "slow":
            while not self.stopped.wait(0.05):
                self.wfile.write(b"x")
        self.wfile.write(b"a file" if name != "large" else bytes(1000))

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            return


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # A proxy that the environment names would get these downloads.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Files.stopped = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Files.stopped.set()
        server.shutdown()


def test_every_kind_of_source_is_the_file(client: Client, orchestrator: Orchestrator, tmp_path: Path) -> None:
    path = tmp_path / "schön ❤.png"
    path.write_bytes(b"a file")
    result = client.generate("a star")
    client.generate(
        "a star",
        references=[
            str(path),
            path,
            b"a file",
            bytearray(b"a file"),
            memoryview(b"a file"),
            BytesIO(b"a file"),
            result.image,
            result,
        ],
    )
    assert list(orchestrator.specs[-1].references) == [b"a file"] * 6 + [b"picture 0"] * 2
    client.generate("a star", references=client.generate("two", count=2))
    assert list(orchestrator.specs[-1].references) == [b"picture 0", b"picture 1"]
    client.generate("a star", references=path)
    assert list(orchestrator.specs[-1].references) == [b"a file"]
    client.generate("", references=[])
    assert (orchestrator.specs[-1].prompt, list(orchestrator.specs[-1].references)) == ("", [])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_an_image_of_pillow_is_sent_as_png(client: Client, orchestrator: Orchestrator, mode: str) -> None:
    client.generate("a star", initial_image=pillow.new(mode, (8, 4)))
    with pillow.open(BytesIO(orchestrator.specs[-1].initial_image)) as sent:
        assert (sent.format, sent.size) == ("PNG", (8, 4))


async def test_a_url_is_downloaded_by_the_client(
    client: Client, orchestrator: Orchestrator, web: str
) -> None:
    client.generate("a star", references=f"{web}/file", mask=f"{web}/moved")
    async with AsyncClient(client.endpoint.target) as asynchronous:
        await asynchronous.generate("a star", references=[f"{web}/file"], mask=f"{web}/moved")
    for spec in orchestrator.specs:
        assert (list(spec.references), spec.mask) == ([b"a file"], b"a file")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.png", "nowhere.png cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "is no path"),
        ("/dev/null/x", "cannot be read: Not a directory"),
        ("x" * 5000, "cannot be read: File name too long"),
        (7, "is of type int, not a path"),
        (None, "is of type NoneType"),
        (StringIO("text"), "is a file in text mode"),
        (Image(0, 1, 4, 4, "raw", b""), "is a raw image"),
        ("http://127.0.0.1:1/x.png", "cannot be downloaded"),
        ("http://[", "cannot be downloaded"),
        ("WEB/missing", "cannot be downloaded: HTTP status 404"),
        ("WEB/loop", "cannot be downloaded: "),
        ("WEB/slow", "cannot be downloaded within 0.3 s"),
    ],
)
async def test_a_source_that_is_no_file_is_named(
    client: Client,
    orchestrator: Orchestrator,
    web: str,
    monkeypatch: pytest.MonkeyPatch,
    source: object,
    words: str,
) -> None:
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.3 if "slow" in str(source) else 30.0)
    if isinstance(source, str):
        source = source.replace("WEB", web)
    with pytest.raises(InvalidRequest) as one:
        client.generate("a star", references=[b"first", source])
    async with AsyncClient(client.endpoint.target) as asynchronous:
        with pytest.raises(InvalidRequest) as other:
            await asynchronous.generate("a star", references=[b"first", source])
    for failure in (one.value, other.value):
        assert failure.violations[0].field == "references[1]"
        assert words in str(failure)
        assert len(str(failure)) < 400
    assert orchestrator.specs == []


async def test_a_file_over_the_bound_is_refused(
    client: Client, orchestrator: Orchestrator, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FILE_BYTES", 999)
    (tmp_path / "large").write_bytes(bytes(1000))
    (tmp_path / "fits").write_bytes(bytes(999))
    client.generate("a star", references=[tmp_path / "fits", bytes(999)])
    file = BytesIO(bytes(1000))
    async with AsyncClient(client.endpoint.target) as asynchronous:
        for source in (tmp_path / "large", bytes(1000), file, f"{web}/large", "/dev/zero"):
            with pytest.raises(InvalidRequest, match="mask has more than 999 bytes"):
                client.generate("a star", mask=source)
            file.seek(0)
            with pytest.raises(InvalidRequest, match="mask has more than 999 bytes"):
                await asynchronous.generate("a star", mask=source)
    assert len(orchestrator.specs) == 1


async def test_a_download_ends_with_the_timeout_of_its_request(client: Client, web: str) -> None:
    with pytest.raises(DeadlineExceeded, match=r"while references\[0\] was downloaded"):
        client.generate("a star", references=f"{web}/slow", timeout_seconds=0.3)
    async with AsyncClient(client.endpoint.target) as asynchronous:
        with pytest.raises(DeadlineExceeded, match=r"while references\[0\] was downloaded"):
            await asynchronous.generate("a star", references=f"{web}/slow", timeout_seconds=0.3)

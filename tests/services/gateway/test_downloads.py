"""Downloads of references: what is read, what is refused, and that no private address is ever reached."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from klein_services.gateway.downloads import Downloads
from klein_services.gateway.errors import ApiError
from klein_services.gateway.outbound import EVERY_HOST, Outbound, OutboundError, is_public

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@asynccontextmanager
async def web(answers: dict[str, bytes]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers paths with raw bytes; yields its URL and the requests that it got."""
    requests: list[bytes] = []
    answering: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        requests.append(head)
        answer = answers[head.split(b" ")[1].decode()]
        if answer == b"silence":
            await reader.read()
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"http://127.0.0.1:{port}", requests
    await asyncio.gather(*answering, return_exceptions=True)


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n".encode()


@asynccontextmanager
async def downloads(
    *private_hosts: str, maximum_bytes: int = 1000, seconds: float = 30.0
) -> AsyncIterator[Downloads]:
    outbound = Outbound(private_hosts)
    try:
        yield Downloads(outbound, seconds, maximum_bytes)
    finally:
        await outbound.close()


async def refusal(reader: Downloads, text: str) -> str:
    with pytest.raises(ApiError) as refused:
        await reader.image(text, "input_image")
    assert refused.value.field == "input_image"
    assert refused.value.status == 400
    return refused.value.message


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::127.0.0.1"),
    ],
)
def test_no_address_that_only_insiders_reach_is_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are_public(address: str):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0177.0.0.1", "127.1"],
)
async def test_no_spelling_of_this_machine_is_reached(host: str):
    async with web({"/": ok(PNG)}) as (url, requests), downloads() as reader:
        port = url.rpartition(":")[2]
        message = await refusal(reader, f"http://{host}:{port}/")
        assert "not public" in message or "no address" in message or "no URL" in message
        assert requests == []


async def test_a_name_that_resolves_anew_is_connected_to_the_checked_address(monkeypatch: pytest.MonkeyPatch):
    """DNS rebinding: the first answer is public, every later one is this machine."""
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.7", 80))]]
    asked: list[object] = []

    async def getaddrinfo(host: object, port: object, **options: object) -> object:
        asked.append(host)
        return answers[0]

    connected: list[object] = []

    async def create_connection(
        factory: object, host: object = None, port: object = None, **options: object
    ) -> object:
        connected.append(host)
        raise OSError("no such network")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    monkeypatch.setattr("klein_services.gateway.outbound.is_public", lambda address: address == "203.0.113.7")
    outbound = Outbound(())
    with pytest.raises(OutboundError):
        await outbound.send("GET", "http://rebinding.example/", seconds=30, maximum_bytes=10)
    await outbound.close()
    assert asked == ["rebinding.example"]
    assert set(connected) <= {"203.0.113.7"}


async def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch):
    async def getaddrinfo(host: object, port: object, **options: object) -> object:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with downloads() as reader:
        assert "not public" in await refusal(reader, "http://both.example/a.png")


async def test_redirects_are_followed_checked_and_bounded():
    async with web({}) as (_, unreached), web({}) as (inner, secrets):
        answers = {
            "/a": redirect("/b"),
            "/b": ok(PNG),
            "/loop": redirect("/loop"),
            "/file": redirect("file:///etc/passwd"),
            "/inside": redirect(inner.replace("127.0.0.1", "localhost") + "/secret"),
        }
        async with web(answers) as (url, requests), downloads("127.0.0.1") as reader:
            assert await reader.image(f"{url}/a", "input_image") == PNG
            assert b"accept-encoding: identity" in requests[0].lower()
            assert "redirects more than 3 times" in await refusal(reader, f"{url}/loop")
            assert "http:// or https://" in await refusal(reader, f"{url}/file")
            assert "not public" in await refusal(reader, f"{url}/inside")
            assert secrets == unreached == []


async def test_downloads_are_bounded_in_bytes_and_time():
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + bytes(1024) + b"\r\n" * 2
    )
    answers = {
        "/exact": ok(PNG + bytes(1000 - len(PNG))),
        "/more": ok(PNG + bytes(1001 - len(PNG))),
        "/chunked": chunked,
        "/silence": b"silence",
        "/broken": b"no HTTP at all\r\n\r\n",
        "/none": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "/html": ok(b"<html>", "Content-Type: image/png"),
    }
    async with web(answers) as (url, _):
        async with downloads(EVERY_HOST) as reader:
            assert len(await reader.image(f"{url}/exact", "input_image")) == 1000
            assert "more than 1000 bytes" in await refusal(reader, f"{url}/more")
            assert "more than 1000 bytes" in await refusal(reader, f"{url}/chunked")
            assert "RemoteProtocolError" in await refusal(reader, f"{url}/broken")
            assert "answers 404" in await refusal(reader, f"{url}/none")
            assert "no image file" in await refusal(reader, f"{url}/html")
        async with downloads(EVERY_HOST, seconds=0.2) as reader:
            assert "longer than 0.2 s" in await refusal(reader, f"{url}/silence")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://example.com/a.png", "data: URL"),
        ("file:///etc/passwd", "data: URL"),
        ("http://user:password@example.com/a.png", "user name"),
        ("https://", "name a host"),
        ("http://[::1", "no URL"),
        ("http://example.com/" + "a" * 3000, "at most 2083"),
        ("http://no-such-host.invalid/a.png", "no address"),
        ("data:image/png,abc", "data: URL"),
        ("data:image/png;base64,!!!", "no base64"),
        ("data:image/png;base64," + "A" * 2000, "more than the allowed 1000 bytes"),
        ("", "no image file"),
        ("not base64 ü", "no base64"),
        (base64.b64encode(b"GIF89a" + bytes(20)).decode(), "no image file"),
    ],
)
async def test_what_is_no_image_is_refused_with_the_field(text: str, reason: str):
    async with downloads() as reader:
        assert reason in await refusal(reader, text)


async def test_data_urls_and_base64_are_read_in_every_usual_form():
    encoded = base64.b64encode(PNG).decode()
    async with downloads() as reader:
        for text in (
            encoded,
            encoded.rstrip("="),
            "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76)),
            f"data:image/png;base64,{encoded}",
            f"DATA:image/png;charset=utf-8;base64,{encoded}",
        ):
            assert await reader.image(text, "input_image") == PNG

"""Server of the gateway: bounds on headers and bodies, readiness, errors of no API, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from klein_services.cli.process import inherited_environment
from klein_services.gateway import operations
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.route_group import RouteGroup, while_connected
from klein_services.gateway.server import GatewayServer, running_gateway
from klein_services.gateway.settings import GatewaySettings
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until

NO_ORCHESTRATOR = "127.0.0.1:1"


class Echo:
    """Routes that return what they read, fail, wait or stream."""

    def __init__(self) -> None:
        self.waiting = 0
        self.cancelled = 0
        self.may_end = asyncio.Event()

    @property
    def group(self) -> RouteGroup:
        routes = [
            Route("/echo", self.echo, methods=["POST"]),
            Route("/form", self.form, methods=["POST"]),
            Route("/fail", self.fail),
            Route("/wait", self.wait, methods=["POST"]),
            Route("/stream", self.stream),
        ]
        return RouteGroup(
            "echo", routes, lambda error: {"echo_error": [error.reason, error.message, error.field]}
        )

    async def echo(self, request: Request) -> Response:
        async with gateway_of(request).bodies.json(request) as value:
            return JSONResponse(value)

    async def form(self, request: Request) -> Response:
        async with gateway_of(request).bodies.form(request) as form:
            shown = {}
            for name, value in form.multi_items():
                shown[name] = value if isinstance(value, str) else len(await value.read())
            return JSONResponse(shown)

    async def fail(self, request: Request) -> Response:
        raise RuntimeError("a secret of the implementation")

    async def wait(self, request: Request) -> Response:
        async with gateway_of(request).bodies.json(request):
            await while_connected(request, self._waited())
        return Response("waited")

    async def stream(self, request: Request) -> Response:
        async def lines():
            for number in range(1_000_000):
                yield f"{number}\n" * 1000
                await asyncio.sleep(0)

        return StreamingResponse(lines())

    async def _waited(self) -> None:
        self.waiting += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def settings(**changes: object) -> GatewaySettings:
    return GatewaySettings(**({"target": NO_ORCHESTRATOR, "grace_seconds": 30} | changes))  # type: ignore[arg-type]


async def until_status(status: Callable[[], Awaitable[int]], expected: int) -> None:
    async with asyncio.timeout(60):
        while (found := await status()) != expected:
            assert found in (200, 503)
            await asyncio.sleep(0.05)


async def test_errors_have_the_form_of_the_api_that_has_the_path():
    echo = Echo()
    async with (
        running_gateway(settings(), [operations.GROUP, echo.group]) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        assert (await client.get("/healthz")).status_code == 200
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.text) == (503, "the orchestrator does not serve\n")
        wrong_method = await client.put("/echo")
        assert wrong_method.status_code == 405
        assert wrong_method.json()["echo_error"][0] == "method_not_allowed"
        assert wrong_method.headers["allow"] == "POST"
        unknown = await client.get("/v1/unknown")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "not_found"
        failed = await client.get("/fail", headers={"x-request-id": "mine"})
        assert failed.status_code == 500
        assert failed.headers["x-request-id"] == "mine"
        assert "mine" in failed.text
        assert "secret" not in failed.text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "no object"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": 1, "a": 2}', "a is there twice"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper than 32"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1', "at character 7"),
    ],
)
async def test_what_is_no_json_object_is_refused_with_the_reason(body: bytes, reason: str):
    echo = Echo()
    async with (
        running_gateway(settings(), [echo.group]) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        answer = await client.post("/echo", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert reason in answer.text


async def test_bodies_are_bounded_in_bytes_time_and_kind():
    echo = Echo()
    bounds = settings(body_limit_mib=1, body_memory_mib=1, body_timeout_seconds=0.5)
    async with (
        running_gateway(bounds, [echo.group]) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        kind = {"Content-Type": "application/json"}
        exact = b'{"a": "' + b"x" * ((1 << 20) - 9) + b'"}'
        assert (await client.post("/echo", content=exact, headers=kind)).status_code == 200
        declared = await client.post("/echo", content=exact + b" ", headers=kind)
        assert declared.status_code == 413
        assert "1 MiB" in declared.json()["echo_error"][1]

        async def chunks():
            for _ in range(40):
                yield b"x" * (1 << 16)

        assert (await client.post("/echo", content=chunks(), headers=kind)).status_code == 413

        async def slow():
            yield b"{"
            await asyncio.sleep(5)
            yield b"}"

        assert (await client.post("/echo", content=slow(), headers=kind)).status_code == 408
        assert (await client.post("/echo", content=b"{}")).status_code == 415
        form = await client.post("/form", content=b"{}", headers=kind)
        assert form.status_code == 415
        # What was refused no longer counts.
        assert (await client.post("/echo", content=exact, headers=kind)).status_code == 200


async def test_bodies_of_all_requests_together_are_bounded():
    echo = Echo()
    bounds = settings(body_limit_mib=1, body_memory_mib=1)
    async with (
        running_gateway(bounds, [echo.group]) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        kind = {"Content-Type": "application/json"}
        half = b'{"a": "' + b"x" * (600 << 10) + b'"}'
        waiting = asyncio.create_task(client.post("/wait", content=half, headers=kind))
        await until(lambda: echo.waiting)
        refused = await client.post("/echo", content=half, headers=kind)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        echo.may_end.set()
        assert (await waiting).status_code == 200
        assert (await client.post("/echo", content=half, headers=kind)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b\r\n",
        b"no boundary at all",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n" + b"X" * 70_000,
        b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % n for n in range(101))
        + b"--b--\r\n",
        b"".join(
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="%d"\r\n\r\nx\r\n' % n
            for n in range(33)
        )
        + b"--b--\r\n",
    ],
)
async def test_a_broken_form_is_never_a_fault(body: bytes):
    echo = Echo()
    async with (
        running_gateway(settings(), [echo.group]) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = await client.post("/form", content=body, headers=kind)
        assert answer.status_code in (200, 400)
        assert answer.status_code == 400 or answer.json() == {}
        missing = await client.post("/form", content=body, headers={"Content-Type": "multipart/form-data"})
        assert missing.status_code == 400
        assert missing.json()["echo_error"][0] == "invalid_body"


async def test_a_client_that_leaves_cancels_the_work_and_counts_as_499():
    echo = Echo()
    async with running_gateway(settings(), [echo.group]) as url:
        async with httpx2.AsyncClient(base_url=url) as client:
            posting = asyncio.create_task(client.post("/wait", json={}))
            await until(lambda: echo.waiting)
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)
        await until(lambda: echo.cancelled == 1)


async def test_a_stream_ends_when_its_client_leaves():
    echo = Echo()
    async with running_gateway(settings(grace_seconds=600), [echo.group]) as url:
        async with httpx2.AsyncClient(base_url=url) as client, client.stream("GET", "/stream") as answer:
            async for _ in answer.aiter_bytes():
                break
    # The gateway's end waits for streams that run: it would not come.


async def test_connections_that_send_no_headers_are_closed():
    async with running_gateway(settings(header_timeout_seconds=0.3), [operations.GROUP]) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()
        # And on a connection that was used before.
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"live\n")
        writer.write(b"GET /hea")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.close()


async def test_more_connections_than_the_limit_get_503():
    async with running_gateway(settings(max_connections=2), [operations.GROUP]) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        async with httpx2.AsyncClient(base_url=url) as client:
            assert (await client.get("/healthz")).status_code == 503
        for _, writer in held:
            writer.close()


async def test_readiness_follows_the_orchestrator_and_the_drain():
    async with FakeSuite().running() as suite:
        server = GatewayServer(
            settings(target=suite.address, host="127.0.0.1", port=0, metrics_port=0, drain_delay_seconds=600),
            [operations.GROUP],
        )
        async with httpx2.AsyncClient() as client:

            async def ready() -> int:
                return (await client.get(f"http://127.0.0.1:{server.port}/readyz")).status_code

            async def run() -> None:
                async with server.running():
                    await server.stop_requested.wait()

            running = asyncio.create_task(run())
            await until(lambda: server.port)
            await until_status(ready, 200)
            server.stop_requested.set()
            await until_status(ready, 503)
            assert (await client.get(f"http://127.0.0.1:{server.port}/healthz")).status_code == 200
            server.stop_now.set()
            await running


def test_the_process_serves_until_a_signal_and_logs_json():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = inherited_environment() | {
        "KLEIN_HOST": "127.0.0.1",
        "KLEIN_PORT": str(port),
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_TARGET": NO_ORCHESTRATOR,
        "KLEIN_DRAIN_DELAY_SECONDS": "0",
    }
    command = [sys.executable, "-m", "klein_services.gateway"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        while first["message"] != "serving":
            first = json.loads(process.stderr.readline())
        assert first["port"] == port
        assert httpx2.get(f"http://127.0.0.1:{port}/none").status_code == 404
        os.kill(process.pid, signal.SIGTERM)
        rest = [json.loads(line) for line in process.stderr]
        assert process.wait(60) == 0
    lines = {line["message"]: line for line in rest}
    assert lines["request"]["status"] == 404
    assert lines["request"]["request_id"]
    assert "stopped" in lines


def test_a_taken_port_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = inherited_environment() | {"KLEIN_HOST": "127.0.0.1", "KLEIN_PORT": str(port)}
        command = [sys.executable, "-m", "klein_services.gateway"]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "KLEIN_PORT" in ended.stderr
    assert "Traceback" not in ended.stderr

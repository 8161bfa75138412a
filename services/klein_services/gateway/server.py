"""Server of the gateway: its life from binding the ports to the drain after a signal."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import uvicorn

from klein_services.gateway.application import GROUPS, running_application
from klein_services.gateway.gateway import Gateway
from klein_services.gateway.http_protocol import HEADER_BYTES, protocol_class
from klein_services.gateway.route_group import RouteGroup
from klein_services.gateway.settings import GatewaySettings
from klein_services.runtime import metrics, tracing
from klein_services.runtime.channels import host_for_url
from klein_services.runtime.listener import RESERVED_FILES, BindError
from klein_services.runtime.metrics_server import MetricsServer
from klein_services.runtime.pem import PemError
from klein_services.runtime.server import stop_signals
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage import software_version

NAME = "gateway"
_EVERY_ADDRESS = "[::]"
_BACKLOG = 1024
_log = logging.getLogger("klein.server")


class GatewayServer:
    """The HTTP server and the metrics server.

    Args:
        settings: address and limits.
        groups: the APIs.
    """

    def __init__(self, settings: GatewaySettings, groups: Sequence[RouteGroup] = GROUPS) -> None:
        self.settings = settings
        self.stop_requested = asyncio.Event()
        self.stop_now = asyncio.Event()
        self.port = 0
        """The HTTP port; known inside `running`."""
        self._groups = groups

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Gateway]:
        """Serves for the duration of the block, whose end drains.

        Raises:
            BindError: a port is not available.
            PemError: the files of TLS cannot be used.
        """
        settings = self.settings
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(_listening_socket(settings))
            self.port = listener.getsockname()[1]
            application, gateway = await stack.enter_async_context(
                running_application(settings, self._groups)
            )
            if settings.metrics_port:
                stack.callback(_metrics_server(settings, gateway).close)
            server = _Uvicorn(self._config(application))
            serving = asyncio.create_task(server.serve([listener]), name="http")
            stack.push_async_callback(_ended, server, serving)
            metrics.SERVING.labels(NAME).set(1)
            _log.info("serving", extra={"port": self.port, "target": settings.target})
            yield gateway
            await self._drain(gateway, server, serving)

    async def _drain(self, gateway: Gateway, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        """Publishes that no requests are wanted, waits until clients notice, and lets running requests finish."""
        delay_seconds = self.settings.drain_delay_seconds
        gateway.readiness.drain()
        if gateway.jobs_or_none is not None:
            gateway.jobs_or_none.drain()
        metrics.SERVING.labels(NAME).set(0)
        _log.info("draining", extra={"delay_seconds": delay_seconds})
        hurrying = asyncio.create_task(self.stop_now.wait())
        try:
            await asyncio.wait(
                (hurrying, serving), timeout=delay_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            server.should_exit = True
            await asyncio.wait((hurrying, serving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurrying.cancel()
        _log.info("stopped")

    def _config(self, application: object) -> uvicorn.Config:
        settings = self.settings
        most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections = settings.max_connections
        if most_files != resource.RLIM_INFINITY:
            connections = max(1, min(connections, most_files - RESERVED_FILES))
        config = uvicorn.Config(
            application,  # type: ignore[arg-type]
            http=protocol_class(settings.header_timeout_seconds),
            ws="none",
            loop="asyncio",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Addresses of proxies are unknown here; what a client claims in a header is not taken for its own.
            proxy_headers=False,
            server_header=False,
            limit_concurrency=connections,
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
            h11_max_incomplete_event_size=HEADER_BYTES,
            ssl_certfile=settings.tls_certificate or None,
            ssl_keyfile=settings.tls_key or None,
        )
        config.load()
        if config.ssl is not None:
            config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
        return config


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own: the life of the process is the gateway's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _ended(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Ends a server at once, with the requests that still run."""
    if serving.done():
        return serving.result()
    server.should_exit = server.force_exit = True
    await serving
    tasks = list(server.server_state.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _listening_socket(settings: GatewaySettings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        if host == _EVERY_ADDRESS and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
        host = "0.0.0.0" if host == _EVERY_ADDRESS else host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise BindError(
            f"cannot listen on {host_for_url(settings.host)}:{port} ({error.strerror}); stop the process that does, or "
            "choose another address with KLEIN_HOST and KLEIN_PORT"
        ) from None


def _metrics_server(settings: GatewaySettings, gateway: Gateway) -> MetricsServer:
    try:
        return MetricsServer(
            settings.host.strip("[]"), settings.metrics_port, lambda: gateway.readiness.is_ready
        )
    except OSError as error:
        raise BindError(
            f"cannot serve metrics on {settings.host}:{settings.metrics_port} ({error.strerror}): is another process "
            "using it? Choose another port with KLEIN_METRICS_PORT, or 0 for none"
        ) from None


async def serve_gateway(settings: GatewaySettings, server: GatewayServer) -> int:
    """Serves until SIGTERM or SIGINT; a second signal stops at once.

    Returns:
        The exit code: 0 after a clean stop, 1 when the server could not start.
    """
    # uvicorn logs its start and each malformed request, with which clients could fill a disk.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    try:
        if problems := list(settings.problems()):
            raise SettingsError("; ".join(problems))
        tracing.start(settings.otlp_endpoint, NAME, software_version())
        with stop_signals(server.stop_requested, server.stop_now):
            async with server.running():
                await server.stop_requested.wait()
    except (BindError, SettingsError, PemError) as error:
        _log.error("%s", error)
        return 1
    except Exception:
        _log.exception("the server ends because of a fault")
        return 1
    finally:
        tracing.stop()
    return 0


@asynccontextmanager
async def running_gateway(
    settings: GatewaySettings, groups: Sequence[RouteGroup] = GROUPS
) -> AsyncIterator[str]:
    """Runs a gateway inside the current event loop, for tests; yields its URL on a free port of 127.0.0.1."""
    local = replace(settings, host="127.0.0.1", port=0, metrics_port=0, drain_delay_seconds=0)
    server = GatewayServer(local, groups)
    async with server.running():
        yield f"http://127.0.0.1:{server.port}"

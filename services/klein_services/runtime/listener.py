"""The ports of a server: gRPC with its standard services, and metrics over HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

import grpc
import prometheus_client
from grpc_channelz.v1.channelz import add_channelz_servicer
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from klein_core.errors import DeviceFault
from klein_services.runtime.channels import HTTP2_FRAME_BYTES, host_for_url
from klein_services.runtime.health import Readiness
from klein_services.runtime.interceptors import CallInterceptor, call_contexts
from klein_services.runtime.orca import LoadReport
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.stage import Application

_STANDARD_NAMES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.channelz.v1.Channelz",
)
_LONGEST_CALL_MILLISECONDS = 24 * 3600 * 1000
"""What a call may still take on a connection that is too old for new ones; as long as any setting allows."""


class BindError(Exception):
    """A port cannot be had; the text says which and what to do."""


class Listener:
    """A gRPC server and a metrics server, bound together and stopped together.

    Args:
        settings: host, ports and limits.
        application: what is served.
        readiness: which calls are refused.
        on_device_fault: told when a handler's device is lost.
    """

    def __init__(
        self,
        settings: ServerSettings,
        application: Application,
        readiness: Readiness,
        on_device_fault: Callable[[DeviceFault], None],
    ) -> None:
        self.port = 0
        self._settings = settings
        self._metrics: tuple[WSGIServer, threading.Thread] | None = None
        self._server = grpc.aio.server(
            interceptors=[
                CallInterceptor(call_contexts(readiness, _load_report(application), on_device_fault))
            ],
            options=_options(settings, application),
        )
        application.register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(readiness.servicer, self._server)
        add_channelz_servicer(self._server)
        names = (*application.service_names, *application.open_service_names, *_STANDARD_NAMES)
        enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Binds both ports and answers.

        Raises:
            BindError: a port is taken or not allowed.
        """
        host = _listening_host(self._settings.host)
        _require_free(host, self._settings.port)
        self.port = self._server.add_insecure_port(f"{host}:{self._settings.port}")
        if self._settings.metrics_port:
            self._metrics = _serve_metrics(host, self._settings.metrics_port)
        await self._server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new calls, gives running ones the grace to finish, then cancels them."""
        await self._server.stop(grace_seconds)
        if self._metrics is not None:
            server, thread = self._metrics
            self._metrics = None
            server.shutdown()
            server.server_close()
            thread.join()


def _require_free(host: str, port: int) -> None:
    """Checks that a port can be had, because gRPC says so only in lines of its own."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise BindError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop the process that does, or choose "
            "another address with KLEIN_HOST and KLEIN_PORT"
        ) from None


def _serve_metrics(host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    address = host.strip("[]")
    try:
        return prometheus_client.start_http_server(port, addr=address)
    except OSError as error:
        raise BindError(
            f"cannot serve metrics on {host}:{port} ({error.strerror}): is another process using it? "
            "Choose another port with KLEIN_METRICS_PORT, or 0 for none"
        ) from None


def _listening_host(host: str) -> str:
    host = host_for_url(host)
    return "0.0.0.0" if host == "[::]" and not _has_ipv6() else host


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _load_report(application: Application) -> LoadReport | None:
    if application.utilization() is None:
        return None
    return LoadReport(lambda: application.utilization() or 0.0)


def _options(settings: ServerSettings, application: Application) -> list[tuple[str, int]]:
    options = [
        # Two processes on one port would share its calls at random, silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", application.request_bytes),
        ("grpc.max_send_message_length", application.response_bytes),
        ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
        # A caller whose machine vanished without a word would keep its request alive for two hours.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if settings.max_connection_age_seconds:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age_seconds * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", _LONGEST_CALL_MILLISECONDS))
    return options

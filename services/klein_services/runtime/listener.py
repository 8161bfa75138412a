"""The ports of a server: gRPC with its standard services, and metrics over HTTP."""

from __future__ import annotations

import socket
from collections.abc import Callable

import grpc
from grpc_channelz.v1.channelz import add_channelz_servicer
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from klein_core.errors import DeviceFault
from klein_services.runtime.channels import HTTP2_FRAME_BYTES, host_for_url
from klein_services.runtime.health import ServerHealth
from klein_services.runtime.interceptors import CallInterceptor, call_contexts
from klein_services.runtime.metrics_server import MetricsServer
from klein_services.runtime.orca import LoadReport
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.stage import Service

_STANDARD_NAMES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.channelz.v1.Channelz",
)
_LONGEST_CALL_MILLISECONDS = 24 * 3600 * 1000
"""Grace for running calls on a connection past max_connection_age: 24 h, the longest configurable request."""


class BindError(Exception):
    """A port is not available; the text names it and what to do."""


class Listener:
    """A gRPC server and a metrics server, started together and stopped together.

    Args:
        settings: host, ports and limits.
        service: what is served.
        health: decides which calls are refused.
        on_device_fault: called when a handler has lost its device.
    """

    def __init__(
        self,
        settings: ServerSettings,
        service: Service,
        health: ServerHealth,
        on_device_fault: Callable[[DeviceFault], None],
    ) -> None:
        self.port = 0
        """The gRPC port; known after `start`."""
        self._settings = settings
        self._health = health
        self._metrics: MetricsServer | None = None
        reports_load = service.utilization() is not None
        load = LoadReport(lambda: service.utilization() or 0.0) if reports_load else None
        contexts = call_contexts(
            health, load, on_device_fault, is_public=service.is_public, guard=service.guard
        )
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(contexts, service.guard)],
            options=_options(settings, service),
        )
        service.register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._server)
        add_channelz_servicer(self._server)
        names = (*service.service_names, *service.open_service_names, *_STANDARD_NAMES)
        enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Binds both ports and answers.

        Raises:
            BindError: a port is taken or not allowed.
        """
        host, metrics_port = host_for_url(self._settings.host), self._settings.metrics_port
        if host == "[::]":
            try:
                with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                    probe.bind(("::1", 0))
            except OSError:
                # gRPC cannot listen on [::] of a machine without IPv6.
                host = "0.0.0.0"
        _check_free(host, self._settings.port)
        self.port = self._server.add_insecure_port(f"{host}:{self._settings.port}")
        if metrics_port:
            try:
                self._metrics = MetricsServer(host.strip("[]"), metrics_port, lambda: self._health.is_serving)
            except OSError as error:
                raise BindError(
                    f"cannot serve metrics on {host}:{metrics_port} ({error.strerror}): is another process "
                    "using it? Choose another port with KLEIN_METRICS_PORT, or 0 for none"
                ) from None
        await self._server.start()

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new calls, gives running ones the grace to finish, then cancels them."""
        await self._server.stop(grace_seconds)
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            metrics.close()


def _check_free(host: str, port: int) -> None:
    """Checks that a port can be bound, because gRPC reports it only in log lines of its own format."""
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


def _options(settings: ServerSettings, service: Service) -> list[tuple[str, int]]:
    options = [
        # Two processes on one port would share its calls at random, silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", service.request_bytes),
        ("grpc.max_send_message_length", service.response_bytes),
        ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
        # Without pings, a client whose machine vanished would keep its request alive for two hours.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if settings.max_connection_age_seconds:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age_seconds * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", _LONGEST_CALL_MILLISECONDS))
    return options

"""The ports of a server: gRPC with its standard services, and metrics over HTTP."""

from __future__ import annotations

import resource
import socket
from collections.abc import Callable

import grpc
from grpc_channelz.v1.channelz import add_channelz_servicer
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.reflection import enable_server_reflection

from klein_core.errors import DeviceFault
from klein_services.runtime.channels import HTTP2_FRAME_BYTES, KEEPALIVE_MILLISECONDS, host_for_url
from klein_services.runtime.health import ServerHealth
from klein_services.runtime.interceptors import CallInterceptor, call_contexts
from klein_services.runtime.metrics_server import MetricsServer
from klein_services.runtime.orca import LoadReport
from klein_services.runtime.settings import ServerSettings, SettingsError
from klein_services.runtime.stage import Service
from klein_services.runtime.tls import SERVER, CredentialStore, server_credentials

_STANDARD_NAMES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "grpc.channelz.v1.Channelz",
)
_HEADER_BYTES = 16 << 10
"""Most bytes of a call's metadata; gRPC's own limit, between 8 and 16 KiB, refuses calls at random."""
_HEALTH_MESSAGE_BYTES = 1 << 10
RESERVED_FILES = 256
"""Open files that connections leave for everything else."""
_LONGEST_CALL_MILLISECONDS = 24 * 3600 * 1000
"""Grace for running calls on a connection past max_connection_age: 24 h, the longest configurable request."""

_PENDING_REQUESTS = 20_000
"""Requests of all connections that wait for the event loop, before gRPC cancels some at random, and all from twice as
many on. A client that resets thousands of requests at once fills this list for everybody: gRPC's own limit, 1000, is
reached within a fraction of a second, and then calls of other clients end with a bare CANCELLED."""


class BindError(Exception):
    """A port is not available; the text names it and what to do."""


class Listener:
    """The gRPC server, the plaintext health server and the metrics server, started and stopped together.

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
        self._health_server: grpc.aio.Server | None = None
        self._credentials: CredentialStore | None = None
        self._name = service.name
        reports_load = service.utilization() is not None
        load = LoadReport(lambda: service.utilization() or 0.0) if reports_load else None
        contexts = call_contexts(
            health,
            load,
            on_device_fault,
            is_public=service.is_public,
            client_names=settings.allowed_client_names,
            guard=service.guard,
        )
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(contexts, service.guard, has_checksums=not service.is_public)],
            options=_options(settings, service.request_bytes, service.response_bytes),
        )
        service.register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._server)
        add_channelz_servicer(self._server)
        names = (*service.service_names, *service.open_service_names, *_STANDARD_NAMES)
        enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Binds the ports and answers.

        Raises:
            BindError: a port is taken or not allowed.
            SettingsError: the files of TLS cannot be used.
        """
        settings = self._settings
        host, metrics_port = host_for_url(settings.host), settings.metrics_port
        if host == "[::]":
            try:
                with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
                    probe.bind(("::1", 0))
            except OSError:
                # gRPC cannot listen on [::] of a machine without IPv6.
                host = "0.0.0.0"
        if problems := list(ServerSettings.problems(settings)):
            raise SettingsError("; ".join(problems))
        _check_free(host, settings.port, "KLEIN_PORT")
        if settings.tls_certificate:
            self._credentials = CredentialStore(
                settings.tls_files, self._name, SERVER, settings.tls_reload_seconds
            )
            self._credentials.start()
            self.port = self._server.add_secure_port(
                f"{host}:{settings.port}", server_credentials(self._credentials)
            )
        else:
            self.port = self._server.add_insecure_port(f"{host}:{settings.port}")
        if settings.health_port:
            _check_free(host, settings.health_port, "KLEIN_HEALTH_PORT")
            self._health_server = grpc.aio.server(
                options=_options(settings, _HEALTH_MESSAGE_BYTES, _HEALTH_MESSAGE_BYTES)
            )
            health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._health_server)
            self._health_server.add_insecure_port(f"{host}:{settings.health_port}")
            await self._health_server.start()
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
        if self._health_server is not None:
            # Last, so that probes are answered while calls finish.
            await self._health_server.stop(0)
        if self._credentials is not None:
            self._credentials.stop()
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            metrics.close()


def _check_free(host: str, port: int, variable: str) -> None:
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
            f"another address with KLEIN_HOST and {variable}"
        ) from None


def _options(settings: ServerSettings, request_bytes: int, response_bytes: int) -> list[tuple[str, int]]:
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = settings.max_connections
    if most_files != resource.RLIM_INFINITY:
        connections = max(1, min(connections, most_files - RESERVED_FILES))
    options = [
        # Two processes on one port would share its calls at random, silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", request_bytes),
        ("grpc.max_send_message_length", response_bytes),
        ("grpc.max_metadata_size", _HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", _HEADER_BYTES),
        ("grpc.max_concurrent_streams", settings.max_connection_streams),
        ("grpc.server.max_pending_requests", _PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING_REQUESTS),
        ("grpc.max_allowed_incoming_connections", connections),
        # Also the time until a client's first HTTP/2 settings; gRPC's default is two minutes.
        ("grpc.server_handshake_timeout_ms", int(settings.handshake_timeout_seconds * 1000)),
        ("grpc.http2.max_frame_size", HTTP2_FRAME_BYTES),
        # Without pings, a client whose machine vanished would keep its request alive for two hours.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MILLISECONDS // 2),
    ]
    if settings.max_connection_idle_seconds:
        options.append(("grpc.max_connection_idle_ms", int(settings.max_connection_idle_seconds * 1000)))
    if settings.max_connection_age_seconds:
        options.append(("grpc.max_connection_age_ms", int(settings.max_connection_age_seconds * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", _LONGEST_CALL_MILLISECONDS))
    return options

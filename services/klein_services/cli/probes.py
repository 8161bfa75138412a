"""Probes of a suite's processes: the standard gRPC health service, and HTTP for the gateway."""

from __future__ import annotations

import http.client
from collections.abc import Collection, Mapping
from enum import Enum
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICES: Mapping[str, str] = {
    "text-encoder": "klein_api.v1.TextEncoderService",
    "denoiser": "klein_api.v1.DenoiserService",
    "vae-decoder": "klein_api.v1.VaeDecoderService",
    "orchestrator": "klein_api.v1.ImageService",
}
"""Process → gRPC service whose health is asked for."""
GATEWAY = "gateway"
HEALTH_PATH = "/healthz"
"""Path of a metrics port, which speaks plaintext whatever the gateway does."""
PROBE_SECONDS = 0.5
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class StartupPhase(Enum):
    """Phase of a process between its start and its first request."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"


class Probes:
    """Health checks of several processes, given by name with their addresses; the gateway's is its metrics port."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._gateway = addresses.get(GATEWAY, "")
        self._channels = {
            process: grpc.insecure_channel(address, options=_OPTIONS)
            for process, address in addresses.items()
            if process != GATEWAY
        }
        self._stubs = {
            process: health_pb2_grpc.HealthStub(channel) for process, channel in self._channels.items()
        }

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels.values():
            channel.close()

    def check(
        self, processes: Collection[str], *, timeout_seconds: float = PROBE_SECONDS
    ) -> dict[str, StartupPhase]:
        """Checks several processes at once; takes at most the timeout, half a second by default."""
        calls = {
            process: self._stubs[process].Check.future(
                health_pb2.HealthCheckRequest(service=SERVICES[process]), timeout=timeout_seconds
            )
            for process in processes
            if process != GATEWAY
        }
        phases = {}
        if GATEWAY in processes:
            phases[GATEWAY] = _gateway_phase(self._gateway, timeout_seconds)
        for process, call in calls.items():
            try:
                is_serving = call.result().status == health_pb2.HealthCheckResponse.SERVING
                phases[process] = StartupPhase.READY if is_serving else StartupPhase.LOADING
            except grpc.RpcError as error:
                # NOT_FOUND: the process listens but has not registered its service yet.
                listens = error.code() is grpc.StatusCode.NOT_FOUND
                phases[process] = StartupPhase.LOADING if listens else StartupPhase.STARTING
        return phases


def _gateway_phase(address: str, timeout_seconds: float) -> StartupPhase:
    connection = http.client.HTTPConnection(address, timeout=timeout_seconds)
    try:
        connection.request("GET", HEALTH_PATH)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return StartupPhase.STARTING
    finally:
        connection.close()
    return StartupPhase.READY if status == 200 else StartupPhase.LOADING

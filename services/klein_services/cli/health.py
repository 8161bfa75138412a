"""Whether the stages of a suite serve, asked through the standard health service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
PROBE_SECONDS = 0.5
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class Readiness(Enum):
    """How far a stage is."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"


class Probes:
    """Health checks of several stages."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._channels = {
            stage: grpc.insecure_channel(address, options=_OPTIONS) for stage, address in addresses.items()
        }
        self._stubs = {
            stage: health_pb2_grpc.HealthStub(channel) for stage, channel in self._channels.items()
        }

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels.values():
            channel.close()

    def check(self, stages: Iterable[str]) -> dict[str, Readiness]:
        """Asks several stages at once; takes at most half a second."""
        calls = {
            stage: self._stubs[stage].Check.future(
                health_pb2.HealthCheckRequest(service=SERVICES[stage]), timeout=PROBE_SECONDS
            )
            for stage in stages
        }
        return {stage: _readiness(call) for stage, call in calls.items()}


def _readiness(call: grpc.Future[health_pb2.HealthCheckResponse]) -> Readiness:
    try:
        answer = call.result()
    except grpc.RpcError as error:
        # NOT_FOUND: it listens and has not said yet what it serves.
        listens = error.code() is grpc.StatusCode.NOT_FOUND
        return Readiness.LOADING if listens else Readiness.STARTING
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Readiness.READY if serving else Readiness.LOADING

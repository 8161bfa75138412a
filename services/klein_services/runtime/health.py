"""Whether a server takes work, for its handlers, its probes and its metrics alike."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health

from klein_services.runtime import metrics
from klein_services.runtime.errors import StageUnavailable


class State(Enum):
    """Where a server is in its life; the value is what callers are told."""

    LOADING = "the model is loading; retry in a while"
    SERVING = ""
    DRAINING = "the stage drains; another replica can do it"
    STOPPING = "the stage is stopping; another replica can do it"


class Readiness:
    """A server's state and the standard health service that shows it.

    Args:
        stage: label of `klein_serving`.
        service_names: full names whose health is SERVING only while the server is. The empty name is
            liveness and always SERVING.
    """

    def __init__(self, stage: str, service_names: Sequence[str]) -> None:
        self.stage = stage
        self.service_names = tuple(service_names)
        self.state = State.LOADING
        self.servicer = health.HealthServicer()

    async def enter(self, state: State) -> None:
        """Goes to a state and tells whoever watches."""
        self.state = state
        serving = state is State.SERVING
        kind = health_pb2.HealthCheckResponse
        for name in self.service_names:
            await self.servicer.set(name, kind.SERVING if serving else kind.NOT_SERVING)
        metrics.SERVING.labels(self.stage).set(serving)

    def require(self, service_name: str) -> None:
        """Checks that a service takes calls now. A draining one still does: callers learn of it only later.

        Raises:
            StageUnavailable: it does not.
        """
        if service_name in self.service_names and self.state in (State.LOADING, State.STOPPING):
            raise StageUnavailable(self.state.value)

"""State of a server, as its handlers, its health service and its metrics port report it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health

from klein_services.runtime import metrics
from klein_services.runtime.errors import StageUnavailable


class State(Enum):
    """Phase of a server's life; the value is the reason that refused clients get."""

    LOADING = "the model is loading; retry in a while"
    SERVING = ""
    DRAINING = "the stage drains; another replica can do it"
    STOPPING = "the stage is stopping; another replica can do it"
    HUNG = "the stage's device hangs; another replica can do it"


class ServerHealth:
    """A server's state, and the standard health service that publishes it.

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

    @property
    def is_serving(self) -> bool:
        """Whether the server wants new calls; may be read on any thread."""
        return self.state is State.SERVING

    async def set_state(self, state: State) -> None:
        """Changes the state and publishes it to the clients that watch it."""
        self.state = state
        kind = health_pb2.HealthCheckResponse
        for name in self.service_names:
            await self.servicer.set(name, kind.SERVING if self.is_serving else kind.NOT_SERVING)
        metrics.SERVING.labels(self.stage).set(self.is_serving)

    def check_serving(self, service_name: str) -> None:
        """Checks that a service takes calls now. A draining one does: clients notice the drain only later.

        Raises:
            StageUnavailable: it does not.
        """
        if service_name in self.service_names and self.state in (State.LOADING, State.STOPPING, State.HUNG):
            raise StageUnavailable(self.state.value)

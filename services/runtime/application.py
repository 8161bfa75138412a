"""What a server serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc

from services.runtime.channels import STAGE_MESSAGE_BYTES


class Application(Protocol):
    """A stage or the orchestrator, as the server sees it. Implementations inherit, for the defaults below."""

    name: str
    """Label of metrics and traces: text-encoder, denoiser, vae-decoder or orchestrator."""
    service_names: tuple[str, ...]
    """Full names of the services that take calls only while the application is ready."""
    open_service_names: tuple[str, ...] = ()
    """Full names of further services, which answer in every state; for reflection and metrics."""
    operations: Sequence[str] = ()
    """What `Worker.run` is called with, so that its metrics exist from the start."""

    request_bytes: int = STAGE_MESSAGE_BYTES
    """Largest message that the server takes."""
    response_bytes: int = STAGE_MESSAGE_BYTES
    """Largest message that the server sends."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the services to a server that has not started yet."""

    async def load(self) -> None:
        """Makes ready to serve: loads and warms up. Must not compute on the event loop.

        May be cancelled. Raises CheckpointError or SettingsError with one clear sentence when it cannot.
        """

    async def drain(self) -> None:
        """Learns that no more calls will come soon; returns at once."""

    async def close(self) -> None:
        """Frees what it holds; the last call, also after a failed or cancelled load."""

    def utilization(self) -> float | None:
        """Returns outstanding work over capacity for balancing by load; `None` reports nothing."""
        return None

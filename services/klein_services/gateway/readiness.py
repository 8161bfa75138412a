"""Readiness of the gateway: whether its orchestrator serves and the gateway does not drain."""

from __future__ import annotations

import asyncio
import logging

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_services.gateway import metrics

SERVICE = "klein_api.v1.ImageService"
CHECK_SECONDS = 1.0
"""Time between two checks, and the bound of one."""
_log = logging.getLogger("klein.gateway")


class Readiness:
    """Follows the health of the orchestrator behind a channel.

    Args:
        channel: to the orchestrator; closed by its owner.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._health = health_pb2_grpc.HealthStub(channel)
        self._serves = False
        self._drains = False
        self._task: asyncio.Task[None] | None = None
        metrics.READY.set(0)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are wanted; may be read on any thread."""
        return self._serves and not self._drains

    @property
    def reason(self) -> str:
        """Reason for which the gateway is not ready; empty when it is."""
        if self._drains:
            return "the gateway drains"
        return "" if self._serves else "the orchestrator does not serve"

    def start(self) -> None:
        """Starts to follow the orchestrator."""
        self._task = asyncio.create_task(self._follow(), name="readiness")

    def drain(self) -> None:
        """Makes the gateway not ready for the rest of its life."""
        self._drains = True
        metrics.READY.set(0)

    async def close(self) -> None:
        """Stops to follow the orchestrator."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            serves = await self._check()
            if serves is not self._serves:
                self._serves = serves
                metrics.READY.set(self.is_ready)
                _log.info("the orchestrator serves" if serves else "the orchestrator does not serve")
            await asyncio.sleep(CHECK_SECONDS)

    async def _check(self) -> bool:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        try:
            answer = await self._health.Check(request, timeout=CHECK_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

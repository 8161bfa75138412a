"""Gateway: everything that its handlers share, made once and closed with the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
from starlette.requests import Request

from klein_services.gateway.bodies import BodyReader
from klein_services.gateway.readiness import Readiness
from klein_services.gateway.settings import GatewaySettings
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES, open_channel


@dataclass(frozen=True)
class Gateway:
    """Shared parts of all APIs; `gateway_of` returns it to a handler."""

    settings: GatewaySettings
    bodies: BodyReader
    readiness: Readiness
    channel: grpc.aio.Channel
    """Connection to the orchestrator."""

    def url(self, request: Request, path: str) -> str:
        """Returns the absolute URL of a path of this gateway, as the request's client reaches it."""
        base = self.settings.public_url.rstrip("/") or f"{request.url.scheme}://{request.url.netloc}"
        return base + path


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """Opens the shared parts for the duration of the block.

    Raises:
        PemError: the files of TLS cannot be used.
    """
    async with AsyncExitStack() as stack:
        files = settings.target_tls_files
        channel = open_channel(
            settings.target,
            message_bytes=IMAGE_MESSAGE_BYTES,
            credentials=files.read() if files.are_set else None,
            server_name=settings.target_tls_name,
        )
        await stack.enter_async_context(channel)
        readiness = Readiness(channel)
        readiness.start()
        stack.push_async_callback(readiness.close)
        yield Gateway(settings, BodyReader(settings), readiness, channel)


def gateway_of(request: Request) -> Gateway:
    """Returns the gateway that a request is for."""
    gateway: Gateway = request.app.state.gateway
    return gateway

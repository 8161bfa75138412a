"""A content policy that tests command: it decides, hangs, fails, answers garbage or dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from klein_api.v1 import content_policy_service_pb2 as pb

SERVICE = "klein_api.v1.ContentPolicyService"


def decision(verdict: int, reason_code: str = "", reason: str = "") -> pb.ContentDecision:
    return pb.ContentDecision(verdict=verdict, reason_code=reason_code, reason=reason)  # type: ignore[arg-type]


ALLOW = decision(pb.CONTENT_VERDICT_ALLOW)
DENY = decision(pb.CONTENT_VERDICT_DENY, "DENIED_WORD", "it names a word that is not allowed here")


@dataclass
class FakeContentPolicy:
    """Answers with `request_decision` and `image_decision`; the other fields change how."""

    request_decision: pb.ContentDecision = field(default_factory=lambda: ALLOW)
    image_decision: pb.ContentDecision = field(default_factory=lambda: ALLOW)
    denied_index: int | None = None
    """Index of the only image that is denied."""
    garbage: bytes | None = None
    """Answers in place of a message."""
    code: grpc.StatusCode | None = None
    """Ends calls with it."""
    unavailable_count: int = 0
    """Calls that end with UNAVAILABLE before one is answered."""
    hangs: bool = False
    requests: list[pb.CheckRequestRequest] = field(default_factory=list)
    images: list[pb.CheckImageRequest] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)
    """Connections that calls came over."""
    cancelled: int = 0
    target: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeContentPolicy]:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        handlers = {
            "CheckRequest": grpc.unary_unary_rpc_method_handler(self._check_request),
            "CheckImage": grpc.unary_unary_rpc_method_handler(self._check_image),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(None)

    async def _check_request(self, data: bytes, context) -> bytes:
        self.requests.append(pb.CheckRequestRequest.FromString(data))
        self.peers.add(context.peer())
        return await self._answer(pb.CheckRequestResponse(decision=self.request_decision), context)

    async def _check_image(self, data: bytes, context) -> bytes:
        image = pb.CheckImageRequest.FromString(data)
        self.images.append(image)
        denies = self.denied_index is not None and image.index == self.denied_index
        return await self._answer(
            pb.CheckImageResponse(decision=DENY if denies else self.image_decision), context
        )

    async def _answer(self, response, context) -> bytes:
        try:
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.unavailable_count:
            self.unavailable_count -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")
        if self.code is not None:
            await context.abort(self.code, "as the test wants it")
        return response.SerializeToString() if self.garbage is None else self.garbage

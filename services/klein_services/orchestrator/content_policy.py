"""Client of the operator's content policy, which decides about requests and images."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from klein_api.v1 import content_policy_service_pb2 as pb
from klein_api.v1.image_service_pb2 import GeneratedImage
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.stage_channels import Channels
from klein_services.orchestrator.stage_client import Deadline
from klein_services.runtime import tracing
from klein_services.runtime.caller import caller
from klein_services.runtime.errors import ContentDenied, ContentPolicyFailed, DeadlinePassed
from klein_services.runtime.grpc_quirks import is_cancelled_by_peer
from klein_services.runtime.logs import request_id, request_metadata
from klein_services.runtime.metrics import CONTENT_POLICY_DECISIONS, CONTENT_POLICY_SECONDS
from klein_services.runtime.protowire import enclosed

REQUEST: Final = "request"
IMAGE: Final = "image"
POINTS: Final = (REQUEST, IMAGE)
"""Points of a request's life at which the policy decides."""
_METHODS: Final = {
    REQUEST: "/klein_api.v1.ContentPolicyService/CheckRequest",
    IMAGE: "/klein_api.v1.ContentPolicyService/CheckImage",
}
_RESPONSES: Final[Mapping[str, type[pb.CheckRequestResponse] | type[pb.CheckImageResponse]]] = {
    REQUEST: pb.CheckRequestResponse,
    IMAGE: pb.CheckImageResponse,
}
_RESPONSE_BYTES = 64 << 10
_IMAGE_BYTES = 65 << 20
"""Most bytes of a message with an image; an image file has at most 64 MiB."""
_log = logging.getLogger("klein.content_policy")


class _Failed(Exception):
    """A check that ended without a decision; the text is for the log."""


@dataclass(frozen=True)
class PolicyOptions:
    """Use of a content policy."""

    timeout_seconds: float = 5.0
    """Longest time that a decision may take."""
    fails_open: bool = False
    """Whether a check without a decision allows; else the request fails."""
    points: Sequence[str] = POINTS
    sends_files: bool = True
    """Whether the policy gets the image files of a request, or only their digests."""


def channel_options(request_bytes: int) -> Sequence[tuple[str, int]]:
    """Returns the options of the channel to the policy: bounds of its messages, and rare pings.

    Args:
        request_bytes: most bytes of a client's request, of which the policy gets all files.
    """
    # Room for the names, digests and sizes of the files.
    largest = max(request_bytes + (1 << 20), _IMAGE_BYTES)
    return (
        ("grpc.max_send_message_length", largest),
        ("grpc.max_receive_message_length", _RESPONSE_BYTES),
        # Stages allow frequent pings; gRPC's servers by default end connections that ping so often.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
    )


class ContentPolicy:
    """The operator's content policy service.

    Args:
        target: gRPC target of a ContentPolicyService.
        channels: opens the channel to it, with `channel_options`.
        options: how it is used.
    """

    def __init__(self, target: str, channels: Channels, options: PolicyOptions) -> None:
        self._target = target
        self._channels = channels
        self._options = options
        for point in options.points:
            CONTENT_POLICY_SECONDS.labels(point)
            for decision in ("allow", "deny", "error"):
                CONTENT_POLICY_DECISIONS.labels(point, decision)

    @property
    def checks_images(self) -> bool:
        return IMAGE in self._options.points

    async def check_request(self, request: ImageRequest, deadline: Deadline) -> None:
        """Returns when the policy allows the request.

        Raises:
            ContentDenied: it does not.
            ContentPolicyFailed: there is no decision, and the policy does not fail open.
            DeadlinePassed: the request's deadline passed before the decision.
        """
        if REQUEST not in self._options.points:
            return
        message = pb.CheckRequestRequest(
            request_id=request_id.get(),
            caller=caller.get().name,
            model=request.route.name,
            flow=request.flow,
            prompt=request.params.prompt,
            negative_prompt=request.params.negative_prompt,
        )
        if request.input_images:
            # Files have up to many megabytes, and hashing and copying them must not hold up the event loop.
            data = await asyncio.to_thread(self._with_files, message, request)
        else:
            data = message.SerializeToString()
        await self._check(REQUEST, data, deadline)

    async def check_image(
        self,
        request: ImageRequest,
        description: GeneratedImage,
        chunks: Sequence[memoryview],
        deadline: Deadline,
    ) -> None:
        """Returns when the policy allows an image to be sent.

        Raises:
            ContentDenied, ContentPolicyFailed, DeadlinePassed: as `check_request`.
        """
        if not self.checks_images:
            return
        message = pb.CheckImageRequest(
            request_id=request_id.get(),
            caller=caller.get().name,
            model=request.route.name,
            index=description.index,
            format=description.format,
            width_px=description.width_px,
            height_px=description.height_px,
        )
        parts = [message.SerializeToString(), *enclosed(pb.CheckImageRequest.DATA_FIELD_NUMBER, chunks)]
        await self._check(IMAGE, b"".join(parts), deadline)

    async def close(self) -> None:
        await self._channels.close()

    def _with_files(self, message: pb.CheckRequestRequest, request: ImageRequest) -> bytes:
        """Returns the serialized message with the request's image files."""
        for image in request.input_images:
            message.input_images.add(
                field=image.field,
                sha256=image.sha256,
                size_bytes=len(image.data),
                data=image.data if self._options.sends_files else None,
            )
        return message.SerializeToString()

    async def _check(self, point: str, message: bytes, deadline: Deadline) -> None:
        """Sends a serialized message and obeys the decision."""
        begin = time.perf_counter()
        try:
            decision = await self._decision(point, message, deadline)
        except _Failed as failure:
            CONTENT_POLICY_DECISIONS.labels(point, "error").inc()
            if not deadline.remaining_seconds():
                raise DeadlinePassed("the deadline passed before the content policy decided") from None
            _log.warning(
                "the content policy at %s gave no decision about %s; it is %s: %s",
                self._target,
                "a request" if point == REQUEST else "an image",
                "allowed" if self._options.fails_open else "refused",
                failure,
            )
            if not self._options.fails_open:
                raise ContentPolicyFailed from None
            return
        CONTENT_POLICY_SECONDS.labels(point).observe(time.perf_counter() - begin)
        if decision.verdict == pb.CONTENT_VERDICT_ALLOW:
            CONTENT_POLICY_DECISIONS.labels(point, "allow").inc()
            return
        CONTENT_POLICY_DECISIONS.labels(point, "deny").inc()
        _log.info("the content policy denies", extra={"point": point, "reason_code": decision.reason_code})
        raise ContentDenied(point, decision.reason_code, decision.reason)

    async def _decision(self, point: str, message: bytes, deadline: Deadline) -> pb.ContentDecision:
        """Returns the policy's decision.

        Raises:
            _Failed: there is none that can be used.
        """
        channel = self._channels.to(self._target)
        multicallable: Callable[..., Any] = channel.unary_unary(_METHODS[point])
        timeout = min(self._options.timeout_seconds, deadline.remaining_seconds())
        span, code = tracing.client_span(_METHODS[point], self._target), grpc.StatusCode.CANCELLED
        metadata = dict(request_metadata()) | (dict(span.headers()) if span else {})
        call = multicallable(message, timeout=timeout, metadata=tuple(metadata.items()))
        self._channels.called(channel, call)
        try:
            data = await call
            code = grpc.StatusCode.OK
            response = _RESPONSES[point].FromString(data)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            raise _Failed(f"{code.name}, {error.details()}") from None
        except asyncio.CancelledError:
            if is_cancelled_by_peer(call):
                raise _Failed("CANCELLED by the policy") from None
            raise
        except DecodeError:
            raise _Failed("the answer cannot be read") from None
        finally:
            call.cancel()
            tracing.end_client_span(span, code)
        verdict = response.decision.verdict
        if verdict not in (pb.CONTENT_VERDICT_ALLOW, pb.CONTENT_VERDICT_DENY):
            raise _Failed(f"the answer has the verdict {verdict}")
        return response.decision

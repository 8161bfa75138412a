"""Reader of client streams whose first part is a spec and whose other parts carry the data.

Every streamed request of klein_api is a message with a oneof `part`: the spec first and once, then frames or
chunks. A handler pulls the parts in order, so it can admit the request between the spec and the data:

    async with read_parts(request_iterator, timeout_seconds=60) as parts:
        spec = (await parts.spec_part()).spec
        with limit.slot():
            async for part in parts:
                ...
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from klein_core.errors import InvalidInput
from klein_services.runtime.errors import ReceiveTimeout
from klein_services.runtime.grpc_quirks import discard_unread

SPEC = "spec"
"""Arm of the oneof `part` that the first part must set."""


class StreamPart(Protocol):
    """A message with a oneof `part`, or a `FrameMessage` that stands for one."""

    def WhichOneof(self, oneof_group: Any, /) -> Any:
        """Returns the name of the arm that is set, or `None`."""

    @property
    def DESCRIPTOR(self) -> Any:
        """The message's protobuf descriptor."""


_Part = TypeVar("_Part", bound=StreamPart)


class RequestParts(Generic[_Part]):
    """The parts of one request in the order in which the client sends them.

    Iterating yields the data parts until the client closes its side. Every part read raises:

    - InvalidInput: the order is wrong, or a part is empty.
    - ReceiveTimeout: the stream is not complete in time.
    """

    def __init__(self, messages: AsyncIterator[_Part], timeout_seconds: float) -> None:
        self._messages = aiter(messages)
        self._timeout_seconds = timeout_seconds
        # One limit for the whole stream, not for each part: a trickle must not hold a slot for ever.
        self._ends_at = asyncio.get_running_loop().time() + timeout_seconds
        self.is_open = True
        """Whether the client may still be sending."""

    async def spec_part(self) -> _Part:
        """Returns the first part of the stream, whose `spec` is set."""
        part = await self._next()
        if part is None or part.WhichOneof("part") != SPEC:
            raise InvalidInput.of(SPEC, "is missing; the first part of the request must be the spec")
        return part

    def __aiter__(self) -> AsyncIterator[_Part]:
        return self

    async def __anext__(self) -> _Part:
        part = await self._next()
        if part is None:
            raise StopAsyncIteration
        arm = part.WhichOneof("part")
        if arm == SPEC:
            raise InvalidInput.of(SPEC, "comes twice; only the first part may be a spec")
        if arm is None:
            oneof = part.DESCRIPTOR.oneofs_by_name["part"]
            arms = ", ".join(field.name for field in oneof.fields)
            raise InvalidInput.of("part", f"is empty; each part must set one of {arms}")
        return part

    async def _next(self) -> _Part | None:
        """Returns the next part, or `None` once the client has closed its side."""
        try:
            async with asyncio.timeout_at(self._ends_at):
                return await anext(self._messages)
        except StopAsyncIteration:
            self.is_open = False
            return None
        except TimeoutError:
            self.is_open = False
            raise ReceiveTimeout(self._timeout_seconds) from None

    async def discard(self) -> None:
        """Discards what the client is sending, so that it can read the status of a refused request."""
        if self.is_open:
            self.is_open = False
            await discard_unread(self._messages)


@asynccontextmanager
async def read_parts(
    messages: AsyncIterator[_Part], *, timeout_seconds: float
) -> AsyncIterator[RequestParts[_Part]]:
    """Opens a request's stream; when the block raises, discards what the client still sends.

    Args:
        messages: the `request_iterator` of a handler.
        timeout_seconds: time for the whole stream, from now until the client closes its side. Only reading
            parts is bounded by it; what the block does with them is not.
    """
    parts = RequestParts(messages, timeout_seconds)
    try:
        yield parts
    except Exception:
        await parts.discard()
        raise

"""Queue of a tensor's frames between two stages, and the metrics of such a transfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from klein_services.runtime.metrics import HOP_BYTES, HOP_SECONDS

_FRAMES_AT_ONCE = 2
"""Frames that wait between a reader and a writer; a full queue stops the reading, which slows the sender down."""


class FrameQueue:
    """One tensor between a task that reads its frames and a task that writes them; never holds all of it."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(_FRAMES_AT_ONCE)
        self._abandoned = False
        self.finished = False
        """Whether the last frame has been put."""

    async def put(self, frame: bytes) -> None:
        """Adds a frame, once there is room for it."""
        if not self._abandoned:
            await self._frames.put(frame)

    async def finish(self) -> None:
        """Ends the tensor."""
        self.finished = True
        await self._frames.put(None)

    def abandon(self) -> None:
        """Drops what waits and what still comes, so that the reader never waits for a writer that has failed."""
        self._abandoned = True
        while not self._frames.empty():
            self._frames.get_nowait()

    async def frames(self) -> AsyncIterator[bytes]:
        """Yields the frames in order until the tensor ends."""
        while (frame := await self._frames.get()) is not None:
            yield frame


class TransferMetrics:
    """Bytes and duration of one tensor or image between two processes."""

    def __init__(self, source: str, destination: str) -> None:
        self._labels = (source, destination)
        self._byte_count = 0
        self._begin_seconds = 0.0

    def add(self, message: bytes) -> None:
        """Counts a message that has been passed on."""
        if not self._byte_count:
            self._begin_seconds = time.perf_counter()
        self._byte_count += len(message)

    def finish(self) -> None:
        """Reports the transfer, once, when all of it has been passed on."""
        if self._byte_count:
            HOP_BYTES.labels(*self._labels).inc(self._byte_count)
            HOP_SECONDS.labels(*self._labels).observe(time.perf_counter() - self._begin_seconds)

"""Timings of one request: durations of its stages' operations and of the transfers between processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from klein_api.v1.image_service_pb2 import StageTiming
from klein_services.runtime import semantic_conventions as names
from klein_services.runtime import tracing
from klein_services.runtime.metrics import HOP_BYTES, HOP_SECONDS, STAGE_CALL_SECONDS, STAGE_CALLS, exemplar
from klein_services.runtime.stage import duration
from klein_services.runtime.tracing import Attributes

_ORDER = tuple(operation for _, operation in STAGE_CALLS)
"""Operations in the order of a request's life."""


class StageSummary(Protocol):
    """The fields that every stage's summary has."""

    @property
    def queue_duration(self) -> Duration: ...
    @property
    def compute_duration(self) -> Duration: ...


@dataclass
class OperationTiming:
    """All calls of one operation together, in seconds."""

    stage: str
    operation: str
    call_count: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    call_seconds: float = 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Measures one call, including one that fails."""
        begin = time.perf_counter()
        self.call_count += 1
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self.call_seconds += seconds
            STAGE_CALL_SECONDS.labels(self.stage, self.operation).observe(seconds, exemplar())

    def report(self, summary: StageSummary) -> float:
        """Adds the durations that the stage measured; returns the seconds that it computed."""
        compute_seconds = seconds_of(summary.compute_duration)
        self.queue_seconds += seconds_of(summary.queue_duration)
        self.compute_seconds += compute_seconds
        return compute_seconds

    def message(self) -> StageTiming:
        return StageTiming(
            stage=self.stage,
            operation=self.operation,
            call_count=self.call_count,
            queue_duration=duration(self.queue_seconds),
            compute_duration=duration(self.compute_seconds),
            call_duration=duration(self.call_seconds),
        )


class Timings:
    """One request's operations in the order of its life; one without calls was answered from the cache."""

    def __init__(self) -> None:
        self._operations: dict[str, OperationTiming] = {}

    def of(self, stage: str, operation: str) -> OperationTiming:
        return self._operations.setdefault(operation, OperationTiming(stage, operation))

    def __iter__(self) -> Iterator[OperationTiming]:
        return iter(sorted(self._operations.values(), key=lambda timing: _ORDER.index(timing.operation)))

    def messages(self) -> list[StageTiming]:
        return [timing.message() for timing in self]


class TransferMetrics:
    """Bytes, duration and span of one tensor or image between two processes."""

    def __init__(self, source: str, destination: str) -> None:
        self._labels = (source, destination)
        self._byte_count = 0
        self._begin_seconds = 0.0

    def add(self, message: bytes) -> None:
        """Counts a message that has been passed on."""
        if not self._byte_count:
            self._begin_seconds = time.monotonic()
        self._byte_count += len(message)

    def finish(self) -> None:
        """Reports the transfer, once, when all of it has been passed on."""
        if self._byte_count:
            end_seconds = time.monotonic()
            HOP_BYTES.labels(*self._labels).inc(self._byte_count)
            HOP_SECONDS.labels(*self._labels).observe(end_seconds - self._begin_seconds, exemplar())
            if tracing.enabled():
                source, destination = self._labels
                attributes: Attributes = {
                    names.KLEIN_HOP_SOURCE: source,
                    names.KLEIN_HOP_DESTINATION: destination,
                    names.KLEIN_HOP_BYTES: self._byte_count,
                }
                name = names.hop_span_name(source, destination)
                tracing.record(name, self._begin_seconds, end_seconds, attributes)


def seconds_of(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9

"""The last requests of a gateway as timelines, for people: when each waited, was encoded, denoised and decoded."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

from klein_client import Event, Image, Step, Summary

MAXIMUM_REQUESTS = 200
"""Requests of all callers that are kept."""
SHOWN_REQUESTS = 16
_ENCODE = "encode-"
_DENOISE = "denoise"


@dataclass(frozen=True)
class Phase:
    """A part of a request's life, in seconds from its arrival."""

    phase: str
    """`encode`, `wait`, `denoise` or `decode`."""
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class RecentRequest:
    """A request that ended. It holds neither prompt nor pictures."""

    caller: str
    """Digest of the caller's token, or the caller's address."""
    ended_at: float
    """Reading of `time.monotonic()`."""
    request_id: str
    model: str
    flow: str
    outcome: str
    """`succeeded`, `failed` or `cancelled`."""
    total_seconds: float
    steps: tuple[float, ...]
    """Ends of steps."""
    phases: tuple[Phase, ...]


class RecentRequests:
    """The last `MAXIMUM_REQUESTS` requests of all callers."""

    def __init__(self) -> None:
        self._requests: deque[RecentRequest] = deque(maxlen=MAXIMUM_REQUESTS)

    def begin(self, caller: str, model: str) -> Recording:
        """Returns the recording of a request that has just arrived."""
        return Recording(self._requests, caller, model)

    def of(self, caller: str) -> list[RecentRequest]:
        """Returns a caller's last requests, newest first."""
        found = [each for each in reversed(self._requests) if each.caller == caller]
        return found[:SHOWN_REQUESTS]


@dataclass
class Recording:
    """Times of a request in progress; `end` adds it to the requests that are kept."""

    _kept: deque[RecentRequest]
    _caller: str
    _model: str
    _began: float = field(default_factory=time.monotonic)
    _steps: list[float] = field(default_factory=list)
    _last_image: float | None = None
    _summary: Summary | None = None

    def add(self, event: Event) -> None:
        """Notes the time of an event."""
        now = time.monotonic() - self._began
        match event:
            case Step():
                self._steps.append(now)
            case Image():
                self._last_image = now
            case Summary():
                self._summary = event

    def end(self, outcome: str) -> None:
        """Keeps the request."""
        now = time.monotonic()
        summary = self._summary
        request = RecentRequest(
            caller=self._caller,
            ended_at=now,
            request_id=summary.request_id if summary else "",
            model=summary.model if summary else self._model,
            flow=summary.flow if summary else "",
            outcome=outcome,
            total_seconds=now - self._began,
            steps=tuple(self._steps),
            phases=(),
        )
        self._kept.append(replace(request, phases=tuple(self._phases(request.total_seconds))))

    def _phases(self, total_seconds: float) -> list[Phase]:
        """Returns the phases: ends of steps and images as they were seen here, durations as the stages measured them.

        Prompt and references are encoded at the same time, so the longest of them counts.
        """
        timings = self._summary.timings if self._summary else ()
        encoded = max(
            (each.call_seconds for each in timings if each.operation.startswith(_ENCODE)), default=0.0
        )
        if not self._steps:
            return [Phase("wait", 0.0, total_seconds)]
        denoised = self._steps[-1]
        computed = next((each.compute_seconds for each in timings if each.operation == _DENOISE), None)
        # Without the denoiser's own measurement, the first step is seen only when it is done.
        begun = self._steps[0] if computed is None else denoised - computed
        encoded = min(encoded, denoised)
        begun = min(max(begun, encoded), denoised)
        phases = [
            Phase("encode", 0.0, encoded),
            Phase("wait", encoded, begun),
            Phase("denoise", begun, denoised),
            Phase("decode", denoised, max(denoised, self._last_image or denoised)),
        ]
        return [phase for phase in phases if phase.end_seconds > phase.start_seconds]

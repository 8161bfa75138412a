"""Spans of one request in the denoiser: its wait for the device and groups of its steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from klein_services.runtime import semantic_conventions as names
from klein_services.runtime import tracing

GROUPS = 8
"""Most groups of a request that is not paused: a trace shows how steps change over time, without a span for each."""
SHORTEST_GROUP = 4
"""Least steps in a group of a request that is not paused."""
GROUP_LIMIT = 64
"""Most groups of a request; the last one takes all further steps."""


@dataclass
class _Group:
    begin: float
    end: float
    first: int
    last: int
    requests: int
    tokens: int


class StepSpans:
    """Spans of a request, recorded as it advances on the engine's thread.

    A pause, in which the steps of more urgent requests run, ends a group, so that the trace has a gap there.

    Args:
        step_count: steps that are run.
        first_step: steps before them, which are not run here.
    """

    def __init__(self, step_count: int, first_step: int) -> None:
        self._parent: Any = tracing.current_parent()
        self._group_steps = max(SHORTEST_GROUP, -(-step_count // GROUPS))
        self._done = first_step
        self._count = 0
        self._group: _Group | None = None

    def started(self, queue_seconds: float) -> None:
        """Records the wait that has just ended."""
        now = time.monotonic()
        tracing.record(names.QUEUE, now - queue_seconds, now, parent=self._parent)

    def stepped(self, steps_done: int, seconds: float, requests: int, tokens: int) -> None:
        """Adds a step that has just ended.

        Args:
            steps_done: steps that all images of the request have done.
            seconds: time of the step.
            requests: how many shared it.
            tokens: how many it had.
        """
        end = time.monotonic()
        begin, group = end - seconds, self._group
        if group is not None and begin - group.end > seconds and self._count < GROUP_LIMIT:
            self.close()
            group = None
        if group is None:
            group = self._group = _Group(begin, end, self._done + 1, steps_done, requests, tokens)
            self._count += 1
        group.end, group.last = end, max(group.first, steps_done)
        group.requests, group.tokens = max(group.requests, requests), max(group.tokens, tokens)
        is_full = group.last - group.first + 1 >= self._group_steps and steps_done > self._done
        self._done = steps_done
        if is_full and self._count < GROUP_LIMIT:
            self.close()

    def close(self) -> None:
        """Records the group that is not complete."""
        group, self._group = self._group, None
        if group is not None:
            attributes = {
                names.KLEIN_FIRST_STEP: group.first,
                names.KLEIN_LAST_STEP: group.last,
                names.KLEIN_STEP_REQUESTS: group.requests,
                names.KLEIN_STEP_TOKENS: group.tokens,
            }
            tracing.record(names.DENOISE_STEPS, group.begin, group.end, attributes, self._parent)

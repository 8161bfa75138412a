"""SilentRequests: the bound on what requests hold that were announced and have sent nothing since. Torch-free."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from klein_services.denoiser.scheduled_request import ScheduledRequest

SHARE = 0.25
"""Share of the queue that silent requests may hold when others need it."""
GRACE_SECONDS = 1.0
"""Time that a request may be silent before it counts as doubtful: stages usually begin to send its tensors by then."""


class SilentRequests:
    """Rules for requests whose client has sent a spec and not a single frame of a tensor.

    An honest one is silent while another stage still computes its first tensor, which takes long only when that stage
    is busy. One that never sends anything looks the same. So silence alone costs nothing: only when silent requests
    hold more than `SHARE` of the queue, those above the share are dropped

    - for a request that needs the place, and only such as are silent for `GRACE_SECONDS`, or come from another
      connection that has more than the share for itself; which one is left to chance, because an order would either
      always hit the one whose tensors come next, or could be foreseen;
    - after `timeout_seconds`, the oldest first.

    Args:
        queue_limit: most requests that wait for their first step.
        timeout_seconds: time until a silent request above the share is dropped.
        choose: chooses one of several.
    """

    def __init__(
        self,
        queue_limit: int,
        timeout_seconds: float,
        choose: Callable[[Sequence[ScheduledRequest]], ScheduledRequest] = random.choice,
    ) -> None:
        self.count_limit = max(1, int(queue_limit * SHARE))
        """Silent requests that are never dropped."""
        self._timeout_seconds = timeout_seconds
        self._choose = choose

    def to_drop_for(
        self, request: ScheduledRequest, others: Iterable[ScheduledRequest], now: float
    ) -> ScheduledRequest | None:
        """Returns one of `others` that gives its place to `request`; `None` when none has to."""
        silent = [other for other in others if other.is_silent]
        if len(silent) <= self.count_limit:
            return None
        counts = Counter(other.connection for other in silent)
        droppable = [
            other
            for other in silent
            if is_doubtful(other, now)
            or (other.connection != request.connection and counts[other.connection] > self.count_limit)
        ]
        return self._choose(droppable) if droppable else None

    def overdue(self, requests: Iterable[ScheduledRequest], now: float) -> list[ScheduledRequest]:
        """Returns the requests that were silent for too long, while silent ones hold more than their share."""
        silent = sorted(
            (request for request in requests if request.is_silent), key=lambda request: request.sequence
        )
        above = silent[: max(0, len(silent) - self.count_limit)]
        return [request for request in above if now - request.admitted_at >= self._timeout_seconds]


def is_doubtful(request: ScheduledRequest, now: float) -> bool:
    """Returns whether a request is silent for so long that it may never send anything."""
    return request.is_silent and now - request.admitted_at >= GRACE_SECONDS

"""How long a request may still take."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadline:
    """A point in monotonic time that every stage call of a request shares."""

    at_seconds: float
    """Reading of `time.monotonic()` after which nobody waits for the answer."""

    @classmethod
    def after(cls, remaining_seconds: float | None, maximum_seconds: float) -> Deadline:
        """Makes the deadline of a caller that waits `remaining_seconds`; `None` is `maximum_seconds`."""
        wait = maximum_seconds if remaining_seconds is None else min(remaining_seconds, maximum_seconds)
        return cls(time.monotonic() + wait)

    def remaining_seconds(self) -> float:
        """Returns the time left, at least 0."""
        return max(0.0, self.at_seconds - time.monotonic())

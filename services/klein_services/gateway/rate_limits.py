"""Rate limits: a token bucket for each caller."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus

from klein_services.gateway.errors import ApiError

MAXIMUM_CALLERS = 100_000
"""Buckets that are kept; a caller beyond that begins with a full one."""


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimits:
    """Limits of each caller's requests; without a rate there is none, and nothing is kept.

    Args:
        per_minute: requests that a bucket regains in a minute; 0 turns the limits off.
        burst: requests that a full bucket holds.
    """

    def __init__(self, per_minute: float, burst: int) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def admit(self, caller: str) -> None:
        """Counts a request.

        Raises:
            ApiError: the caller's bucket is empty; the error has the time until it is not.
        """
        if not self._per_second:
            return
        now = time.monotonic()
        bucket = self._buckets.pop(caller, None) or _Bucket(self._burst, now)
        self._buckets[caller] = bucket
        if len(self._buckets) > MAXIMUM_CALLERS:
            self._buckets.popitem(last=False)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "rate_limit_exceeded",
                f"This key may make {self._per_second * 60:g} requests a minute.",
                retry_after_seconds=(1 - bucket.tokens) / self._per_second,
            )
        bucket.tokens -= 1

"""Retries: whether and when a failed request is sent again.

gRPC itself repeats calls that fail before an answer begins, by the policy in the service config. The client repeats, by
the same policy, a stream that breaks later, and waits as long as an overloaded server recommends. Both are safe because
each attempt of a request has the same idempotency key and the same seed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from klein_client.endpoint import service_config
from klein_client.errors import KleinError, Overloaded

_PUSHBACK = "grpc-retry-pushback-ms"
_JITTER = 0.2


@dataclass(frozen=True)
class RetryPolicy:
    """The policy of the service config."""

    attempt_count: int
    """Most attempts, the first one included."""
    initial_backoff_seconds: float
    maximum_backoff_seconds: float
    multiplier: float
    codes: frozenset[str]
    """Names of the statuses that are repeated."""


@cache
def committed_policy() -> RetryPolicy:
    """Returns the retry policy that klein_api has for its public service."""
    methods: list[dict[str, Any]] = json.loads(service_config())["methodConfig"]
    policy = next(
        method["retryPolicy"]
        for method in methods
        if {"service": "klein_api.v1.ImageService"} in method["name"]
    )
    return RetryPolicy(
        policy["maxAttempts"],
        float(policy["initialBackoff"].removesuffix("s")),
        float(policy["maxBackoff"].removesuffix("s")),
        policy["backoffMultiplier"],
        frozenset(policy["retryableStatusCodes"]),
    )


class Attempts:
    """Attempts of one request.

    Args:
        enabled: whether there may be more than one.
        deadline: of the request, in the time of `time.monotonic`.
    """

    def __init__(self, *, enabled: bool, deadline: float) -> None:
        self._enabled = enabled
        self._deadline = deadline
        self._broken_count = 0

    def remaining(self) -> float:
        """Returns the time until the deadline; 0 when it has passed."""
        return max(0.0, self._deadline - time.monotonic())

    def pause_before_next(
        self, failure: KleinError, trailers: Iterable[tuple[str, str | bytes]], *, has_begun: bool
    ) -> float | None:
        """Returns the time to wait before the next attempt; `None` when there is to be none.

        Args:
            failure: of the attempt before.
            trailers: metadata with which the attempt ended.
            has_begun: whether the answer had begun, after which gRPC repeats nothing itself.
        """
        if not self._enabled:
            return None
        pause: float | None = None
        if isinstance(failure, Overloaded):
            pause = failure.retry_after_seconds
        elif has_begun and failure.code.name in committed_policy().codes and not _is_final(trailers):
            pause = self._backoff()
        return pause if pause is not None and pause < self.remaining() else None

    def _backoff(self) -> float | None:
        policy = committed_policy()
        self._broken_count += 1
        if self._broken_count >= policy.attempt_count:
            return None
        backoff = policy.initial_backoff_seconds * policy.multiplier ** (self._broken_count - 1)
        return min(backoff, policy.maximum_backoff_seconds) * random.uniform(1 - _JITTER, 1 + _JITTER)


def _is_final(trailers: Iterable[tuple[str, str | bytes]]) -> bool:
    """Returns whether the server asks for no further attempt (gRFC A6, pushback)."""
    return any(key == _PUSHBACK and not str(value).isdecimal() for key, value in trailers)

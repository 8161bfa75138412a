"""Quotas of tenants: requests in flight, and megapixels a minute from a bucket that fills continuously.

A bucket holds the megapixels of one minute and is full at first. A request takes what it may need at most when it is
admitted, and gives back what it did not use when it ends. So a tenant gets at most two minutes' megapixels within any
minute, and one minute's on average.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from klein_services.orchestrator.tokens import Tenant
from klein_services.runtime.errors import QuotaExceeded
from klein_services.runtime.metrics import USAGE_IN_FLIGHT

IN_FLIGHT_RETRY_SECONDS = 1.0
"""Delay before a retry when a tenant's requests in flight are at their limit. The end of a request is not known."""
_MINUTE = 60.0
_ROUNDING_SECONDS = 0.001
"""Added to delays, so that the sums of floating point never refuse a client that waited as long as it was asked to."""


@dataclass
class _Account:
    """State of one tenant's quotas."""

    in_flight: int
    megapixels: float
    """Content of the bucket at `filled_at`."""
    filled_at: float


class Charge:
    """Megapixels that a request has taken from its tenant's bucket."""

    def __init__(self, taken: float, give_back: Callable[[float], None]) -> None:
        self._taken = taken
        self._give_back = give_back

    def settle(self, used: float) -> None:
        """Keeps what was used and gives the rest back; only the first call has an effect."""
        rest, self._taken = self._taken - used, 0.0
        if rest > 0:
            self._give_back(rest)


class Quotas:
    """Quotas of all tenants of this process; callers without a token have none.

    Args:
        clock: returns seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def place(self, tenant: Tenant) -> Iterator[None]:
        """Holds one of the tenant's places for requests in flight while the block runs.

        Raises:
            QuotaExceeded: all places are taken.
        """
        account = self._account(tenant)
        limit = tenant.requests_in_flight
        if limit is not None and account.in_flight >= limit:
            raise QuotaExceeded(
                "requests_in_flight",
                f"{account.in_flight} requests of this token are in flight; at most {limit} may be",
                IN_FLIGHT_RETRY_SECONDS,
            )
        account.in_flight += 1
        USAGE_IN_FLIGHT.labels(tenant.name).set(account.in_flight)
        try:
            yield
        finally:
            account.in_flight -= 1
            USAGE_IN_FLIGHT.labels(tenant.name).set(account.in_flight)

    def charge(self, tenant: Tenant, megapixels: float) -> Charge:
        """Takes megapixels from the tenant's bucket.

        Raises:
            QuotaExceeded: the bucket has fewer now, or can never have as many.
        """
        rate = tenant.megapixels_per_minute
        if rate is None:
            return Charge(0.0, lambda rest: None)
        asked = f"the request may take {megapixels:.3g} megapixels, input and output together"
        if megapixels > rate:
            raise QuotaExceeded(
                "megapixels_per_minute", f"{asked}; this token allows {rate:.3g} a minute", None
            )
        account = self._account(tenant)
        self._fill(account, rate)
        missing = megapixels - account.megapixels
        if missing > 0:
            raise QuotaExceeded(
                "megapixels_per_minute",
                f"{asked}; {account.megapixels:.3g} are left of the {rate:.3g} a minute that this token allows",
                missing * _MINUTE / rate + _ROUNDING_SECONDS,
            )
        account.megapixels -= megapixels

        def give_back(rest: float) -> None:
            account.megapixels += rest
            self._fill(account, rate)

        return Charge(megapixels, give_back)

    def forget_all_but(self, names: Collection[str]) -> None:
        """Drops the state of tenants that are no longer in the tokens file and have no requests in flight."""
        idle = [name for name, account in self._accounts.items() if not account.in_flight]
        for name in idle:
            if name not in names:
                del self._accounts[name]
                with suppress(KeyError):  # a tenant may never have had a request
                    USAGE_IN_FLIGHT.remove(name)

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            account = _Account(0, tenant.megapixels_per_minute or 0.0, self._clock())
            self._accounts[tenant.name] = account
        return account

    def _fill(self, account: _Account, rate: float) -> None:
        """Adds what has flown in since the last time; the bucket never holds more than one minute's megapixels."""
        now = self._clock()
        content = account.megapixels + (now - account.filled_at) * rate / _MINUTE
        account.megapixels, account.filled_at = min(content, rate), now

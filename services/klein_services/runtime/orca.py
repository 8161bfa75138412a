"""Load reports in trailers for gRPC's balancing policies (ORCA, xds.data.orca.v3.OrcaLoadReport)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

TRAILER_KEY = "endpoint-load-metrics-bin"
_WINDOW_SECONDS = 10.0
_LEAST_UTILIZATION = 0.01
# OrcaLoadReport.rps_fractional is field 6, .application_utilization field 9; 1 is the wire type of doubles.
_RPS_TAG = 6 << 3 | 1
_UTILIZATION_TAG = 9 << 3 | 1


class LoadReport:
    """Requests per second and utilization of one server.

    Args:
        utilization: returns outstanding work over capacity, from 0; may exceed 1.
    """

    def __init__(self, utilization: Callable[[], float]) -> None:
        self._utilization = utilization
        self._rate = 0.0
        self._counted_at = time.monotonic()

    def count(self) -> None:
        """Adds a call that has ended to the exponentially weighted rate."""
        now = time.monotonic()
        elapsed, self._counted_at = now - self._counted_at, now
        self._rate = self._rate * max(0.0, 1 - elapsed / _WINDOW_SECONDS) + 1 / _WINDOW_SECONDS

    def trailer(self) -> tuple[str, bytes]:
        """Returns the trailing metadata pair that clients' balancing policies read."""
        # Clients ignore a report whose utilization is 0, and the idlest replica would lose its weight.
        utilization = max(self._utilization(), _LEAST_UTILIZATION)
        report = struct.pack("<BdBd", _RPS_TAG, self._rate, _UTILIZATION_TAG, utilization)
        return TRAILER_KEY, report

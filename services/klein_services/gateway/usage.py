"""Usage: images, megapixels and cost of each caller since the gateway's start."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from klein_client import Summary
from klein_services.gateway import metrics
from klein_services.gateway.prices import PriceTable

MAXIMUM_CALLERS = 100_000
"""Callers whose totals are kept; the one that was quiet for longest gives way."""


@dataclass
class Totals:
    """Totals of one caller."""

    requests: int = 0
    images: int = 0
    input_megapixels: float = 0.0
    output_megapixels: float = 0.0
    cost: float = 0.0


class Usage:
    """Totals of all callers.

    Args:
        prices: of the images.
    """

    def __init__(self, prices: PriceTable) -> None:
        self.prices = prices
        self._totals: OrderedDict[str, Totals] = OrderedDict()

    def add(self, api: str, caller: str, summary: Summary, image_count: int) -> float | None:
        """Counts a request that succeeded.

        Args:
            api: name of the route group.
            caller: as `caller_of` returns it.
            summary: of the request.
            image_count: images that were delivered.

        Returns:
            Its cost; `None` without a price.
        """
        cost = self.prices.cost(summary.model, summary.input_megapixels, summary.output_megapixels)
        metrics.IMAGES.labels(api).inc(image_count)
        metrics.MEGAPIXELS.labels(api, "input").inc(summary.input_megapixels)
        metrics.MEGAPIXELS.labels(api, "output").inc(summary.output_megapixels)
        metrics.COST.labels(api).inc(cost or 0.0)
        totals = self._totals.pop(caller, None) or Totals()
        self._totals[caller] = totals
        if len(self._totals) > MAXIMUM_CALLERS:
            self._totals.popitem(last=False)
        totals.requests += 1
        totals.images += image_count
        totals.input_megapixels += summary.input_megapixels
        totals.output_megapixels += summary.output_megapixels
        totals.cost += cost or 0.0
        return cost

    def of(self, caller: str) -> Totals:
        """Returns the totals of a caller."""
        return self._totals.get(caller) or Totals()

"""Usage: prices of megapixels from a TOML file, and the totals of each caller since the gateway's start."""

from __future__ import annotations

import math
import tomllib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from klein_services.gateway import metrics

EVERY_MODEL = "default"
"""Table of the models that have none of their own."""
FILE_BYTES = 1 << 20
_FIELDS = ("first_output_megapixel", "output_megapixel", "input_megapixel")
MAXIMUM_CALLERS = 100_000
"""Callers whose totals are kept; the one that was quiet for longest gives way."""


class PriceError(Exception):
    """A price table cannot be used; the text names the place."""


@dataclass(frozen=True)
class Price:
    """Price of one model's images, in the table's currency."""

    first_output_megapixel: float = 0.0
    """Of the first megapixel of a request's images, also where they have less."""
    output_megapixel: float = 0.0
    """Of each further megapixel of them."""
    input_megapixel: float = 0.0
    """Of each megapixel of references and initial image."""

    def cost(self, input_megapixels: float, output_megapixels: float) -> float:
        """Returns the cost of a request."""
        if not output_megapixels:
            return 0.0
        more = max(0.0, output_megapixels - 1)
        cost = (
            self.first_output_megapixel
            + more * self.output_megapixel
            + input_megapixels * self.input_megapixel
        )
        return round(cost, 9)


@dataclass(frozen=True)
class PriceTable:
    """Prices of all models; without a file everything costs 0."""

    currency: str = ""
    prices: Mapping[str, Price] | None = None

    def cost(self, model: str, input_megapixels: float, output_megapixels: float) -> float | None:
        """Returns the cost of a request; `None` without a table, or without a price for the model."""
        if self.prices is None:
            return None
        price = self.prices.get(model) or self.prices.get(EVERY_MODEL)
        return None if price is None else price.cost(input_megapixels, output_megapixels)


def read_prices(path: str) -> PriceTable:
    """Reads a price table; an empty path is none.

    Raises:
        PriceError: the file cannot be read, or is no such table.
    """
    if not path:
        return PriceTable()
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise PriceError(f"{path} has more than {FILE_BYTES} bytes")
        table = tomllib.loads(data.decode())
    except OSError as error:
        raise PriceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PriceError(f"{path} is no TOML: {error}") from None
    if unknown := sorted(table.keys() - {"currency", "models"}):
        raise PriceError(f"{path}: {unknown[0]} is unknown; known are currency and models")
    currency, models = table.get("currency"), table.get("models")
    if not isinstance(currency, str) or not currency.isascii() or not 1 <= len(currency) <= 16:
        raise PriceError(f'{path}: currency must be a word, such as "USD"')
    if not isinstance(models, dict) or not models:
        raise PriceError(f"{path}: there must be a table [models.NAME], such as [models.{EVERY_MODEL}]")
    return PriceTable(
        currency, {name: _price(f"{path}: models.{name}", each) for name, each in models.items()}
    )


def _price(place: str, values: Any) -> Price:
    if not isinstance(values, dict) or not values:
        raise PriceError(f"{place} must be a table with {', '.join(_FIELDS)}")
    for name, value in values.items():
        if name not in _FIELDS:
            raise PriceError(f"{place}.{name} is unknown; known are {', '.join(_FIELDS)}")
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise PriceError(f"{place}.{name} is {value!r}; it must be a number of at least 0")
    return Price(**{name: float(value) for name, value in values.items()})


class Work(Protocol):
    """Megapixels of a request that succeeded; the summary of a call is one."""

    @property
    def model(self) -> str:
        """Returns the model that made the images."""

    @property
    def input_megapixels(self) -> float:
        """Returns the megapixels of references and initial image."""

    @property
    def output_megapixels(self) -> float:
        """Returns the megapixels of the images."""


@dataclass(frozen=True)
class JobWork:
    """Work of a job that has ended."""

    model: str
    input_megapixels: float
    output_megapixels: float


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

    def add(self, api: str, caller: str, work: Work, image_count: int) -> float | None:
        """Counts a request that succeeded.

        Args:
            api: name of the route group.
            caller: as `caller_of` returns it.
            work: of the request.
            image_count: images that were delivered.

        Returns:
            Its cost; `None` without a price.
        """
        cost = self.prices.cost(work.model, work.input_megapixels, work.output_megapixels)
        metrics.IMAGES.labels(api).inc(image_count)
        metrics.MEGAPIXELS.labels(api, "input").inc(work.input_megapixels)
        metrics.MEGAPIXELS.labels(api, "output").inc(work.output_megapixels)
        metrics.COST.labels(api).inc(cost or 0.0)
        totals = self._totals.pop(caller, None) or Totals()
        self._totals[caller] = totals
        if len(self._totals) > MAXIMUM_CALLERS:
            self._totals.popitem(last=False)
        totals.requests += 1
        totals.images += image_count
        totals.input_megapixels += work.input_megapixels
        totals.output_megapixels += work.output_megapixels
        totals.cost += cost or 0.0
        return cost

    def of(self, caller: str) -> Totals:
        """Returns the totals of a caller."""
        return self._totals.get(caller) or Totals()

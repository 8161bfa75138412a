"""Panel, Query and Board: parts of dashboards, and functions that write their PromQL."""

from __future__ import annotations

from dataclasses import dataclass

REQUESTS = "klein_request_duration_seconds"
IN = 'namespace=~"$namespace"'
"""The selector of every query."""
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel, and the legend of its series."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel of a dashboard."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[Query, ...]
    description: str
    is_number: bool = False
    """Whether the last value is shown in large digits instead of a graph."""
    needs: str = ""
    """Reason for which there may be no data."""


@dataclass(frozen=True)
class Board:
    """One dashboard; `uid` and file name never change, because links name them."""

    uid: str
    title: str
    description: str
    panels: tuple[Panel, ...]


def graph(title: str, unit: str, description: str, *queries: tuple[str, str], needs: str = "") -> Panel:
    """Returns a panel with lines over time."""
    return Panel(title, unit, tuple(Query(*each) for each in queries), description, needs=needs)


def number(title: str, unit: str, description: str, expression: str, legend: str = "") -> Panel:
    """Returns a panel with the last value in large digits."""
    return Panel(title, unit, (Query(expression, legend),), description, is_number=True)


def quantiles(metric: str, selector: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """Returns the queries of a histogram's median and 95th percentile."""
    legend = f"{{{{{by}}}}} " if by else ""
    labels = f"le, {by}" if by else "le"
    return tuple(
        (
            f"histogram_quantile({level}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}{RATE})))",
            f"{legend}{name}",
        )
        for level, name in ((0.5, "p50"), (0.95, "p95"))
    )


def rate(metric: str, by: str, selector: str = IN) -> tuple[str, str]:
    """Returns the query of a counter a second, and its legend."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return f"sum by ({by}) (rate({metric}{{{selector}}}{RATE}))", legend


def mean(metric: str, by: str, selector: str = IN) -> tuple[str, str]:
    """Returns the query of a histogram's mean, and its legend."""
    rates = (f"sum by ({by}) (rate({metric}_{part}{{{selector}}}{RATE}))" for part in ("sum", "count"))
    return " / ".join(rates), " ".join(f"{{{{{label}}}}}" for label in by.split(", "))

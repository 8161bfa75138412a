"""Scrapes of the suite's metrics pages, and what changed between two of one process."""

from __future__ import annotations

import http.client
import math
import re
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.error import HTTPError, URLError

from klein_services.runtime.channels import host_for_url

DEFAULT_TARGETS = tuple(f"127.0.0.1:{port}" for port in range(9464, 9468))
"""Metrics ports of the four processes of one machine."""
MAX_TARGETS = 256
TIMEOUT_SECONDS = 2.0
PAGE_BYTES = 8 << 20
"""Most bytes of a page."""
_TARGET = re.compile(
    r"(?:http://)?(?P<every>dns:///)?(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5})(?:/metrics/?)?"
)
_THREADS = 16
_START_TIME = "process_start_time_seconds"

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """The samples of one process at one time, or why there are none."""

    target: str
    at_seconds: float
    """Reading of `time.monotonic()`."""
    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)
    """Name → labels → value."""
    problem: str = ""

    def series(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yields the series of a metric that have the labels."""
        for key, value in self.samples.get(name, {}).items():
            found = dict(key)
            if labels.items() <= found.items():
                yield found, value

    def value(self, name: str, **labels: str) -> float | None:
        """Returns the sum over the series that have the labels; `None` when there are none."""
        values = [value for _, value in self.series(name, **labels)]
        return sum(values) if values else None


@dataclass(frozen=True)
class Change:
    """Increases of the counters of one process between two scrapes.

    A counter that is lower than before belongs to a process that was restarted: it counts from 0, as in Prometheus.
    """

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Time between the scrapes; 0 when one of them failed."""
        is_complete = self.before.samples and self.after.samples
        return self.after.at_seconds - self.before.at_seconds if is_complete else 0.0

    def increase(self, name: str, **labels: str) -> float | None:
        """Returns how much the series that have the labels grew; `None` when that is not known."""
        if not self.seconds or name not in self.after.samples:
            return None
        was = {} if self._was_restarted else self.before.samples.get(name, {})
        total = 0.0
        for key, value in self.after.samples[name].items():
            if labels.items() <= dict(key).items():
                earlier = was.get(key, 0.0)
                total += value - earlier if value >= earlier else value
        return total

    def rate(self, name: str, **labels: str) -> float | None:
        """Returns the increase per second."""
        grown = self.increase(name, **labels)
        return None if grown is None else grown / self.seconds

    def mean(self, name: str, **labels: str) -> float | None:
        """Returns the mean of a histogram's observations between the scrapes; `None` when there were none."""
        count, total = self.increase(f"{name}_count", **labels), self.increase(f"{name}_sum", **labels)
        return total / count if count and total is not None else None

    @property
    def _was_restarted(self) -> bool:
        return self.before.value(_START_TIME) != self.after.value(_START_TIME)


def quantile(changes: Sequence[Change], share: float, name: str, **labels: str) -> float | None:
    """Returns a quantile of histograms' observations between scrapes, interpolated within its bucket.

    Beyond the last bucket's bound it is that bound. `None` when there were no observations.
    """
    counts: dict[float, float] = {}
    for change in changes:
        for found, _ in change.after.series(f"{name}_bucket", **labels):
            grown = change.increase(f"{name}_bucket", **found)
            if grown is not None:
                bound = float(found["le"])
                counts[bound] = counts.get(bound, 0.0) + grown
    total = max(counts.values(), default=0.0)
    if not total:
        return None
    below, count_below = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= share * total:
            if math.isinf(bound):
                return below
            return below + (bound - below) * (share * total - count_below) / (count - count_below)
        below, count_below = bound, count
    return below


class TargetsError(Exception):
    """Targets of metrics pages cannot be used; the text is one sentence."""


class MalformedTarget(TargetsError):
    """A target is no address."""


def resolved_targets(targets: Sequence[str], source: str) -> list[str]:
    """Returns `HOST:PORT` for each process; `dns:///NAME:PORT` stands for all addresses that the name has now.

    Args:
        targets: addresses of metrics pages.
        source: the flag or setting that named them, for errors.

    Raises:
        TargetsError: a target is malformed, a name cannot be resolved, or there are too many.
    """
    found: list[str] = []
    for target in targets:
        host, port, every = _parsed_target(target, source)
        if every:
            try:
                addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                raise TargetsError(
                    f"{source} {target}: {host} cannot be resolved ({error.strerror})."
                ) from error
            found += [f"{host_for_url(str(address[0]))}:{port}" for *_, address in addresses]
        else:
            found.append(f"{host}:{port}")
    unique = list(dict.fromkeys(found))
    if len(unique) > MAX_TARGETS:
        raise TargetsError(f"There are {len(unique)} metrics pages; at most {MAX_TARGETS} can be shown.")
    return unique


def check_targets(targets: Sequence[str], source: str) -> None:
    """Raises MalformedTarget when a target is no address; names are not resolved."""
    for target in targets:
        _parsed_target(target, source)


def _parsed_target(target: str, source: str) -> tuple[str, int, bool]:
    """Returns host, port, and whether every address of the host is meant."""
    match = _TARGET.fullmatch(target.strip())
    if not match or not 0 < int(match["port"]) < 65536:
        raise MalformedTarget(f"{source} {target} is no address of a metrics page.")
    return match["host"], int(match["port"]), bool(match["every"])


def scrape_all(targets: Sequence[str]) -> list[Scrape]:
    """Reads all pages at once, each within `TIMEOUT_SECONDS` for every wait."""
    with ThreadPoolExecutor(min(_THREADS, len(targets))) as pool:
        return list(pool.map(scrape, targets))


def scrape(target: str) -> Scrape:
    """Reads one page; a failure is the scrape's problem."""
    from prometheus_client.parser import text_string_to_metric_families

    at_seconds = time.monotonic()
    # A proxy that the environment names is for connections out of the network, not inside it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{target}/metrics", timeout=TIMEOUT_SECONDS) as response:
            page = response.read(PAGE_BYTES + 1)
        if len(page) > PAGE_BYTES:
            return Scrape(target, at_seconds, problem=f"its page has more than {PAGE_BYTES >> 20} MiB")
        samples: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(page.decode()):
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    except HTTPError as error:
        return Scrape(target, at_seconds, problem=f"answers {error.code}")
    except (URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        return Scrape(target, at_seconds, problem=text.lower())
    except (ValueError, KeyError):
        return Scrape(target, at_seconds, problem="is no metrics page")
    if "klein_serving" not in samples:
        return Scrape(target, at_seconds, problem="is no process of klein-suite")
    return Scrape(target, at_seconds, samples)

"""Arrivals for the scheduling benchmark: Poisson, or read from a JSON file, and their deadlines."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.scheduling_device import image_tokens, step_seconds
from klein_services.runtime.urgency import Urgency

SIDES_PX = (256, 512, 1024, 2048)
SIDE_WEIGHTS = (3, 3, 3, 1)
STEPS = (4, 50)
STEP_WEIGHTS = (3, 1)
URGENCY_WEIGHTS = {Urgency.INTERACTIVE: 0.2, Urgency.STANDARD: 0.6, Urgency.BATCH: 0.2}
CALLERS = 6
CALLER_WEIGHTS = (8, 4, 2, 1, 1, 1)
"""Callers send different shares of the requests."""
DEADLINES = {Urgency.INTERACTIVE: (3.0, 2.0), Urgency.STANDARD: (15.0, 3.0), Urgency.BATCH: (120.0, 5.0)}
"""Clients' timeouts: seconds, and times the seconds that the request takes alone."""
BURSTS = Path(__file__).parent / "traces" / "bursts.json"
BURST_SECONDS, PAUSE_SECONDS = 20.0, 60.0
BURST_FACTOR = 4.0
"""Times as many requests a second in a burst as in the mean of burst and pause."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request of a trace."""

    at_seconds: float
    side_px: int
    steps: int
    urgency: Urgency
    caller: str

    @property
    def alone_seconds(self) -> float:
        """Time that the request takes on an idle device."""
        return self.steps * step_seconds([image_tokens(self.side_px)])

    @property
    def deadline_seconds(self) -> float:
        fixed, factor = DEADLINES[self.urgency]
        return self.at_seconds + fixed + factor * self.alone_seconds


def poisson(count: int, utilization: float, seed: int) -> list[Arrival]:
    """Returns arrivals that use this share of a device that serves one request after the other."""
    chance = random.Random(seed)
    rate = utilization / _mean_seconds()
    now, arrivals = 0.0, list[Arrival]()
    for _ in range(count):
        now += chance.expovariate(rate)
        arrivals.append(_request(now, chance, chance.choices(range(CALLERS), CALLER_WEIGHTS)[0]))
    return arrivals


def bursts(count: int, utilization: float, seed: int) -> list[Arrival]:
    """Returns arrivals of a process with two states: in bursts one caller sends most of the requests.

    Bursts and pauses have exponential lengths. The mean rate uses this share of the device.
    """
    chance = random.Random(seed)
    mean = utilization / _mean_seconds()
    share = BURST_SECONDS / (BURST_SECONDS + PAUSE_SECONDS)
    burst_rate = mean * BURST_FACTOR
    pause_rate = mean * max(0.05, (1 - share * BURST_FACTOR) / (1 - share))
    now, arrivals, is_burst, sender = 0.0, list[Arrival](), False, 0
    changes_at = chance.expovariate(1 / PAUSE_SECONDS)
    while len(arrivals) < count:
        following = now + chance.expovariate(burst_rate if is_burst else pause_rate)
        if following > changes_at:
            now, is_burst, sender = changes_at, not is_burst, chance.randrange(CALLERS)
            changes_at = now + chance.expovariate(1 / (BURST_SECONDS if is_burst else PAUSE_SECONDS))
            continue
        now = following
        other = chance.randrange(CALLERS)
        arrivals.append(_request(now, chance, sender if is_burst and chance.random() < 0.8 else other))
    return arrivals


def write(arrivals: Sequence[Arrival], path: Path) -> None:
    """Writes a trace, an arrival a line."""
    lines = [json.dumps(asdict(arrival) | {"urgency": arrival.urgency.name.lower()}) for arrival in arrivals]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read(path: Path) -> list[Arrival]:
    """Returns the arrivals of a trace file, sorted by time."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    arrivals = [Arrival(**(entry | {"urgency": Urgency[entry["urgency"].upper()]})) for entry in entries]
    return sorted(arrivals, key=lambda arrival: arrival.at_seconds)


def _request(now: float, chance: random.Random, caller: int) -> Arrival:
    return Arrival(
        at_seconds=round(now, 3),
        side_px=chance.choices(SIDES_PX, SIDE_WEIGHTS)[0],
        steps=chance.choices(STEPS, STEP_WEIGHTS)[0],
        urgency=chance.choices(list(URGENCY_WEIGHTS), list(URGENCY_WEIGHTS.values()))[0],
        caller=f"caller-{caller}",
    )


def _mean_seconds() -> float:
    """Returns the mean of `Arrival.alone_seconds`."""
    sides = zip(SIDES_PX, SIDE_WEIGHTS, strict=True)
    step = sum(step_seconds([image_tokens(side)]) * weight for side, weight in sides) / sum(SIDE_WEIGHTS)
    steps = sum(count * weight for count, weight in zip(STEPS, STEP_WEIGHTS, strict=True))
    return step * steps / sum(STEP_WEIGHTS)

"""Policies of the scheduling benchmark in simulated time: the denoiser's own scheduler, and two that serve in order."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scheduling_device import (
    IMAGE_LIMIT,
    image_tokens,
    measured_steps,
    step_seconds,
    token_budget,
)
from benchmarks.scheduling_traces import Arrival
from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig
from klein_services.runtime.caller import Caller
from klein_services.runtime.errors import DeadlineUnreachable

NOISE = 0.03
"""Standard deviation of a step's time, relative to the model's."""
UNBOUNDED = 10**6
"""Queue and memory limits, so that all policies get the same requests."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The fate of one request."""

    arrival: Arrival
    ended_seconds: float | None = None
    """Time of its result; `None` for one that was refused, or given up by its client."""
    estimated_seconds: float | None = None
    """Latency that was estimated when the request came."""

    @property
    def latency_seconds(self) -> float | None:
        return None if self.ended_seconds is None else self.ended_seconds - self.arrival.at_seconds

    @property
    def is_hit(self) -> bool:
        """Whether the result came before the client's deadline."""
        return self.ended_seconds is not None and self.ended_seconds <= self.arrival.deadline_seconds


def suite(arrivals: Sequence[Arrival], *, has_deadlines: bool, noise_seed: int = 1) -> list[Outcome]:
    """Runs the denoiser's scheduler. Clients give up at their deadlines, where they have some."""
    chance = random.Random(noise_seed)
    config = SchedulerConfig(
        queue_limit=UNBOUNDED,
        token_budget=token_budget(),
        step_image_limit=IMAGE_LIMIT,
        memory_limit_bytes=UNBOUNDED,
    )
    scheduler = Scheduler(config)
    for tokens in [[image_tokens(1024)], *measured_steps()]:
        scheduler.step_times.observe(tokens, step_seconds(tokens))
    of: dict[ScheduledRequest, Arrival] = {}
    estimates: dict[ScheduledRequest, float | None] = {}
    outcomes: list[Outcome] = []
    waiting, now = deque(arrivals), 0.0

    def admit(arrival: Arrival) -> None:
        request = ScheduledRequest(
            image_tokens=image_tokens(arrival.side_px),
            step_count=arrival.steps,
            urgency=arrival.urgency,
            deadline=arrival.deadline_seconds if has_deadlines else None,
            caller=Caller(name=arrival.caller),
        )
        try:
            scheduler.admit(request, arrival.at_seconds)
            scheduler.activate(request, arrival.at_seconds, image_tokens=request.image_tokens)
        except DeadlineUnreachable:
            scheduler.remove([request])
            outcomes.append(Outcome(arrival=arrival))
            return
        of[request] = arrival
        estimates[request] = scheduler.estimated_seconds(request, arrival.at_seconds)

    def end(requests: Sequence[ScheduledRequest], ended_seconds: float | None) -> None:
        outcomes.extend(
            Outcome(arrival=of[each], ended_seconds=ended_seconds, estimated_seconds=estimates[each])
            for each in requests
        )

    while waiting or scheduler.requests:
        while waiting and (waiting[0].at_seconds <= now or not scheduler.requests):
            now = max(now, waiting[0].at_seconds)
            admit(waiting.popleft())
        end(scheduler.reap(now), None)
        batch = scheduler.schedule(now)
        if batch is not None:
            seconds = step_seconds([item.tokens for item in batch.items]) * chance.gauss(1.0, NOISE)
            now += seconds
            end(scheduler.on_step_done(batch, seconds), now)
    return outcomes


def fifo(
    arrivals: Sequence[Arrival], *, has_deadlines: bool, packs: bool, noise_seed: int = 1
) -> list[Outcome]:
    """Serves in the order of arrival, each to its end; requests that clients have given up are skipped.

    Args:
        arrivals: the requests.
        has_deadlines: whether clients give up at their deadlines.
        packs: whether the first that waits takes along those of its size and steps that fit into a step with it.
        noise_seed: of the noise of step times.
    """
    chance = random.Random(noise_seed)
    outcomes: list[Outcome] = []
    coming, waiting, now = deque(arrivals), list[Arrival](), 0.0
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].at_seconds)
        while coming and coming[0].at_seconds <= now:
            waiting.append(coming.popleft())
        if has_deadlines:
            late = [each for each in waiting if each.deadline_seconds <= now]
            outcomes += [Outcome(arrival=each) for each in late]
            waiting = [each for each in waiting if each.deadline_seconds > now]
            if not waiting:
                continue
        first = waiting[0]
        tokens = image_tokens(first.side_px)
        room = max(1, min(IMAGE_LIMIT, token_budget() // tokens)) if packs else 1
        alike = [each for each in waiting if (each.side_px, each.steps) == (first.side_px, first.steps)]
        batch = alike[:room]
        step = step_seconds([tokens] * len(batch))
        now += first.steps * step * chance.gauss(1.0, NOISE / math.sqrt(first.steps))
        outcomes += [Outcome(arrival=each, ended_seconds=now) for each in batch]
        waiting = [each for each in waiting if each not in batch]
    return outcomes

"""Clients that come back when they are asked to: the place is used, and few come in vain."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig
from klein_services.runtime.admission import JITTER, RETRY_SECONDS, ConcurrencyLimit, RetryTimes
from klein_services.runtime.errors import QueueFull
from tests.services.fakes.simulated_device import activate

SECONDS = 2000.0
STEP_SECONDS = 0.1


class Obedient:
    """Clients, each of which always has one request and repeats a refused one when the hint says so."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.refused = 0
        self.succeeded = 0
        self._order = itertools.count()
        self._arrivals: list[tuple[float, int]] = []
        for _ in range(count):
            self.come_back(0.0)

    def come_back(self, at: float) -> None:
        heapq.heappush(self._arrivals, (at, next(self._order)))

    @property
    def next_arrival(self) -> float:
        return self._arrivals[0][0] if self._arrivals else float("inf")

    def take(self) -> None:
        heapq.heappop(self._arrivals)


def denoised(clients: Obedient, queue_limit: int, seed: int) -> Obedient:
    """Lets clients ask a denoiser's scheduler, whose device does one step at a time, for `SECONDS`."""
    retry_times = RetryTimes(random.Random(seed).random)
    scheduler = Scheduler(SchedulerConfig(queue_limit=queue_limit), retry_times=retry_times)
    while clients.now < SECONDS:
        while clients.next_arrival <= clients.now:
            clients.take()
            request = ScheduledRequest(image_tokens=100, step_count=4)
            try:
                scheduler.admit(request, clients.now)
                activate(scheduler, request, clients.now)
            except QueueFull as refusal:
                clients.refused += 1
                clients.come_back(clients.now + refusal.retry_after_seconds)
        batch = scheduler.schedule(clients.now)
        if batch is None:
            clients.now = clients.next_arrival
            continue
        clients.now += STEP_SECONDS
        for _ in scheduler.on_step_done(batch, STEP_SECONDS):
            clients.succeeded += 1
            clients.come_back(clients.now)
    return clients


def served(clients: Obedient, slots: int, seed: int) -> Obedient:
    """Lets clients ask a server with `slots` slots, which works on one request at a time, for `SECONDS`."""
    limit = ConcurrencyLimit(
        slots, clock=lambda: clients.now, retry_times=RetryTimes(random.Random(seed).random)
    )
    held: list[object] = []
    done_at = float("inf")
    while clients.now < SECONDS:
        if done_at <= clients.next_arrival:
            clients.now = done_at
            held.pop(0).__exit__(None, None, None)
            clients.succeeded += 1
            clients.come_back(clients.now)
            done_at = clients.now + 4 * STEP_SECONDS if held else float("inf")
            continue
        clients.now = clients.next_arrival
        clients.take()
        slot = limit.slot()
        try:
            slot.__enter__()
        except QueueFull as refusal:
            clients.refused += 1
            clients.come_back(clients.now + refusal.retry_after_seconds)
            continue
        held.append(slot)
        if len(held) == 1:
            done_at = clients.now + 4 * STEP_SECONDS
    return clients


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("places", [2, 4, 8])
@pytest.mark.parametrize("serve", [denoised, served])
def test_forty_clients_get_the_goodput_of_four_with_few_refusals(serve, places, seed):
    few = serve(Obedient(4), places, seed)
    many = serve(Obedient(40), places, seed)
    assert many.succeeded >= 0.9 * few.succeeded
    assert many.refused <= 3 * many.succeeded


def test_refused_requests_get_one_time_after_the_other():
    times = RetryTimes(lambda: 0.5)
    assert [times.seconds(10.0, 2.0, 0.5) for _ in range(4)] == pytest.approx([2.0, 2.5, 3.0, 3.5])
    assert times.seconds(12.0, 2.0, 0.5) == pytest.approx(2.0), "the times before have passed"
    times.forget()
    assert times.seconds(12.0, 1.0, 0.5) == pytest.approx(1.0)


@given(
    randomness=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=50),
    first=st.floats(0, 1e6),
    interval=st.floats(0, 1e6),
)
def test_hints_are_bounded_and_vary(randomness, first, interval):
    numbers = iter(randomness)
    times = RetryTimes(lambda: next(numbers))
    shortest, longest = RETRY_SECONDS
    hints = [times.seconds(0.0, first, interval) for _ in randomness]
    assert all(shortest <= hint <= longest for hint in hints)
    expected = [min(first + number * interval, longest) for number in range(len(hints))]
    for hint, middle in zip(hints, expected, strict=True):
        assert hint == pytest.approx(middle, rel=JITTER + 1e-6, abs=shortest)

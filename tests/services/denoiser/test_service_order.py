"""Fairness between callers, as properties of random traces in simulated time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter, defaultdict

import pytest

from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.caller import Caller
from klein_services.runtime.errors import DeadlineUnreachable
from klein_services.runtime.fair_shares import REMEMBERED_CALLERS, FairShares
from klein_services.runtime.urgency import Urgency
from tests.services.fakes.simulated_device import SECONDS_PER_TOKEN, Device

SIZES = (20, 60, 150)
CALLERS = [Caller(name="a"), Caller(name="b", weight=3.0), Caller(name="c", weight=0.5), Caller(name="d")]
STRICT = SchedulerConfig(aging_seconds=math.inf, queue_limit=2000)
TRACES = 1500


def cost(request: ScheduledRequest) -> float:
    return request.items_left * request.image_tokens * SECONDS_PER_TOKEN


def measured(config: SchedulerConfig) -> Device:
    """Returns a device all of whose sizes were measured."""
    device = Device(config)
    for tokens in SIZES:
        device.scheduler.step_times.observe([tokens], tokens * SECONDS_PER_TOKEN)
    return device


def random_request(chance: random.Random, now: float, callers: list[Caller], **fixed) -> ScheduledRequest:
    attributes = {
        "image_tokens": chance.choice(SIZES),
        "step_count": chance.randint(1, 4),
        "image_count": chance.choice((1, 1, 2)),
        "urgency": chance.choice((Urgency.INTERACTIVE, Urgency.STANDARD, Urgency.STANDARD, Urgency.BATCH)),
        "deadline": chance.choice((None, None, now + chance.uniform(0.5, 3.0))),
        "caller": chance.choice(callers),
        "is_resumed": chance.random() < 0.1,
    }
    return ScheduledRequest(**(attributes | fixed))


class Shares:
    """Service of callers while they have work without a break, and how far it deviates from their weights."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = defaultdict(float)
        self._differences: dict[tuple[str, str], float] = {}
        self._extremes: dict[tuple[str, str], tuple[float, float]] = {}

    def step(self, ready: list[ScheduledRequest], served: ScheduledRequest, seconds: float) -> None:
        weights = {request.caller.name: request.caller.weight for request in ready}
        for request in ready:
            name = request.caller.name
            whole = (request.items_left + request.items_done) * request.image_tokens * SECONDS_PER_TOKEN
            self.largest[name] = max(self.largest[name], whole / weights[name])
        pairs = set(itertools.combinations(sorted(weights), 2))
        for ended in self._differences.keys() - pairs:
            del self._differences[ended]
            del self._extremes[ended]
        for pair in pairs:
            one, other = pair
            got = seconds / weights[served.caller.name]
            change = got if served.caller.name == one else -got if served.caller.name == other else 0.0
            low, high = self._extremes.get(pair, (0.0, 0.0))
            difference = self._differences[pair] = self._differences.get(pair, 0.0) + change
            self._extremes[pair] = (min(low, difference), max(high, difference))

    def check(self) -> None:
        """Compares two callers: apart by a request of each, and by one of a third that made them wait."""
        for (one, other), (low, high) in self._extremes.items():
            third = max(self.largest.values())
            assert high - low <= self.largest[one] + self.largest[other] + third + 1e-6


@pytest.mark.parametrize("part", range(3))
def test_random_traces_are_served_fairly_in_order_and_without_idling(part):
    for seed in range(part, TRACES, 3):
        trace(seed)


def trace(seed: int) -> None:
    """Runs random arrivals and departures and checks every decision."""
    chance = random.Random(seed)
    packs, ages, is_one_class = chance.random() < 0.3, chance.random() < 0.3, chance.random() < 0.5
    config = dataclasses.replace(
        STRICT,
        token_budget=chance.choice((100, 300)) if packs else 0,
        aging_seconds=chance.choice((0.0, 0.2)) if ages else math.inf,
    )
    device, callers, shares = measured(config), CALLERS[: chance.randint(1, 4)], Shares()
    fixed = {"urgency": Urgency.STANDARD} if is_one_class else {}
    admitted: list[ScheduledRequest] = []
    arrivals = chance.randint(4, 12)
    while arrivals or device.scheduler.requests:
        for _ in range(chance.choice((0, 0, 1, 3)) if arrivals else 0):
            arrivals = max(0, arrivals - 1)
            try:
                admitted.append(device.submit(random_request(chance, device.now, callers, **fixed)))
            except DeadlineUnreachable:
                continue
        if chance.random() < 0.05 and device.scheduler.requests:
            device.scheduler.cancel(chance.choice(device.scheduler.requests))
        device.gone += device.scheduler.reap(device.now)
        shown = device.scheduler.requests
        left = {request: cost(request) for request in shown}
        batch = device.step()
        assert (batch is None) == (not shown), "the device idles exactly when there is no work"
        if batch is None:
            continue
        first = batch.items[0].request
        if not batch.is_starving_turn:
            assert first is shown[0]
            assert first.urgency == min(request.urgency for request in shown)
            rivals = [r for r in shown if (r.urgency, r.caller) == (first.urgency, first.caller)]
            assert first is min(rivals, key=lambda request: request.due), "deadlines within a caller"
        else:
            assert ages
        if not packs and not ages and is_one_class:
            assert left[first] > 0
            shares.step(list(shown), first, batch.tokens * SECONDS_PER_TOKEN)
            shares.check()
    assert Counter(device.done + device.gone) == Counter(admitted), "every request leaves once"
    assert set(device.items.values()) <= {1}
    assert all(request.charged_seconds == pytest.approx(request.spent_seconds) for request in admitted)
    assert all(request.turn is None for request in admitted)


@pytest.mark.parametrize("seed", range(30))
def test_200_waiting_delay_a_caller_with_one_by_at_most_one_of_them(seed):
    chance = random.Random(seed)
    device = measured(STRICT) if seed % 2 else Device(STRICT)
    crowd = Caller(name="crowd", weight=chance.choice((1.0, 20.0)))
    for _ in range(200):
        device.submit(random_request(chance, 0.0, [crowd], urgency=Urgency.STANDARD, deadline=None))
    for _ in range(chance.randint(1, 300)):
        device.step()
    running, begun = device.batches[-1].items[0].request, device.now
    rest = cost(running)
    waiting = device.scheduler.requests
    single = device.submit(
        ScheduledRequest(image_tokens=chance.choice(SIZES), step_count=3, caller=Caller(name="single"))
    )
    if seed % 2 and rest:
        assert device.scheduler.estimated_wait(single) == pytest.approx(rest, abs=1e-6)
    while not single.is_finished:
        device.step()
    longest = rest if rest else max(map(cost, waiting))
    assert single.started_at is not None
    assert single.started_at - begun <= longest + 1e-6
    assert device.now - single.started_at == pytest.approx(single.spent_seconds), (
        "and then it goes on to its end"
    )


@pytest.mark.parametrize("is_measured", [True, False])
def test_busy_callers_share_by_weight(is_measured):
    chance = random.Random(5)
    device = measured(STRICT) if is_measured else Device(STRICT)
    for _ in range(60):
        for caller in CALLERS:
            device.submit(random_request(chance, 0.0, [caller], urgency=Urgency.STANDARD, deadline=None))
    while device.now < 15.0:
        device.step()
    assert not any(batch.is_starving_turn for batch in device.batches)
    requests = [*device.done, *device.scheduler.requests]
    got = {c: sum(r.spent_seconds for r in requests if r.caller is c) / c.weight for c in CALLERS}
    assert all(share == pytest.approx(got[CALLERS[0]], abs=2 * 2 * 4 * 0.15 / 0.5) for share in got.values())


def test_a_caller_is_not_kept_out_by_an_endless_row_of_new_ones():
    """Each new caller has had nothing yet, and there is always one that waits."""
    device, numbers = measured(STRICT), itertools.count()
    returning = Caller(name="returning")

    def submit(caller: Caller) -> ScheduledRequest:
        return device.submit(ScheduledRequest(image_tokens=60, step_count=2, caller=caller))

    submit(returning)
    ends = []
    while len(ends) < 5:
        while len(device.scheduler.requests) < 5:
            submit(Caller(name=f"new {next(numbers)}"))
        if not any(request.caller is returning for request in device.scheduler.requests):
            ends.append(len(device.done))
            submit(returning)
        device.step()
        assert len(device.done) < 200
    assert all(later - earlier <= 12 for earlier, later in itertools.pairwise(ends))


def test_a_caller_that_overtakes_itself_leaves_the_turn_to_others():
    device = measured(STRICT)
    greedy, other = Caller(name="greedy"), Caller(name="other")
    long = device.submit(ScheduledRequest(image_tokens=60, step_count=50, caller=greedy))
    device.step()
    small = device.submit(ScheduledRequest(image_tokens=20, step_count=2, caller=other))
    urgent = device.submit(ScheduledRequest(image_tokens=20, step_count=40, caller=greedy, deadline=90.0))
    device.run()
    assert device.done == [small, urgent, long]
    assert small.started_at == pytest.approx(0.06)


def test_a_resumed_request_goes_before_its_callers_others_but_not_before_other_callers():
    device = measured(STRICT)
    mine, theirs = Caller(name="mine"), Caller(name="theirs")
    device.submit(ScheduledRequest(image_tokens=20, step_count=2, caller=mine))
    device.step()
    other = device.submit(ScheduledRequest(image_tokens=20, step_count=4, caller=theirs))
    fresh = device.submit(ScheduledRequest(image_tokens=20, step_count=4, caller=mine))
    resumed = device.submit(
        ScheduledRequest(image_tokens=20, step_count=4, first_step=3, is_resumed=True, caller=mine)
    )
    device.run()
    assert device.done[1:] == [other, resumed, fresh]
    assert resumed.charged_seconds == pytest.approx(0.02), "its caller pays for the steps that were left"


def test_a_large_request_is_not_kept_out_by_small_ones_that_fill_gaps():
    device = measured(dataclasses.replace(STRICT, token_budget=100))
    crowd, single = Caller(name="crowd"), Caller(name="single")
    for _ in range(40):
        device.submit(ScheduledRequest(image_tokens=20, step_count=3, caller=crowd))
    device.step()
    large = device.submit(ScheduledRequest(image_tokens=150, step_count=2, caller=single))
    for _ in range(4):
        device.step()
    assert large in device.done, "it begins as soon as the five that it met have done their three steps"


def test_starving_classes_share_fairly_between_their_callers():
    device = measured(dataclasses.replace(STRICT, aging_seconds=0.5, starving_share=0.25))
    crowd = [
        device.submit(
            ScheduledRequest(image_tokens=20, step_count=2, urgency=Urgency.BATCH, caller=CALLERS[0])
        )
        for _ in range(20)
    ]
    single = device.submit(
        ScheduledRequest(image_tokens=20, step_count=2, urgency=Urgency.BATCH, caller=CALLERS[3])
    )
    while single not in device.done:
        if device.scheduler.queued_count < 23:
            device.submit(ScheduledRequest(image_tokens=60, step_count=1, urgency=Urgency.INTERACTIVE))
        device.step()
        assert device.now < 5.0
    assert sum(request in device.done for request in crowd) <= 1


def test_aging_does_not_put_a_crowd_before_other_callers():
    device = measured(dataclasses.replace(STRICT, aging_seconds=0.1, starving_share=0.5))
    for _ in range(20):
        device.submit(ScheduledRequest(image_tokens=20, step_count=10, caller=CALLERS[0]))
    for _ in range(10):
        device.step()
    single = device.submit(ScheduledRequest(image_tokens=20, step_count=10, caller=CALLERS[3]))
    while device.step().items[0].request is not single:
        assert len(device.done) <= 2
    for _ in range(9):
        assert device.step().items[0].request is single


def test_tags_of_callers_that_left_are_bounded():
    shares, busy = FairShares(), Caller(name="busy")
    shares.arrive(busy)
    for number in range(3 * REMEMBERED_CALLERS):
        caller = Caller(name=str(number), weight=0.01)
        shares.arrive(caller)
        shares.correct(caller, 1.0)
        shares.leave(caller)
        assert len(shares._tags) <= REMEMBERED_CALLERS + 2
    assert shares.tag("busy") == 0.0
    shares.leave(busy)
    assert not shares._tags

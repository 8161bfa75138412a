"""Admission to the reference KV cache: no request starves, and urgent requests keep their share."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.scheduled_request import Batch, ScheduledRequest
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.urgency import Urgency
from tests.services.fakes.caching_device import LIMIT, Device, cache

AGING_SECONDS = 1.0


def limits(budget: int) -> SchedulerConfig:
    return SchedulerConfig(token_budget=budget, aging_seconds=AGING_SECONDS, starving_share=0.25)


def present(device: Device, *others: ScheduledRequest) -> int:
    return sum(request not in others for request in device.scheduler.requests)


def leader(batch: Batch) -> ScheduledRequest:
    return batch.items[0].request


def test_a_request_waiting_for_room_is_passed_only_by_those_that_leave_its_room_free():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    first = device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    waiting = device.submit(cache=cache("b", 70), urgency=Urgency.INTERACTIVE)
    sharing = device.submit(cache=cache("a", 70))
    small = device.submit(cache=cache("c", 30))
    plain = device.submit()
    device.step()
    assert {item.request for item in device.batches[-1].items} == {first, plain}
    device.run()
    assert waiting.is_finished
    assert sharing.started_at > waiting.started_at
    assert small.started_at == waiting.started_at, "it fits next to it: 100 bytes in all"
    assert device.peak_bytes <= LIMIT


def test_a_cache_that_leaves_one_byte_too_few_for_the_reservation_waits():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    waiting = device.submit(cache=cache("b", 70))
    small = device.submit(cache=cache("c", 31))
    device.run()
    assert small.started_at > waiting.started_at


def test_requests_that_share_the_reserved_cache_start_together():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    pair = [device.submit(cache=cache("b", 70)) for _ in range(2)]
    device.run()
    making = next(i for i, batch in enumerate(device.batches) if batch.items[0].request is pair[0])
    assert [item.request for item in device.batches[making + 1].items] == pair


@settings(deadline=None, max_examples=60)
@given(
    budget=st.sampled_from([0, 60, 100_000]),
    is_shared=st.booleans(),
    urgency=st.sampled_from(Urgency),
    other_bytes=st.integers(1, 250),
    victim_bytes=st.integers(1, 250),
    companions=st.integers(1, 4),
    has_plain=st.booleans(),
)
def test_a_request_gets_its_cache_under_any_load(
    budget, is_shared, urgency, other_bytes, victim_bytes, companions, has_plain
):
    device, numbers = Device(limits(budget), LIMIT), count()

    def submit_another() -> None:
        number = next(numbers)
        is_plain = has_plain and number % 2
        key = "shared" if is_shared else f"reference {number}"
        device.submit(cache=None if is_plain else cache(key, other_bytes), urgency=urgency, step_count=4)

    submit_another()
    device.step()
    victim = device.submit(cache=cache("victim", victim_bytes), step_count=4)
    while not victim.is_finished:
        while present(device, victim) < companions:
            submit_another()
        # Each request has at most 60 tokens, 0.06 s; those present end first, then a quarter of the time is its own.
        assert device.now < AGING_SECONDS + 3.0, "it starves"
        began = device.now
        device.step()
        batch = device.batches[-1]
        if batch.is_starving_turn:
            assert began - leader(batch).admitted_at >= AGING_SECONDS
    assert device.caches.size_bytes <= max(LIMIT, other_bytes + victim_bytes)


@pytest.mark.parametrize("budget", [0, 20])
def test_a_starving_request_without_room_leaves_its_turns_to_the_caches_users(budget):
    """The user of the cache is the youngest and least urgent request: it runs only in starving turns."""
    device = Device(limits(budget), LIMIT)
    slow = device.admit(cache=cache("slow", 70))
    holder = device.submit(cache=cache("held", 70), urgency=Urgency.BATCH, step_count=9)
    device.step()
    device.activate(slow)
    while not slow.is_finished:
        while device.scheduler.queued_count < 3:
            device.submit(urgency=Urgency.INTERACTIVE)
        device.step()
        assert device.now < AGING_SECONDS + 3.0
    assert holder.is_finished


def test_a_starving_reservation_holds_while_another_starving_request_gets_the_turns():
    """The other cache is in use without a gap unless new requests are kept from it."""
    device, numbers = Device(limits(20), LIMIT), count()
    slow = device.admit(cache=cache("slow", 70))
    device.submit(cache=cache("long", 20), urgency=Urgency.BATCH, step_count=1000)
    device.step()
    device.activate(slow)
    while not slow.is_started:
        while device.scheduler.queued_count < 3:
            steps = 20 + 10 * (next(numbers) % 2)
            device.submit(cache=cache("hot", 30), urgency=Urgency.INTERACTIVE, step_count=steps)
        device.step()
        assert device.now < AGING_SECONDS + 1.0, "those that use it now have 30 steps of 0.02 s"


def test_a_reservation_ends_with_its_request():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    device.submit(cache=cache("a", 70), step_count=9)
    device.step()
    waiting = device.submit(cache=cache("b", 70))
    sharing = device.submit(cache=cache("a", 70))
    device.step()
    assert not sharing.is_started
    device.scheduler.cancel(waiting)
    device.step()
    assert sharing.is_started


def test_starving_requests_with_references_leave_urgent_ones_their_share():
    device, numbers = Device(limits(0), LIMIT), count()
    crowd = [
        device.submit(cache=cache(f"batch {i}", 60), urgency=Urgency.BATCH, step_count=4) for i in range(30)
    ]
    device.now = AGING_SECONDS
    while sum(request.is_finished for request in crowd) < 10:
        while present(device, *crowd) < 2:
            key = f"urgent {next(numbers)}"
            device.submit(cache=cache(key, 60), urgency=Urgency.INTERACTIVE, step_count=4)
        device.step()
    by_urgency = [item.request.urgency for batch in device.batches for item in batch.items]
    assert by_urgency.count(Urgency.INTERACTIVE) >= len(by_urgency) / 3

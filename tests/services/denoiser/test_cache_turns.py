"""Nobody waits for ever for room for its references, whoever else comes, and the urgent keep theirs."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.job import Job, Plan, Urgency
from klein_services.denoiser.scheduler import SchedulerConfig
from tests.services.fakes.caching_device import LIMIT, Device, cache

AGEING_SECONDS = 1.0


def limits(budget: int) -> SchedulerConfig:
    return SchedulerConfig(token_budget=budget, ageing_seconds=AGEING_SECONDS, aged_share=0.25)


def present(device: Device, *others: Job) -> int:
    return sum(job not in others for job in device.scheduler.jobs)


def leader(plan: Plan) -> Job:
    return plan.units[0].job


def test_who_finds_no_room_lets_pass_who_needs_none_but_not_who_would_prolong_its_wait():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    first = device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    waiting = device.submit(cache=cache("b", 70), urgency=Urgency.INTERACTIVE)
    sharing = device.submit(cache=cache("a", 70))
    small = device.submit(cache=cache("c", 30))
    plain = device.submit()
    device.step()
    assert {unit.job for unit in device.plans[-1].units} == {first, plain}
    device.run()
    assert waiting.is_finished
    assert sharing.started_at > waiting.started_at
    assert small.started_at == waiting.started_at, "it fits beside: 100 bytes in all"
    assert device.peak_bytes <= LIMIT


def test_who_would_leave_one_byte_too_few_waits_too():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    waiting = device.submit(cache=cache("b", 70))
    small = device.submit(cache=cache("c", 31))
    device.run()
    assert small.started_at > waiting.started_at


def test_who_needs_the_same_cache_as_the_one_that_waits_starts_with_it():
    device = Device(SchedulerConfig(token_budget=1000), LIMIT)
    device.submit(cache=cache("a", 70), step_count=3)
    device.step()
    pair = [device.submit(cache=cache("b", 70)) for _ in range(2)]
    device.run()
    making = next(i for i, plan in enumerate(device.plans) if plan.units[0].job is pair[0])
    assert [unit.job for unit in device.plans[making + 1].units] == pair


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
def test_a_request_gets_its_cache_however_many_others_come(
    budget, is_shared, urgency, other_bytes, victim_bytes, companions, has_plain
):
    device, numbers = Device(limits(budget), LIMIT), count()

    def come() -> None:
        number = next(numbers)
        is_plain = has_plain and number % 2
        key = "shared" if is_shared else f"reference {number}"
        device.submit(cache=None if is_plain else cache(key, other_bytes), urgency=urgency, step_count=4)

    come()
    device.step()
    victim = device.submit(cache=cache("victim", victim_bytes), step_count=4)
    while not victim.is_finished:
        while present(device, victim) < companions:
            come()
        # Each job is at most 60 tokens, 0.06 s; those that are there first, then a quarter of the time.
        assert device.now < AGEING_SECONDS + 3.0, "it starves"
        began = device.now
        device.step()
        plan = device.plans[-1]
        if plan.is_aged_turn:
            assert began - leader(plan).admitted_at >= AGEING_SECONDS
    assert device.caches.size_bytes <= max(LIMIT, other_bytes + victim_bytes)


@pytest.mark.parametrize("budget", [0, 20])
def test_an_aged_request_that_waits_for_room_leaves_its_turns_to_those_that_hold_it(budget):
    """The holder is younger and less urgent than anybody, and would never run if the turns were lost."""
    device = Device(limits(budget), LIMIT)
    slow = device.scheduler.admit(device.spec(cache=cache("slow", 70)), device.now)
    holder = device.submit(cache=cache("held", 70), urgency=Urgency.BATCH, step_count=9)
    device.step()
    device.scheduler.make_ready(slow, slow.spec, device.now)
    while not slow.is_finished:
        while device.scheduler.queued_count < 3:
            device.submit(urgency=Urgency.INTERACTIVE)
        device.step()
        assert device.now < AGEING_SECONDS + 3.0
    assert holder.is_finished


def test_an_aged_claim_holds_while_the_turns_go_to_another_aged_request():
    """The others' cache is never free for a moment unless they are kept from it."""
    device, numbers = Device(limits(20), LIMIT), count()
    slow = device.scheduler.admit(device.spec(cache=cache("slow", 70)), device.now)
    device.submit(cache=cache("long", 20), urgency=Urgency.BATCH, step_count=1000)
    device.step()
    device.scheduler.make_ready(slow, slow.spec, device.now)
    while not slow.is_started:
        while device.scheduler.queued_count < 3:
            steps = 20 + 10 * (next(numbers) % 2)
            device.submit(cache=cache("hot", 30), urgency=Urgency.INTERACTIVE, step_count=steps)
        device.step()
        assert device.now < AGEING_SECONDS + 1.0, "those that use it now have 30 steps of 0.02 s"


def test_a_claim_ends_with_its_request():
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


def test_aged_requests_with_references_do_not_take_all_the_room_from_the_urgent():
    device, numbers = Device(limits(0), LIMIT), count()
    crowd = [
        device.submit(cache=cache(f"batch {i}", 60), urgency=Urgency.BATCH, step_count=4) for i in range(30)
    ]
    device.now = AGEING_SECONDS
    while sum(job.is_finished for job in crowd) < 10:
        while present(device, *crowd) < 2:
            key = f"urgent {next(numbers)}"
            device.submit(cache=cache(key, 60), urgency=Urgency.INTERACTIVE, step_count=4)
        device.step()
    by_urgency = [unit.job.spec.urgency for plan in device.plans for unit in plan.units]
    assert by_urgency.count(Urgency.INTERACTIVE) >= len(by_urgency) / 3

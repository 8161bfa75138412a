"""Places of a full queue: shared between callers by weight, never taken back and forth."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.caller import Caller
from klein_services.runtime.displacement import to_displace
from klein_services.runtime.errors import QueueFull
from klein_services.runtime.urgency import Urgency
from klein_services.runtime.worker import Worker
from tests.services.fakes.simulated_device import Device, activate

LIMIT = 16


@dataclass
class Work:
    caller: Caller
    sequence: int
    urgency: Urgency = Urgency.STANDARD


callers = st.sampled_from(
    [
        Caller(name="crowd"),
        Caller(name="one"),
        Caller(name="heavy", weight=3.0),
        Caller(name="light", weight=0.5),
    ]
)


@given(st.lists(st.tuples(callers, st.sampled_from(Urgency)), min_size=1, max_size=80))
def test_a_full_queue_converges_to_shares_by_weight_and_none_displaces_in_turn(arrivals):
    waiting: list[Work] = []
    for sequence, (caller, urgency) in enumerate(arrivals):
        newcomer = Work(caller, sequence, urgency)
        if len(waiting) >= LIMIT:
            left = to_displace(newcomer, waiting)
            if left is None:
                continue
            waiting.remove(left)
            assert left.urgency >= newcomer.urgency
            kept = sum(work.caller == left.caller for work in waiting)
            own = sum(work.caller == caller for work in waiting) + 1
            assert kept / left.caller.weight >= own / caller.weight
            waiting.append(newcomer)
            # The one that left cannot come back for the newcomer's place.
            assert to_displace(left, [newcomer]) is None
        else:
            waiting.append(newcomer)
    assert len(waiting) <= LIMIT


def test_a_crowd_that_fills_the_denoiser_gives_places_to_another_caller_up_to_half():
    device = Device(SchedulerConfig(queue_limit=LIMIT))

    def arrive(name: str) -> list[ScheduledRequest]:
        request = ScheduledRequest(image_tokens=10, step_count=1, caller=Caller(name=name))
        dropped = device.scheduler.admit(request, device.now)
        activate(device.scheduler, request, device.now)
        return dropped

    for _ in range(LIMIT):
        assert arrive("crowd") == []
    with pytest.raises(QueueFull):
        arrive("crowd")
    for _ in range(LIMIT // 2):
        [left] = arrive("one")
        assert left.caller.name == "crowd"
    with pytest.raises(QueueFull):
        arrive("one")
    device.run()
    assert len(device.done) == LIMIT


async def test_displaced_work_of_a_stage_is_refused_with_a_time_to_come_back():
    import asyncio
    import threading

    from klein_services.runtime.caller import caller

    gate, worker = threading.Event(), Worker("test-displacement", 2)
    crowd_token = caller.set(Caller(name="crowd"))
    crowd = [asyncio.create_task(worker.run(gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    caller.reset(crowd_token)
    caller.set(Caller(name="one"))
    own = asyncio.create_task(worker.run(lambda: "done"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as refused:
        await crowd[-1]
    assert refused.value.retry_after_seconds > 0
    gate.set()
    assert (await own).value == "done"
    await asyncio.gather(*crowd[:2])
    worker.close()


def test_one_tenant_never_holds_all_slots_and_without_tenants_all_are_taken():
    slots = ConcurrencyLimit(8)
    held = [slots.slot("crowd") for _ in range(6)]
    for each in held:
        each.__enter__()
    with pytest.raises(QueueFull), slots.slot("crowd"):
        pass
    with slots.slot("one"), slots.slot("two"):
        with pytest.raises(QueueFull), slots.slot("three"):
            pass
    for each in held:
        each.__exit__(None, None, None)
    assert slots.in_use == 0
    anonymous = [slots.slot() for _ in range(8)]
    for each in anonymous:
        each.__enter__()
    assert slots.in_use == 8
    for each in anonymous:
        each.__exit__(None, None, None)

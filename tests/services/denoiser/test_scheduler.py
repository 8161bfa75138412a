"""The scheduler's promises, as properties over any mix of requests."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull
from klein_services.runtime.urgency import Urgency
from tests.services.fakes.simulated_device import SECONDS_PER_TOKEN, Device, requests

limits = st.builds(
    SchedulerConfig,
    queue_limit=st.integers(1, 12),
    token_budget=st.sampled_from([0, 100, 500, 2000]),
    step_image_limit=st.integers(1, 8),
    aging_seconds=st.sampled_from([0.0, 0.5, math.inf]),
)


@settings(deadline=None)
@given(limits=limits, arrivals=st.lists(st.tuples(requests, st.integers(0, 3), st.booleans()), max_size=12))
def test_every_admitted_request_leaves_once_and_runs_each_work_item_once(limits, arrivals):
    device = Device(limits)
    admitted = []
    for request, steps_before, is_cancelled in arrivals:
        for _ in range(steps_before):
            device.step()
        try:
            admitted.append(device.submit(request))
        except (QueueFull, DeadlineUnreachable):
            continue
        if is_cancelled:
            device.scheduler.cancel(admitted[-1])
    device.run()
    assert Counter(device.done + device.gone) == Counter(admitted)
    assert device.scheduler.requests == ()
    assert set(device.items.values()) <= {1}
    for job in device.done:
        wanted = {(i, s) for i in range(job.image_count) for s in range(job.step_count)}
        assert {(i, s) for number, i, s in device.items if number == job.sequence} == wanted
    assert all(job.is_cancelled or job.is_expired(device.now) for job in device.gone)


@settings(deadline=None)
@given(limits=limits, arriving=st.lists(requests, max_size=20))
def test_bounds_hold(limits, arriving):
    device = Device(limits)
    for request in arriving:
        if device.scheduler.queued_count == limits.queue_limit:
            with pytest.raises(QueueFull) as refusal:
                device.submit(request)
            assert refusal.value.retry_after_seconds > 0
        else:
            device.submit(request)
        assert device.scheduler.queued_count <= limits.queue_limit
    device.run()
    for batch in device.batches:
        assert len(batch.items) <= limits.step_image_limit
        assert batch.tokens <= limits.token_budget or len(batch.items) == 1


@settings(deadline=None)
@given(limits=limits, arriving=st.lists(requests, min_size=1, max_size=12))
def test_first_of_a_step_is_the_most_urgent_with_the_earliest_deadline(limits, arriving):
    device = Device(dataclasses.replace(limits, queue_limit=99, aging_seconds=math.inf))
    for request in arriving:
        try:
            device.submit(request)
        except DeadlineUnreachable:
            continue
    while True:
        device.gone += device.scheduler.reap(device.now)
        waiting = device.scheduler.requests
        batch = device.scheduler.schedule(device.now)
        if batch is None:
            break
        best = min(
            waiting,
            key=lambda job: (job.urgency, job.deadline or math.inf, job.sequence),
        )
        assert batch.items[0].request is best
        device.scheduler.on_step_done(batch, batch.tokens * SECONDS_PER_TOKEN)
        device.now += batch.tokens * SECONDS_PER_TOKEN


def test_equals_are_served_first_come_first_served():
    device = Device(SchedulerConfig(token_budget=0))
    jobs = [device.submit(ScheduledRequest(image_tokens=9, step_count=2)) for _ in range(4)]
    device.run()
    assert device.done == jobs


@given(
    urgent_tokens=st.integers(20, 400),
    batch_tokens=st.integers(20, 400),
    batch_steps=st.integers(1, 12),
    patient_urgency=st.sampled_from(Urgency),
)
@settings(deadline=None, max_examples=40)
def test_nothing_starves_and_the_urgent_keep_their_share(
    urgent_tokens, batch_tokens, batch_steps, patient_urgency
):
    limits = SchedulerConfig(aging_seconds=1.0, starving_share=0.25)
    device = Device(limits)
    request = ScheduledRequest(image_tokens=batch_tokens, step_count=batch_steps, urgency=patient_urgency)
    patient = device.submit(request)
    work = batch_tokens * batch_steps * SECONDS_PER_TOKEN
    longest_step = max(urgent_tokens, batch_tokens) * SECONDS_PER_TOKEN
    bound = limits.aging_seconds + work / limits.starving_share + 4 * longest_step
    while patient not in device.done:
        # A more urgent request with an earlier deadline is always there.
        if device.scheduler.queued_count < 2:
            device.submit(
                ScheduledRequest(
                    image_tokens=urgent_tokens,
                    step_count=1,
                    urgency=Urgency.INTERACTIVE,
                    deadline=device.now + 10 * longest_step,
                )
            )
        device.step()
        assert device.now <= bound
    assert device.now - patient.spent_seconds >= (1 - limits.starving_share) * device.now - longest_step


def test_a_strict_order_without_aging_would_starve():
    """The control of the property above: the load there is one that starves."""
    device = Device(SchedulerConfig(aging_seconds=math.inf))
    patient = device.submit(ScheduledRequest(image_tokens=10, step_count=1, urgency=Urgency.BATCH))
    for _ in range(500):
        device.submit(ScheduledRequest(image_tokens=10, step_count=1, urgency=Urgency.INTERACTIVE))
        device.step()
    assert patient.items_done == 0


@settings(deadline=None)
@given(steps_before=st.integers(1, 6), images=st.integers(1, 3))
def test_pausing_keeps_a_running_request_as_it_is(steps_before, images):
    device = Device(SchedulerConfig(aging_seconds=math.inf))
    long = device.submit(ScheduledRequest(image_tokens=50, step_count=10, image_count=images))
    for _ in range(steps_before):
        device.step()
    before = (long.items_done, long.started_at, long.spent_seconds)
    urgent = device.submit(ScheduledRequest(image_tokens=50, step_count=3, urgency=Urgency.INTERACTIVE))
    for _ in range(3):
        batch = device.step()
        assert batch is not None
        assert [item.request for item in batch.items] == [urgent]
    assert (long.items_done, long.started_at, long.spent_seconds) == before
    device.run()
    assert device.done == [urgent, long]


def test_memory_is_bounded_but_a_single_large_request_is_let_in():
    device = Device(SchedulerConfig(memory_limit_bytes=100))
    device.submit(ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=500))
    with pytest.raises(QueueFull):
        device.submit(ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=1))
    device.run()
    device.submit(ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=60))
    device.submit(ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=40))


@pytest.mark.parametrize(("real_bytes", "is_too_large"), [(40, False), (41, True)])
def test_memory_is_bounded_also_by_what_a_request_turns_out_to_take(real_bytes, is_too_large):
    device = Device(SchedulerConfig(memory_limit_bytes=100))
    other = device.submit(ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=60))
    job = ScheduledRequest(image_tokens=1, step_count=1, memory_bytes=10)
    device.scheduler.admit(job, 0.0)
    if is_too_large:
        with pytest.raises(QueueFull) as refusal:
            device.scheduler.activate(job, 0.0, image_tokens=1, memory_bytes=real_bytes)
        assert refusal.value.retry_after_seconds > 0
        device.run()
        assert device.done == [other], "it is not chosen"
        real_bytes = 500
    device.scheduler.activate(job, 0.0, image_tokens=1, memory_bytes=real_bytes)
    device.run()
    assert device.done == [other, job], "and alone it may take any size"


def test_a_request_without_its_tensors_keeps_its_place_but_is_not_chosen():
    device = Device(SchedulerConfig())
    slow_sender = ScheduledRequest(image_tokens=5, step_count=1)
    device.scheduler.admit(slow_sender, 0.0)
    quick = device.submit(ScheduledRequest(image_tokens=5, step_count=2))
    assert device.scheduler.requests == (slow_sender, quick)
    assert device.step().items[0].request is quick
    device.scheduler.activate(slow_sender, device.now, image_tokens=7)
    batch = device.step()
    assert batch.items[0].request is slow_sender
    assert batch.tokens == 7


def test_expired_and_cancelled_requests_leave_at_the_next_boundary():
    device = Device(SchedulerConfig())
    late = device.submit(ScheduledRequest(image_tokens=100, step_count=50, deadline=0.25))
    device.step()
    device.step()
    assert device.scheduler.reap(device.now) == []
    device.step()
    assert device.scheduler.reap(device.now) == [late]
    assert late.spent_seconds == pytest.approx(0.3)
    assert device.scheduler.schedule(device.now) is None


def test_a_gap_is_filled_by_a_small_request_and_the_time_is_shared_by_tokens():
    device = Device(SchedulerConfig(token_budget=100))
    first = device.submit(ScheduledRequest(image_tokens=60, step_count=1))
    large = device.submit(ScheduledRequest(image_tokens=60, step_count=1))
    small = device.submit(ScheduledRequest(image_tokens=40, step_count=1))
    batch = device.step()
    assert [item.request for item in batch.items] == [first, small]
    assert (first.spent_seconds, small.spent_seconds) == pytest.approx((0.06, 0.04))
    assert [item.request for item in device.step().items] == [large]


def test_the_backlog_is_the_device_time_that_admitted_requests_still_need():
    device = Device(SchedulerConfig())
    assert device.scheduler.backlog_seconds == 0
    device.submit(ScheduledRequest(image_tokens=100, step_count=5, image_count=2))
    assert device.scheduler.backlog_seconds == 1, "a size that was never measured is not taken for no work"
    device.step()
    assert device.scheduler.backlog_seconds == pytest.approx(9 * 0.1)
    device.run()
    assert device.scheduler.backlog_seconds == 0

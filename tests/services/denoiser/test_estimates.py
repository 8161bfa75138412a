"""Estimates: how long requests wait, and which deadlines cannot be met."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.estimates import StepTimes
from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.errors import DeadlineUnreachable
from klein_services.runtime.urgency import Urgency
from tests.services.fakes.simulated_device import SECONDS_PER_TOKEN, Device, requests


@settings(deadline=None)
@given(arriving=st.lists(requests, min_size=1, max_size=8))
def test_estimated_wait_is_unknown_before_and_exact_after_measuring(arriving):
    device = Device(SchedulerConfig(aging_seconds=math.inf, queue_limit=99))
    plain = [
        ScheduledRequest(
            image_tokens=request.image_tokens,
            step_count=request.step_count,
            image_count=request.image_count,
            urgency=request.urgency,
        )
        for request in arriving
    ]
    jobs = [device.submit(request) for request in plain]
    for job in jobs:
        is_first = device.scheduler.requests[0] is job
        assert device.scheduler.estimated_wait(job) == (0.0 if is_first else None)
    for request in plain:
        device.scheduler.step_times.observe([request.image_tokens], request.image_tokens * SECONDS_PER_TOKEN)
    expected = [device.scheduler.estimated_wait(job) for job in jobs]
    device.run()
    for job, wait in zip(jobs, expected, strict=True):
        assert wait is not None
        assert job.started_at == pytest.approx(wait, abs=1e-9)


@settings(deadline=None)
@given(load=st.integers(0, 5), slack=st.floats(0.5, 1.5))
def test_a_deadline_that_cannot_be_met_is_refused_before_any_work(load, slack):
    device = Device(SchedulerConfig())
    device.scheduler.step_times.observe([100], 100 * SECONDS_PER_TOKEN)
    for _ in range(load):
        device.submit(ScheduledRequest(image_tokens=100, step_count=4, urgency=Urgency.INTERACTIVE))
    needed = (load + 1) * 4 * 100 * SECONDS_PER_TOKEN
    request = ScheduledRequest(image_tokens=100, step_count=4, deadline=needed * slack)
    if slack < 0.999:
        with pytest.raises(DeadlineUnreachable):
            device.submit(request)
        assert len(device.scheduler.requests) == load
    elif slack > 1.001:
        job = device.submit(request)
        device.run()
        assert job in device.done


@pytest.mark.parametrize("urgency", [Urgency.INTERACTIVE, Urgency.BATCH])
def test_requests_that_share_its_steps_lengthen_a_request(urgency):
    """On a device that one image fills, eight in a step take eight times as long, whatever their order."""
    for deadline, is_hopeless in ((6.0, True), (31.99, True), (32.0, False)):
        device = Device(SchedulerConfig(token_budget=100_000))
        device.scheduler.step_times.observe([1000], 1.0)
        for _ in range(7):
            device.submit(ScheduledRequest(image_tokens=1000, step_count=4, urgency=urgency))
        request = ScheduledRequest(image_tokens=1000, step_count=4, deadline=deadline)
        if is_hopeless:
            with pytest.raises(DeadlineUnreachable) as refusal:
                device.submit(request)
            assert refusal.value.estimated_seconds == pytest.approx(32.0)
        else:
            job = device.submit(request)
            device.run()
            assert job in device.done


def test_a_request_alone_takes_the_time_of_its_own_steps():
    device = Device(SchedulerConfig(token_budget=100_000))
    device.scheduler.step_times.observe([1000], 1.0)
    with pytest.raises(DeadlineUnreachable):
        device.submit(ScheduledRequest(image_tokens=1000, step_count=4, deadline=3.99))
    assert device.submit(ScheduledRequest(image_tokens=1000, step_count=4, deadline=4.0)).is_ready


def test_measured_packing_gains_shorten_the_estimate():
    """On a device that eight images fill, eight in a step take as long as one."""
    device = Device(SchedulerConfig(token_budget=8000))
    device.scheduler.step_times.observe([1000], 1.0)
    device.scheduler.step_times.observe([1000] * 8, 1.0)
    for _ in range(7):
        device.submit(ScheduledRequest(image_tokens=1000, step_count=4))
    assert device.submit(ScheduledRequest(image_tokens=1000, step_count=4, deadline=4.0)).is_ready
    with pytest.raises(DeadlineUnreachable):
        device.submit(ScheduledRequest(image_tokens=1000, step_count=4, deadline=3.99))
    waiting = device.scheduler.load(ScheduledRequest(image_tokens=1000, step_count=1))
    assert waiting.estimated_wait_seconds == pytest.approx(4.0)


def test_companions_count_only_while_they_share_a_step():
    def estimate(*companions: ScheduledRequest, **limits) -> float:
        device = Device(SchedulerConfig(token_budget=100, **limits))
        for size_tokens in (10, 20, 30, 60):
            device.scheduler.step_times.observe([size_tokens], size_tokens * SECONDS_PER_TOKEN)
        for companion in companions:
            device.submit(companion)
        with pytest.raises(DeadlineUnreachable) as refusal:
            device.submit(
                ScheduledRequest(image_tokens=60, step_count=4, urgency=Urgency.INTERACTIVE, deadline=1e-9)
            )
        return refusal.value.estimated_seconds

    assert estimate() == pytest.approx(0.24)
    assert estimate(ScheduledRequest(image_tokens=60, step_count=9)) == pytest.approx(0.24), (
        "no room next to it"
    )
    assert estimate(ScheduledRequest(image_tokens=20, step_count=9)) == pytest.approx(0.32)
    assert estimate(ScheduledRequest(image_tokens=20, step_count=1)) == pytest.approx(0.26), (
        "it ends after one step"
    )
    assert estimate(ScheduledRequest(image_tokens=20, step_count=9, image_count=3)) == pytest.approx(0.40)
    assert estimate(ScheduledRequest(image_tokens=20, step_count=9), step_image_limit=1) == pytest.approx(
        0.24
    )
    both = [ScheduledRequest(image_tokens=30, step_count=9), ScheduledRequest(image_tokens=20, step_count=9)]
    assert estimate(*both) == pytest.approx(0.36), "only the first of them fits next to it"


@settings(deadline=None)
@given(
    budget=st.sampled_from([0, 100, 350, 2000]),
    companions=st.integers(0, 12),
    step_count=st.integers(1, 5),
    urgency=st.sampled_from([Urgency.INTERACTIVE, Urgency.BATCH]),
    steps_before=st.integers(0, 3),
    slack=st.sampled_from([0.999, 1.001]),
)
def test_a_deadline_is_refused_exactly_when_a_trial_run_misses_it(
    budget, companions, step_count, urgency, steps_before, slack
):
    def crowded() -> Device:
        device = Device(SchedulerConfig(token_budget=budget, aging_seconds=math.inf))
        device.scheduler.step_times.observe([100], 100 * SECONDS_PER_TOKEN)
        for _ in range(companions):
            device.submit(ScheduledRequest(image_tokens=100, step_count=step_count, urgency=urgency))
        for _ in range(min(steps_before, step_count - 1) if budget == 2000 else 0):
            device.step()
        return device

    request = ScheduledRequest(image_tokens=100, step_count=step_count)
    trial = crowded()
    job, began = trial.submit(request), trial.now
    while not job.is_finished:
        trial.step()
    device = crowded()
    deadline = began + (trial.now - began) * slack
    timed = ScheduledRequest(image_tokens=100, step_count=step_count, deadline=deadline)
    if slack < 1:
        with pytest.raises(DeadlineUnreachable):
            device.submit(timed)
    else:
        assert device.submit(timed).is_ready


def test_a_deadline_is_not_refused_before_anything_was_measured():
    device = Device(SchedulerConfig())
    device.submit(ScheduledRequest(image_tokens=1000, step_count=1000))
    device.submit(ScheduledRequest(image_tokens=1000, step_count=1000, deadline=0.001))


def test_step_times_follow_the_device_and_keep_size_classes_apart():
    times = StepTimes(weight=0.5)
    assert times.seconds(64) is None
    times.observe([64, 64], 1.28)
    assert times.seconds(64) == pytest.approx(0.64)
    assert times.seconds(4096) is None
    for _ in range(30):
        times.observe([64], 0.064)
    assert times.seconds(64) == pytest.approx(0.064, rel=0.01)


def test_step_times_keep_sizes_of_steps_apart_and_take_the_nearest():
    times = StepTimes(weight=1.0)
    times.observe([64], 0.64)
    assert times.seconds(64, 6400) == pytest.approx(0.64), "one alone is all that was measured"
    times.observe([64] * 16, 0.64)
    assert times.seconds(64) == pytest.approx(0.64)
    assert times.seconds(64, 64 * 16) == pytest.approx(0.04)
    assert times.seconds(64, 64 * 100) == pytest.approx(0.04)
    assert times.seconds(64, 64 * 2) == pytest.approx(0.64)
    assert times.seconds(64, 64 * 4) == pytest.approx(0.04), "of two that are equally near the larger"
    assert times.seconds(640, 64 * 16) is None

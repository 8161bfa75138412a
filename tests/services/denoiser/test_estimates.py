"""What is said of times: how long requests wait, and which deadlines are hopeless."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.estimates import StepTimes
from klein_services.denoiser.job import JobSpec, Urgency
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.errors import DeadlineUnreachable
from tests.services.fakes.simulated_device import SECONDS_PER_TOKEN, Device, specs


@settings(deadline=None)
@given(batch=st.lists(specs, min_size=1, max_size=8))
def test_estimated_wait_is_unknown_before_and_exact_after_measuring(batch):
    device = Device(SchedulerConfig(ageing_seconds=math.inf, queue_limit=99))
    plain = [
        JobSpec(
            image_tokens=spec.image_tokens,
            step_count=spec.step_count,
            image_count=spec.image_count,
            urgency=spec.urgency,
        )
        for spec in batch
    ]
    jobs = [device.submit(spec) for spec in plain]
    for job in jobs:
        is_first = device.scheduler.jobs[0] is job
        assert device.scheduler.estimated_wait(job) == (0.0 if is_first else None)
    for spec in plain:
        device.scheduler.step_times.observe([spec.image_tokens], spec.image_tokens * SECONDS_PER_TOKEN)
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
        device.submit(JobSpec(image_tokens=100, step_count=4, urgency=Urgency.INTERACTIVE))
    needed = (load + 1) * 4 * 100 * SECONDS_PER_TOKEN
    spec = JobSpec(image_tokens=100, step_count=4, deadline=needed * slack)
    if slack < 0.999:
        with pytest.raises(DeadlineUnreachable):
            device.submit(spec)
        assert len(device.scheduler.jobs) == load
    elif slack > 1.001:
        job = device.submit(spec)
        device.run()
        assert job in device.done


@pytest.mark.parametrize("urgency", [Urgency.INTERACTIVE, Urgency.BATCH])
def test_those_that_share_its_steps_count_in_what_a_request_takes(urgency):
    """On a device that one image fills, eight in a step take eight times as long, whoever goes first."""
    for deadline, is_hopeless in ((6.0, True), (31.99, True), (32.0, False)):
        device = Device(SchedulerConfig(token_budget=100_000))
        device.scheduler.step_times.observe([1000], 1.0)
        for _ in range(7):
            device.submit(JobSpec(image_tokens=1000, step_count=4, urgency=urgency))
        spec = JobSpec(image_tokens=1000, step_count=4, deadline=deadline)
        if is_hopeless:
            with pytest.raises(DeadlineUnreachable) as refusal:
                device.submit(spec)
            assert refusal.value.estimated_seconds == pytest.approx(32.0)
        else:
            job = device.submit(spec)
            device.run()
            assert job in device.done


def test_a_request_alone_is_measured_by_itself():
    device = Device(SchedulerConfig(token_budget=100_000))
    device.scheduler.step_times.observe([1000], 1.0)
    with pytest.raises(DeadlineUnreachable):
        device.submit(JobSpec(image_tokens=1000, step_count=4, deadline=3.99))
    assert device.submit(JobSpec(image_tokens=1000, step_count=4, deadline=4.0)).is_ready


def test_what_packing_gains_is_learned_so_that_company_is_no_reason_to_refuse():
    """On a device that eight images fill, eight in a step take as long as one."""
    device = Device(SchedulerConfig(token_budget=8000))
    device.scheduler.step_times.observe([1000], 1.0)
    device.scheduler.step_times.observe([1000] * 8, 1.0)
    for _ in range(7):
        device.submit(JobSpec(image_tokens=1000, step_count=4))
    assert device.submit(JobSpec(image_tokens=1000, step_count=4, deadline=4.0)).is_ready
    with pytest.raises(DeadlineUnreachable):
        device.submit(JobSpec(image_tokens=1000, step_count=4, deadline=3.99))
    waiting = device.scheduler.load(JobSpec(image_tokens=1000, step_count=1), device.now)
    assert waiting.estimated_wait_seconds == pytest.approx(4.0)


def test_company_that_does_not_fit_or_ends_early_counts_no_more_than_it_does():
    def estimate(*companions: JobSpec, **limits) -> float:
        device = Device(SchedulerConfig(token_budget=100, **limits))
        for size_tokens in (10, 20, 30, 60):
            device.scheduler.step_times.observe([size_tokens], size_tokens * SECONDS_PER_TOKEN)
        for companion in companions:
            device.submit(companion)
        with pytest.raises(DeadlineUnreachable) as refusal:
            device.submit(JobSpec(image_tokens=60, step_count=4, urgency=Urgency.INTERACTIVE, deadline=1e-9))
        return refusal.value.estimated_seconds

    assert estimate() == pytest.approx(0.24)
    assert estimate(JobSpec(image_tokens=60, step_count=9)) == pytest.approx(0.24), "no room beside it"
    assert estimate(JobSpec(image_tokens=20, step_count=9)) == pytest.approx(0.32)
    assert estimate(JobSpec(image_tokens=20, step_count=1)) == pytest.approx(0.26), "it ends after one step"
    assert estimate(JobSpec(image_tokens=20, step_count=9, image_count=3)) == pytest.approx(0.40)
    assert estimate(JobSpec(image_tokens=20, step_count=9), step_image_limit=1) == pytest.approx(0.24)
    both = [JobSpec(image_tokens=30, step_count=9), JobSpec(image_tokens=20, step_count=9)]
    assert estimate(*both) == pytest.approx(0.36), "one of them fits beside it, the first"


@settings(deadline=None)
@given(
    budget=st.sampled_from([0, 100, 350, 2000]),
    companions=st.integers(0, 12),
    step_count=st.integers(1, 5),
    urgency=st.sampled_from([Urgency.INTERACTIVE, Urgency.BATCH]),
    steps_before=st.integers(0, 3),
    slack=st.sampled_from([0.999, 1.001]),
)
def test_among_equals_exactly_the_hopeless_are_refused(
    budget, companions, step_count, urgency, steps_before, slack
):
    def crowded() -> Device:
        device = Device(SchedulerConfig(token_budget=budget, ageing_seconds=math.inf))
        device.scheduler.step_times.observe([100], 100 * SECONDS_PER_TOKEN)
        for _ in range(companions):
            device.submit(JobSpec(image_tokens=100, step_count=step_count, urgency=urgency))
        for _ in range(min(steps_before, step_count - 1) if budget == 2000 else 0):
            device.step()
        return device

    spec = JobSpec(image_tokens=100, step_count=step_count)
    trial = crowded()
    job, began = trial.submit(spec), trial.now
    while not job.is_finished:
        trial.step()
    device = crowded()
    deadline = began + (trial.now - began) * slack
    timed = JobSpec(image_tokens=100, step_count=step_count, deadline=deadline)
    if slack < 1:
        with pytest.raises(DeadlineUnreachable):
            device.submit(timed)
    else:
        assert device.submit(timed).is_ready


def test_nothing_is_refused_on_a_guess():
    device = Device(SchedulerConfig())
    device.submit(JobSpec(image_tokens=1000, step_count=1000))
    device.submit(JobSpec(image_tokens=1000, step_count=1000, deadline=0.001))


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

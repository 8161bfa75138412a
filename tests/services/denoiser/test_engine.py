"""Engine with a simulated device: failures, the requests that they affect, and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref

import pytest
import torch

from klein_core.denoiser.sampler import Trajectory
from klein_core.errors import InvalidInput
from klein_services.denoiser import estimates
from klein_services.denoiser.engine import Engine, clear_traceback_frames
from klein_services.denoiser.estimates import GROWTH_STEPS, StepBudget
from klein_services.denoiser.events import Event, EventChannel, Finished, Preview, StepDone
from klein_services.denoiser.request_state import RequestState
from klein_services.denoiser.scheduled_request import OPERATION, STAGE, ScheduledRequest
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig
from klein_services.runtime.errors import DeadlinePassed, DeviceOutOfMemory
from tests.services.fakes.denoiser_server import eventually
from tests.services.fakes.simulated_device import metric

IMAGE_TOKENS = 20


def trajectory(step_count: int, kind: type[Trajectory] = Trajectory) -> Trajectory:
    return kind.from_noise(
        seed=0, rows=4, columns=4, channels=4, step_count=step_count, prompt_embedding=torch.zeros(4, 8)
    )


def advance(trajectories) -> None:
    """Steps as `packed_step` does, without a network."""
    if any(each.finished for each in trajectories):
        raise InvalidInput.of("trajectories", "includes a finished one")
    for each in trajectories:
        each.step_index += 1


class Caller:
    """One request and the events that it gets."""

    def __init__(
        self, engine: Engine, *, step_count: int, kind=Trajectory, images: int = 1, deadline=None, **state
    ) -> None:
        self.channel = EventChannel(asyncio.get_running_loop())
        self.request = ScheduledRequest(
            image_tokens=IMAGE_TOKENS, step_count=step_count, image_count=images, deadline=deadline
        )
        engine.admit(self.request, self.channel)
        trajectories = [trajectory(step_count, kind) for _ in range(images)]
        state = RequestState(trajectories=trajectories, image_tokens=IMAGE_TOKENS, **state)
        engine.submit(self.request, state)

    async def events(self) -> list[Event]:
        """Takes events until the last; raises what the request failed with."""
        heard: list[Event] = []
        async with asyncio.timeout(30):
            while not any(isinstance(event, Finished) for event in heard):
                heard += await self.channel.take()
        return heard


@contextlib.contextmanager
def engine_of(step, token_budget: int = 1000, **settings):
    engine = Engine(Scheduler(SchedulerConfig(token_budget=token_budget)), step, **settings)
    try:
        yield engine
    finally:
        engine.close()


class Activations:
    """Stands for a step's tensors: an object that can be watched."""


async def test_a_failed_steps_tensors_are_gone_when_its_requests_are_tried_one_by_one():
    held: list[weakref.ref[Activations]] = []
    alive: list[bool] = []

    def step(trajectories) -> None:
        alive.extend(reference() is not None for reference in held)
        activations = Activations()
        if len(trajectories) > 1:
            held.append(weakref.ref(activations))
            try:
                raise ValueError("a cause holds frames too")
            except ValueError as error:
                raise torch.OutOfMemoryError("CUDA out of memory") from error
        advance(trajectories)

    with engine_of(step) as engine:
        callers = [Caller(engine, step_count=1) for _ in range(2)]
        engine.start()
        for caller in callers:
            await caller.events()
    assert alive == [False, False]


async def test_a_failure_that_a_caller_keeps_keeps_no_tensors():
    held: list[weakref.ref[Activations]] = []

    def step(trajectories) -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with engine_of(step) as engine:
        caller = Caller(engine, step_count=1)
        engine.start()
        with pytest.raises(DeviceOutOfMemory) as failure:
            await caller.events()
    assert failure.value.__cause__.__traceback__ is not None
    assert [reference() for reference in held] == [None]


def test_frames_are_released_along_causes_and_contexts_even_in_a_circle():
    held = []

    def fail(message: str) -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise ValueError(message)

    errors = []
    for message in ("error", "cause", "context"):
        try:
            fail(message)
        except ValueError as error:
            errors.append(error)
    errors[0].__cause__, errors[0].__context__ = errors[1], errors[2]
    errors[2].__context__ = errors[0]
    clear_traceback_frames(errors[0])
    assert [reference() for reference in held] == [None] * 3


class Unpreviewed(Trajectory):
    def preview(self):
        raise torch.OutOfMemoryError("CUDA out of memory")


class LostDuringPreview(Trajectory):
    def preview(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_a_preview_that_fails_ends_its_own_request_only_and_no_step_is_repeated():
    steps = []

    def step(trajectories) -> None:
        steps.append(len(trajectories))
        advance(trajectories)

    with engine_of(step) as engine:
        failing = Caller(engine, step_count=2, kind=Unpreviewed, preview_interval_steps=1)
        finished = Caller(engine, step_count=1)
        running = Caller(engine, step_count=2, preview_interval_steps=1)
        engine.start()
        with pytest.raises(DeviceOutOfMemory):
            await failing.events()
        assert isinstance((await finished.events())[-1], Finished)
        heard = await running.events()
        load = engine.load(ScheduledRequest(image_tokens=IMAGE_TOKENS, step_count=1))
    assert steps == [3, 1]
    assert [event.step for event in heard if isinstance(event, StepDone | Preview)][-1] == 2
    assert (load.queued_count, load.running_count) == (0, 0)


async def test_a_device_lost_during_a_preview_fails_all_requests():
    with engine_of(advance, token_budget=0) as engine:
        lost = Caller(engine, step_count=2, kind=LostDuringPreview, preview_interval_steps=1)
        waiting = Caller(engine, step_count=2)
        engine.start()
        for caller in (lost, waiting):
            with pytest.raises(Exception, match="illegal memory access"):
                await caller.events()
        with pytest.raises(Exception, match="illegal memory access"):
            Caller(engine, step_count=1)


def booked() -> dict[str, float]:
    return {
        "abandoned seconds": metric("klein_abandoned_work_seconds_total", stage=STAGE),
        "missed": metric("klein_deadline_missed_total", stage=STAGE),
        "served seconds": metric("klein_stage_duration_seconds_sum", stage=STAGE, operation=OPERATION),
    }


@pytest.mark.parametrize(
    ("ends", "missed"), [("cancelled", 0), ("late", 1), ("at its deadline", 1), ("in time", None)]
)
async def test_a_request_that_leaves_during_its_last_step_counts_as_abandoned(ends, missed):
    now, gate, steps = [0.0], threading.Event(), []

    def step(trajectories) -> None:
        steps.append(len(trajectories))
        if len(steps) == 4:
            assert gate.wait(30)
        now[0] += 1.0
        advance(trajectories)

    before = booked()
    with engine_of(step, clock=lambda: now[0]) as engine:
        deadline = {"late": 3.5, "at its deadline": 4.0}.get(ends, 4.5)
        caller = Caller(engine, step_count=4, deadline=deadline)
        engine.start()
        await eventually(lambda: len(steps) == 4)
        if ends == "cancelled":
            engine.cancel(caller.request)
        gate.set()
        if missed is None:
            assert isinstance((await caller.events())[-1], Finished)
        else:
            with pytest.raises(DeadlinePassed):
                await caller.events()
    change = {name: value - before[name] for name, value in booked().items()}
    is_served = missed is None
    expected = {
        "abandoned seconds": 0 if is_served else 4,
        "missed": missed or 0,
        "served seconds": 4 if is_served else 0,
    }
    assert change == pytest.approx(expected)


async def test_out_of_memory_cuts_the_budget_which_full_steps_bring_back(monkeypatch):
    monkeypatch.setattr(estimates, "GROWTH_STEPS", 3)
    steps: list[int] = []
    budgets: list[float] = []

    def step(trajectories) -> None:
        budgets.append(metric("klein_denoise_step_token_budget", stage="denoiser"))
        steps.append(len(trajectories))
        if len(steps) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(trajectories)

    with engine_of(step, token_budget=4 * IMAGE_TOKENS) as engine:
        callers = [Caller(engine, step_count=5) for _ in range(4)]
        engine.start()
        for caller in callers:
            await caller.events()
        assert engine.load(ScheduledRequest(image_tokens=IMAGE_TOKENS, step_count=1)).capacity == 4
    # Four alone after the failure do not count; three of two images each do.
    assert steps[:9] == [4, 1, 1, 1, 1, 2, 2, 2, 4]
    assert [budget // IMAGE_TOKENS for budget in budgets[:9]] == [4, 2, 2, 2, 2, 2, 2, 2, 4]


def test_a_budget_grows_after_so_many_full_steps_and_never_beyond_its_first_value():
    budget = StepBudget(100, image_limit=8)
    budget.cut(failed_tokens=90)
    assert budget.tokens == 45
    budget.cut(failed_tokens=1000)
    assert budget.tokens == 45, "a step larger than the budget does not raise it"
    for _ in range(GROWTH_STEPS - 1):
        assert not budget.record_success(23)
    for _ in range(GROWTH_STEPS):
        assert not budget.record_success(22), "half full or less"
    assert budget.record_success(23)
    assert budget.tokens == 90
    for _ in range(GROWTH_STEPS - 1):
        assert not budget.record_success(200)
    assert budget.record_success(200)
    assert budget.tokens == 100
    assert not any(budget.record_success(100) for _ in range(2 * GROWTH_STEPS))


def test_a_cut_starts_the_count_anew():
    budget = StepBudget(100, image_limit=8)
    budget.cut(80)
    for _ in range(GROWTH_STEPS - 1):
        budget.record_success(40)
    budget.cut(40)
    assert budget.tokens == 20
    assert not any(budget.record_success(20) for _ in range(GROWTH_STEPS - 1))
    assert budget.record_success(20)

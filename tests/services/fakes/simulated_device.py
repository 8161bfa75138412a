"""Simulated device, driven by a real scheduler, whose steps take time in proportion to their tokens; metrics."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from prometheus_client import REGISTRY

from klein_services.denoiser.scheduled_request import Batch, ScheduledRequest
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig
from klein_services.runtime.urgency import Urgency

SECONDS_PER_TOKEN = 0.001

requests = st.builds(
    ScheduledRequest,
    image_tokens=st.integers(1, 300),
    step_count=st.integers(1, 5),
    image_count=st.integers(1, 4),
    urgency=st.sampled_from(Urgency),
    deadline=st.none() | st.floats(0.1, 20),
)


def metric(name: str, **labels: str) -> float:
    """Returns a metric's exported value; 0 before it is first counted."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def activate(scheduler: Scheduler, request: ScheduledRequest, now: float) -> None:
    """Makes an admitted request ready at the cost with which it was admitted."""
    scheduler.activate(
        request,
        now,
        image_tokens=request.image_tokens,
        memory_bytes=request.memory_bytes,
        cache=request.cache,
    )


class Device:
    """Runs a scheduler in simulated time and records everything that it decides."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)
        self.now = 0.0
        self.batches: list[Batch] = []
        self.done: list[ScheduledRequest] = []
        self.gone: list[ScheduledRequest] = []
        self.items: Counter[tuple[int, int | None, int]] = Counter()

    def submit(self, request: ScheduledRequest) -> ScheduledRequest:
        self.scheduler.admit(request, self.now)
        activate(self.scheduler, request, self.now)
        return request

    def step(self) -> Batch | None:
        self.gone += self.scheduler.reap(self.now)
        batch = self.scheduler.schedule(self.now)
        if batch is None:
            return None
        for item in batch.items:
            self.items[item.request.sequence, item.image, item.request.steps_done] += 1
        seconds = batch.tokens * SECONDS_PER_TOKEN
        self.now += seconds
        self.batches.append(batch)
        self.done += self.scheduler.on_step_done(batch, seconds)
        return batch

    def run(self) -> None:
        while self.step():
            pass

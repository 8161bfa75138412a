"""A device whose steps take a time in proportion to their tokens, and a scheduler that decides for it."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st

from klein_services.denoiser.job import Job, JobSpec, Plan, Urgency
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig

SECONDS_PER_TOKEN = 0.001

specs = st.builds(
    JobSpec,
    image_tokens=st.integers(1, 300),
    step_count=st.integers(1, 5),
    image_count=st.integers(1, 4),
    urgency=st.sampled_from(Urgency),
    deadline=st.none() | st.floats(0.1, 20),
)


class Device:
    """Runs a scheduler against simulated time and notes everything that it decides."""

    def __init__(self, limits: SchedulerConfig) -> None:
        self.scheduler = Scheduler(limits)
        self.now = 0.0
        self.plans: list[Plan] = []
        self.done: list[Job] = []
        self.gone: list[Job] = []
        self.units: Counter[tuple[int, int, int]] = Counter()

    def submit(self, spec: JobSpec) -> Job:
        job = self.scheduler.admit(spec, self.now)
        self.scheduler.make_ready(job, spec, self.now)
        return job

    def step(self) -> Plan | None:
        self.gone += self.scheduler.sweep(self.now)
        plan = self.scheduler.choose(self.now)
        if plan is None:
            return None
        for unit in plan.units:
            self.units[unit.job.sequence, unit.image, unit.job.steps_done] += 1
        seconds = plan.tokens * SECONDS_PER_TOKEN
        self.now += seconds
        self.plans.append(plan)
        self.done += self.scheduler.complete(plan, seconds)
        return plan

    def run(self) -> None:
        while self.step():
            pass

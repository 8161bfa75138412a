"""What a caught exception keeps alive."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

import torch

from klein_core.denoiser.sampler import Trajectory
from klein_core.errors import DeviceFault
from klein_services.denoiser.events import EventChannel, Queued, Started
from klein_services.denoiser.job import (
    Job,
    JobSpec,
    Plan,
    Unit,
    observe_abandoned,
    observe_budget,
    observe_finished,
    observe_load,
    observe_started,
    observe_step,
)
from klein_services.denoiser.request_state import CacheReferences, Run, Step, tell_finished, tell_progress
from klein_services.denoiser.scheduler import Load, Scheduler
from klein_services.runtime.errors import DeadlinePassed, DeviceOutOfMemory, StageUnavailable, as_device_fault


def clear_traceback_frames(error: BaseException) -> None:
    """Drops the locals of all finished calls that an error, its causes and its contexts came through.

    A traceback keeps frames and frames keep their locals: for a step, gigabytes on the device, as long as anybody keeps
    the error. Files and lines, which logs show, stay.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            pending += [each.__cause__, each.__context__]


IDLE_SECONDS = 0.5
"""How often requests that wait for their tensors are looked at while the device has nothing to do."""
CLOSE_SECONDS = 5.0
"""How long `close` waits for a step that runs."""
_log = logging.getLogger("klein.denoiser")


class Engine:
    """Owns the scheduler and the thread; every public method may be called from any thread.

    The lock is held between two steps only, so callers never wait for the device.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step: Step,
        cache_references: CacheReferences | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`cache_references` is needed by requests whose spec names a cache."""
        self.clock = clock
        self._scheduler = scheduler
        self._step = step
        self._cache_references = cache_references
        self._changed = threading.Condition()
        self._outboxes: dict[Job, EventChannel] = {}
        self._runs: dict[Job, Run] = {}
        self._positions: dict[Job, int] = {}
        self._unavailable: Exception | None = None
        # A daemon: a step that cannot be interrupted must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._loop, name="denoiser-steps", daemon=True)

    def start(self) -> None:
        """Begins to take steps."""
        observe_budget(self._scheduler.budget.tokens)
        self._thread.start()

    def admit(self, spec: JobSpec, outbox: EventChannel) -> Job:
        """Reserves a place in the queue; `submit` must follow, or `cancel`.

        Raises:
            QueueFull, DeadlineUnreachable: see the scheduler.
            StageUnavailable: the engine is closing.
            DeviceFault: the device was lost, which ends the server.
        """
        with self._changed:
            if self._unavailable is not None:
                raise self._unavailable
            job = self._scheduler.admit(spec, self.clock())
            self._outboxes[job] = outbox
            self._tell_positions()
            self._changed.notify()
        return job

    def submit(self, job: Job, spec: JobSpec, run: Run) -> None:
        """Hands over an admitted request's tensors; it joins between two steps. No effect once it has left.

        Raises:
            QueueFull, DeadlineUnreachable: `spec`, which now knows the tensors' sizes, asks for too much.
        """
        with self._changed:
            if job in self._outboxes:
                self._scheduler.make_ready(job, spec, self.clock())
                self._runs[job] = run
                self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Lets a request leave at the next step boundary; no effect once it has left."""
        with self._changed:
            self._scheduler.cancel(job)
            self._changed.notify()

    def load(self, newcomer: JobSpec) -> Load:
        """Tells how busy the engine is, and how long a `newcomer` would wait."""
        with self._changed:
            return self._scheduler.load(newcomer, self.clock())

    def close(self) -> None:
        """Ends the loop after the step that runs; requests that are left fail as unavailable."""
        with self._changed:
            self._unavailable = self._unavailable or StageUnavailable("the denoiser is shutting down")
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        with torch.inference_mode():
            while (plan := self._next()) is not None:
                self._tell_started(plan)
                if self._execute(plan):
                    self._book_success(plan)

    def _next(self) -> Plan | None:
        """Waits for something to do; `None` means that the engine is closed."""
        with self._changed:
            while self._unavailable is None:
                self._dismiss(self._scheduler.sweep(self.clock()))
                plan = self._scheduler.choose(self.clock())
                self._tell_positions()
                if plan is not None:
                    return plan
                self._changed.wait(IDLE_SECONDS if self._outboxes else None)
            self._fail(self._scheduler.jobs, self._unavailable)
        return None

    def _execute(self, plan: Plan) -> bool:
        """Does a plan, in smaller ones if it must; returns whether it was done as it is."""
        error = self._attempt(plan)
        if error is not None:
            self._recover(plan, error)
        return error is None

    def _attempt(self, plan: Plan) -> Exception | None:
        """Does a plan and tells of it; returns why it could not be done, for the callers concerned."""
        begun = self.clock()
        try:
            self._compute(plan)
            seconds = self.clock() - begun
            with self._changed:
                finished = self._scheduler.complete(plan, seconds)
        except Exception as error:
            # Whoever keeps the error must not keep the step's tensors: the next try needs their memory.
            clear_traceback_frames(error)
            return error
        observe_step(plan, seconds, self._scheduler.budget.tokens)
        self._report(plan, finished)
        return None

    def _compute(self, plan: Plan) -> None:
        for unit in plan.units:
            if unit.image is None:
                self._make_cache(unit.job)
        trajectories = [
            self._trajectory(unit.job, unit.image) for unit in plan.units if unit.image is not None
        ]
        if trajectories:
            self._step(trajectories)

    def _make_cache(self, job: Job) -> None:
        caches, wanted = self._scheduler.caches, job.spec.cache
        if wanted is None or job.has_cache:  # the second time that a failed plan's units are tried
            return
        if self._cache_references is None:
            raise RuntimeError("a request names a reference cache, which this model has no use for")
        run = self._runs[job]
        caches.make_room(wanted.size_bytes)
        caches.add(wanted.key, self._cache_references(run.cached_references, run.adapters))
        job.has_cache = True

    def _report(self, plan: Plan, finished: Sequence[Job]) -> None:
        """Tells the requests whose step is complete; what fails here fails its own request only."""
        for job in dict.fromkeys(unit.job for unit in plan.units if unit.image is not None):
            try:
                self._tell(job, is_finished=job in finished)
            except Exception as error:
                clear_traceback_frames(error)
                self._give_up([job], as_device_fault(error))

    def _tell(self, job: Job, *, is_finished: bool) -> None:
        outbox, run = self._outboxes[job], self._runs[job]
        if is_finished and job.is_unwanted(self.clock()):
            with self._changed:
                self._dismiss([job])
        elif is_finished:
            tell_finished(job, run, outbox, self.clock())
            observe_finished(job)
            with self._changed:
                self._forget(job)
        elif job.next_image == 0:
            tell_progress(job, run, outbox)

    def _recover(self, plan: Plan, error: Exception) -> None:
        """Finds who is concerned: everybody when the device is lost, else those who fail on their own too."""
        fault = as_device_fault(error)
        units = [unit for unit in plan.units if unit.job in self._runs]
        is_full = isinstance(fault, DeviceOutOfMemory)
        has_gained_memory = is_full and self._scheduler.caches.drop_unused()
        may_help = not _is_lost(fault) and (len(units) > 1 or has_gained_memory)
        if not may_help or not all(map(self._is_untouched, units)):
            self._give_up((unit.job for unit in units), fault)
            return
        _log.warning("a step failed; its requests are tried one by one", exc_info=error)
        if is_full and len(units) > 1:
            self._cut_budget(plan)
        self._execute_singly(units)

    def _give_up(self, jobs: Iterable[Job], fault: Exception) -> None:
        """Fails requests; a lost device ends the loop, and with it everybody else."""
        with self._changed:
            self._fail(jobs, fault)
            if _is_lost(fault):
                self._unavailable = fault

    def _execute_singly(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if unit.job in self._runs:
                self._execute(Plan((unit,)))

    def _is_untouched(self, unit: Unit) -> bool:
        """Whether the failed step left the image as it was."""
        if unit.image is None:
            return True
        return self._trajectory(unit.job, unit.image).step_index == unit.job.steps_done

    def _cut_budget(self, plan: Plan) -> None:
        budget = self._scheduler.budget
        with self._changed:
            budget.cut(plan.tokens)
        observe_budget(budget.tokens)
        _log.warning("out of memory: steps are now at most %d tokens", budget.tokens)

    def _book_success(self, plan: Plan) -> None:
        budget = self._scheduler.budget
        with self._changed:
            has_grown = budget.book_success(plan.tokens)
        if has_grown:
            observe_budget(budget.tokens)
            _log.info("memory suffices: steps are at most %d tokens again", budget.tokens)

    def _fail(self, jobs: Iterable[Job], error: BaseException) -> None:
        for job in dict.fromkeys(jobs):
            self._scheduler.remove([job])
            if job in self._outboxes:
                self._outboxes[job].fail(error)
                self._forget(job)

    def _dismiss(self, jobs: Iterable[Job]) -> None:
        """Lets go of requests that were cancelled or expired; nobody may be left to hear of it."""
        for job in jobs:
            observe_abandoned(job, is_late=job.is_expired(self.clock()))
            self._outboxes[job].fail(DeadlinePassed())
            self._forget(job)

    def _forget(self, job: Job) -> None:
        if job.has_cache and job.spec.cache is not None:
            self._scheduler.caches.release(job.spec.cache.key)
            job.has_cache = False
        for known in (self._outboxes, self._runs, self._positions):
            known.pop(job, None)
        observe_load(self._scheduler.queued_count, self._scheduler.running_count)

    def _tell_positions(self) -> None:
        for position, job in enumerate(self._scheduler.jobs):
            if not job.is_started and self._positions.get(job) != position:
                self._positions[job] = position
                self._outboxes[job].post(Queued(position, self._scheduler.estimated_wait(job)))
        observe_load(self._scheduler.queued_count, self._scheduler.running_count)

    def _tell_started(self, plan: Plan) -> None:
        for job in plan.starting:
            queue_seconds = (job.started_at or job.admitted_at) - job.admitted_at
            observe_started(queue_seconds)
            self._outboxes[job].post(Started(queue_seconds))

    def _trajectory(self, job: Job, image: int) -> Trajectory:
        trajectory = self._runs[job].trajectories[image]
        if job.has_cache and job.spec.cache is not None:
            trajectory.reference_cache = self._scheduler.caches.get(job.spec.cache.key)
        return trajectory


def _is_lost(fault: Exception) -> bool:
    """Whether the device itself is gone."""
    return isinstance(fault, DeviceFault) and not isinstance(fault, DeviceOutOfMemory)

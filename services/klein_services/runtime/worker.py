"""Worker: threads that compute, and the bounded queue in front of them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from klein_core.errors import DeviceFault
from klein_services.runtime import metrics, tracing
from klein_services.runtime.caller import caller
from klein_services.runtime.errors import (
    DeadlinePassed,
    DeviceOutOfMemory,
    StageUnavailable,
    as_device_fault,
)
from klein_services.runtime.semantic_conventions import QUEUE
from klein_services.runtime.urgency import Urgency
from klein_services.runtime.work_queue import Batch, Work, WorkQueue

_STOP_SECONDS = 1.0
_Item = TypeVar("_Item")
_Value = TypeVar("_Value")
_log = logging.getLogger("klein.worker")


@dataclass(frozen=True)
class Completed(Generic[_Value]):
    """Result of a function, and the time it took."""

    value: _Value
    queue_seconds: float
    compute_seconds: float
    """Of a batch, this work's share."""


@dataclass(eq=False, kw_only=True)
class _Job(Work):
    function: Callable[[Sequence[Any]], Sequence[Any]]
    """Computes items of equal jobs."""
    item: Any
    future: asyncio.Future[Completed[Any]]
    context: contextvars.Context


class Worker:
    """Runs functions on its own thread, so that the event loop never computes; `WorkQueue` decides the order.

    Args:
        name: the stage's name, the `stage` label of its metrics.
        queue_limit: most functions that wait for the running ones; more are refused.
        operations: the `operation` of each `run`, so that its metrics exist from the start.
        thread_count: functions that run at once. Of those with large images only one runs at a time.
        pixel_limit: most pixels of large images that wait or run; 0 is no limit.
    """

    def __init__(
        self,
        name: str,
        queue_limit: int,
        operations: Sequence[str] = (),
        *,
        thread_count: int = 1,
        pixel_limit: int = 0,
    ) -> None:
        self.name = name
        self.queue_limit = queue_limit
        self._queue = WorkQueue[_Job](queue_limit, pixel_limit, thread_count)
        self._closed = False
        self._changed = threading.Condition()
        metrics.initialize_queue(name, operations)
        metrics.QUEUE_LARGE_PIXELS.labels(name)
        # Daemons, so that a load or a step that cannot be interrupted does not keep a stopped process alive.
        self._threads = [
            threading.Thread(
                target=self._work, name=f"{name}-worker" + (f"-{index}" if index else ""), daemon=True
            )
            for index in range(thread_count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_count(self) -> int:
        """Functions that wait."""
        return len(self._queue)

    @property
    def running_count(self) -> int:
        """Functions that run."""
        return len(self._queue.running)

    @property
    def estimated_wait_seconds(self) -> float | None:
        """Time until a function that is queued now would start; `None` before any operation was measured."""
        with self._changed:
            queue = self._queue
            return queue.backlog_seconds / len(self._threads) if queue.times.is_measured else None

    async def run(
        self,
        function: Callable[[], _Value],
        *,
        operation: str = "",
        deadline: float | None = None,
        urgency: Urgency = Urgency.STANDARD,
        pixel_count: int = 0,
    ) -> Completed[_Value]:
        """Runs a function on the worker, with the context variables of the current task, and waits for it.

        The caller among whom time is shared is that of the current task.

        When the task is cancelled, a waiting function is dropped. A running one goes on, and its time counts as
        abandoned.

        Args:
            function: what to compute.
            operation: label of `klein_stage_duration_seconds` and name of the span; empty is not measured.
            deadline: `time.monotonic()` after which the function is not started.
            urgency: its priority class.
            pixel_count: pixels of the image that it works on, by which its time is estimated.

        Raises:
            QueueFull: too many functions wait, or pixels; raised at once.
            DeadlineUnreachable: by measured times, the function would end after its deadline; raised at once.
            DeadlinePassed: the deadline passed while the function waited.
            StageUnavailable: the worker is closed.
            DeviceFault: the device failed.
        """
        return await self.run_together(
            _call_each,
            function,
            None,
            operation=operation,
            deadline=deadline,
            urgency=urgency,
            pixel_count=pixel_count,
        )

    async def run_together(
        self,
        function: Callable[[Sequence[_Item]], Sequence[_Value]],
        item: _Item,
        batch: Batch | None,
        *,
        operation: str,
        deadline: float | None = None,
        urgency: Urgency = Urgency.STANDARD,
        pixel_count: int = 0,
    ) -> Completed[_Value]:
        """Runs a function on items of which this is one, and waits for this one's result.

        The others are those of calls with equal batches that would run next. When the function fails for several, each
        runs again alone, so that no call fails because of another's item.

        Args:
            function: returns a result for each of several items, in their order.
            item: this call's.
            batch: what it can be computed with; `None` is nothing else.
            operation, deadline, urgency, pixel_count: as for `run`.

        Raises:
            Exception: as `run`.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        job = _Job(
            function=function,
            item=item,
            batch=batch,
            future=loop.create_future(),
            context=contextvars.copy_context(),
            operation=operation,
            pixel_count=pixel_count,
            urgency=urgency,
            caller=caller.get(),
            deadline=deadline,
            queued_at=now,
        )
        with self._changed:
            if self._closed:
                raise StageUnavailable("the stage stops")
            displaced = self._queue.add(job, now)
            if displaced is not None:
                _set_exception(displaced.future, self._queue.full(now))
            self._changed.notify()
        self._count()
        try:
            return await job.future
        except DeadlinePassed:
            metrics.DEADLINE_MISSED.labels(self.name).inc()
            raise
        except asyncio.CancelledError:
            with self._changed:
                self._queue.remove(job)
            if deadline is not None and time.monotonic() >= deadline:
                metrics.DEADLINE_MISSED.labels(self.name).inc()
            future = job.future
            if future.done() and not future.cancelled() and future.exception() is None:
                metrics.ABANDONED_SECONDS.labels(self.name).inc(future.result().compute_seconds)
            self._count()
            raise

    def close(self) -> None:
        """Refuses the waiting functions and ends the threads; waits at most 1 s for running functions."""
        with self._changed:
            self._closed = True
            refused = self._queue.clear()
            self._changed.notify_all()
        for job in refused:
            _set_exception(job.future, StageUnavailable("the stage stops"))
        self._count()
        ends_at = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(ends_at - time.monotonic(), 0.0))

    def _work(self) -> None:
        while jobs := self._next():
            self._compute(jobs)
            # Frees the last results, perhaps large tensors, before waiting for the next job.
            del jobs

    def _next(self) -> list[_Job]:
        """Waits for work; returns none when the worker is closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                if hold_seconds := self._queue.hold_seconds(now):
                    self._changed.wait(hold_seconds)
                elif jobs := self._queue.take_batch(now):
                    return jobs
                else:
                    self._changed.wait()
            return []

    def _compute(self, taken: list[_Job]) -> None:
        self._count()
        started_at = time.monotonic()
        late = [job for job in taken if job.deadline is not None and started_at > job.deadline]
        for job in late:
            self._end(job, started_at, 0.0, None, DeadlinePassed())
        jobs = [job for job in taken if job not in late]
        if jobs:
            values, error = _outcome(jobs)
            seconds = (time.monotonic() - started_at) / len(jobs)
            if jobs[0].batch is not None:
                metrics.BATCH_WORKS.labels(self.name, jobs[0].operation).observe(len(jobs))
            runs_again = len(jobs) > 1 and error is not None and not _is_lost_device(error)
            for job, value in zip(jobs, values, strict=True):
                if not (runs_again and self._put_back(job, seconds)):
                    self._end(job, started_at, seconds, value, error)
        self._count()

    def _put_back(self, job: _Job, seconds: float) -> bool:
        """Lets a job of a failed batch run again, alone; returns whether it will."""
        with self._changed:
            if self._closed or job.future.done():
                return False
            self._queue.done(job, seconds, is_measured=False)
            self._queue.put_back(job)
            self._changed.notify()
            return True

    def _end(
        self, job: _Job, started_at: float, seconds: float, value: Any, error: BaseException | None
    ) -> None:
        """Accounts for a job and has its result delivered."""
        queue_seconds = started_at - job.queued_at
        exemplar = job.context.run(metrics.exemplar)
        metrics.QUEUE_WAIT_SECONDS.labels(self.name).observe(queue_seconds, exemplar)
        if job.operation and error is None:
            metrics.STAGE_SECONDS.labels(self.name, job.operation).observe(seconds, exemplar)
        with self._changed:
            self._queue.done(job, seconds, is_measured=bool(job.operation) and error is None)
            # A thread may wait because this job was large.
            self._changed.notify()
        self._count()
        completed = Completed(value, queue_seconds, seconds)
        loop = job.future.get_loop()
        try:
            loop.call_soon_threadsafe(self._deliver, job.future, completed, error)
        except RuntimeError:
            _log.debug("a result is dropped because the event loop is closed")

    def _deliver(
        self, future: asyncio.Future[Completed[Any]], completed: Completed[Any], error: BaseException | None
    ) -> None:
        if future.cancelled():
            metrics.ABANDONED_SECONDS.labels(self.name).inc(completed.compute_seconds)
            if error is not None:
                _log.warning("abandoned work failed: %s", error, exc_info=error)
        elif error is not None:
            _set_exception(future, error)
        else:
            future.set_result(completed)

    def _count(self) -> None:
        # Under the lock, so that no thread overwrites newer counts with older ones.
        with self._changed:
            metrics.QUEUE_DEPTH.labels(self.name).set(self.queued_count)
            metrics.RUNNING.labels(self.name).set(self.running_count)
            metrics.BACKLOG_SECONDS.labels(self.name).set(self._queue.backlog_seconds)
            metrics.QUEUE_LARGE_PIXELS.labels(self.name).set(self._queue.large_pixel_count)


def _call_each(functions: Sequence[Callable[[], _Value]]) -> Sequence[_Value]:
    return [function() for function in functions]


def _outcome(jobs: Sequence[_Job]) -> tuple[Sequence[Any], BaseException | None]:
    """Returns the jobs' results, `None` for each if the function failed, and its exception."""
    first, others = jobs[0], jobs[1:]
    started_at = time.monotonic()

    def traced() -> Sequence[Any]:
        items = [job.item for job in jobs]
        if not first.operation:
            return first.function(items)
        tracing.record(QUEUE, first.queued_at, started_at)
        with tracing.span(first.operation):
            return first.function(items)

    values: Sequence[Any] = [None] * len(jobs)
    error: BaseException | None = None
    try:
        computed = first.context.run(traced)
        if len(computed) != len(jobs):
            raise RuntimeError(f"{len(computed)} results of {len(jobs)} works")
        values = computed
    except Exception as raised:
        error = as_device_fault(raised)
    except BaseException as raised:  # SystemExit from a library must not end the only thread that computes
        error = RuntimeError(f"a function ended with {raised!r}")
    ended_at = time.monotonic()
    for job in others:
        job.context.run(tracing.record, QUEUE, job.queued_at, started_at)
        job.context.run(tracing.record, job.operation, started_at, ended_at)
    return values, error


def _is_lost_device(error: BaseException) -> bool:
    return isinstance(error, DeviceFault) and not isinstance(error, DeviceOutOfMemory)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):
        # A future does not accept StopIteration, and the task that awaits it would wait forever.
        error = RuntimeError(f"a function ended with StopIteration({error})")
    future.set_exception(error)

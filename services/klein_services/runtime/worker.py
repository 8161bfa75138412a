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

from klein_services.runtime import metrics, tracing
from klein_services.runtime.caller import caller
from klein_services.runtime.errors import DeadlinePassed, StageUnavailable, as_device_fault
from klein_services.runtime.semantic_conventions import QUEUE
from klein_services.runtime.urgency import Urgency
from klein_services.runtime.work_queue import Work, WorkQueue

_STOP_SECONDS = 1.0
_Value = TypeVar("_Value")
_log = logging.getLogger("klein.worker")


@dataclass(frozen=True)
class Completed(Generic[_Value]):
    """Result of a function, and the time it took."""

    value: _Value
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False, kw_only=True)
class _Job(Work):
    function: Callable[[], Any]
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
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        job = _Job(
            function=function,
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
            self._queue.add(job, now)
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
        while (job := self._next()) is not None:
            self._compute(job)
            # Frees the last result, perhaps a large tensor, before waiting for the next job.
            del job

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._closed:
                job = self._queue.take(time.monotonic())
                if job is not None:
                    return job
                self._changed.wait()
            return None

    def _compute(self, job: _Job) -> None:
        self._count()
        started_at = time.monotonic()
        queue_seconds = started_at - job.queued_at
        value: Any = None
        error: BaseException | None
        if job.deadline is not None and started_at > job.deadline:
            error = DeadlinePassed()
        else:
            value, error = _outcome(job)
        compute_seconds = time.monotonic() - started_at
        exemplar = job.context.run(metrics.exemplar)
        metrics.QUEUE_WAIT_SECONDS.labels(self.name).observe(queue_seconds, exemplar)
        if job.operation and error is None:
            metrics.STAGE_SECONDS.labels(self.name, job.operation).observe(compute_seconds, exemplar)
        with self._changed:
            self._queue.done(job, compute_seconds, is_measured=bool(job.operation) and error is None)
            # A thread may wait because this job was large.
            self._changed.notify()
        self._count()
        completed = Completed(value, queue_seconds, compute_seconds)
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


def _outcome(job: _Job) -> tuple[Any, BaseException | None]:
    def traced() -> Any:
        if not job.operation:
            return job.function()
        tracing.record(QUEUE, job.queued_at, time.monotonic())
        with tracing.span(job.operation):
            return job.function()

    try:
        return job.context.run(traced), None
    except Exception as error:
        return None, as_device_fault(error)
    except BaseException as error:  # SystemExit from a library must not end the only thread that computes
        return None, RuntimeError(f"a function ended with {error!r}")


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if future.done():
        return
    if isinstance(error, StopIteration):
        # A future does not accept StopIteration, and the task that awaits it would wait forever.
        error = RuntimeError(f"a function ended with StopIteration({error})")
    future.set_exception(error)

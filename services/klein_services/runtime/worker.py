"""Worker: one thread that computes, and the bounded queue in front of it."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from klein_services.runtime import metrics, tracing
from klein_services.runtime.errors import DeadlinePassed, QueueFull, StageUnavailable, as_device_fault
from klein_services.runtime.semantic_conventions import QUEUE

_STOP_SECONDS = 1.0
_SMOOTHING = 0.2
_UNMEASURED_SECONDS = 1.0
"""Backlog of a function before any operation was measured, so that waiting work never looks like none."""
_Value = TypeVar("_Value")
_log = logging.getLogger("klein.worker")


@dataclass(frozen=True)
class Completed(Generic[_Value]):
    """Result of a function, and the time it took."""

    value: _Value
    queue_seconds: float
    compute_seconds: float


@dataclass(eq=False)
class _Job:
    function: Callable[[], Any]
    future: asyncio.Future[Completed[Any]]
    context: contextvars.Context
    operation: str
    deadline: float | None
    queued_at: float


class Worker:
    """Runs functions one after the other on its own thread, so that the event loop never computes.

    Args:
        name: the stage's name, the `stage` label of its metrics.
        queue_limit: most functions that wait for the running one; more are refused.
        operations: the `operation` of each `run`, so that its metrics exist from the start.
    """

    def __init__(self, name: str, queue_limit: int, operations: Sequence[str] = ()) -> None:
        self.name = name
        self.queue_limit = queue_limit
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._mean_seconds: float | None = None
        metrics.initialize_queue(name, operations)
        # A daemon, so that a load or a step that cannot be interrupted does not keep a stopped process alive.
        self._thread = threading.Thread(target=self._work, name=f"{name}-worker", daemon=True)
        self._thread.start()

    @property
    def queued_count(self) -> int:
        """Functions that wait."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Functions that run: 0 or 1."""
        return int(self._running is not None)

    @property
    def estimated_wait_seconds(self) -> float | None:
        """Time until a function that is queued now would start; `None` before any operation was measured."""
        outstanding = self.queued_count + self.running_count
        return None if self._mean_seconds is None else self._mean_seconds * outstanding

    async def run(
        self, function: Callable[[], _Value], *, operation: str = "", deadline: float | None = None
    ) -> Completed[_Value]:
        """Runs a function on the worker, with the context variables of the current task, and waits for it.

        When the task is cancelled, a waiting function is dropped. A running one goes on, and its time counts as
        abandoned.

        Args:
            function: what to compute.
            operation: label of `klein_stage_duration_seconds` and name of the span; empty is not measured.
            deadline: `time.monotonic()` after which the function is not started.

        Raises:
            QueueFull: too many functions wait; raised at once.
            DeadlinePassed: the deadline passed while the function waited.
            StageUnavailable: the worker is closed.
            DeviceFault: the device failed.
        """
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        job = _Job(function, loop.create_future(), context, operation, deadline, time.monotonic())
        with self._changed:
            if self._closed:
                raise StageUnavailable("the stage stops")
            if len(self._waiting) + self.running_count > self.queue_limit:
                raise QueueFull(self.queue_limit, self.estimated_wait_seconds or 1.0)
            self._waiting.append(job)
            self._changed.notify()
        self._count()
        try:
            return await job.future
        except DeadlinePassed:
            metrics.DEADLINE_MISSED.labels(self.name).inc()
            raise
        except asyncio.CancelledError:
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
            if deadline is not None and time.monotonic() >= deadline:
                metrics.DEADLINE_MISSED.labels(self.name).inc()
            future = job.future
            if future.done() and not future.cancelled() and future.exception() is None:
                metrics.ABANDONED_SECONDS.labels(self.name).inc(future.result().compute_seconds)
            self._count()
            raise

    def close(self) -> None:
        """Refuses the waiting functions and ends the thread; waits at most 1 s for a running function."""
        with self._changed:
            self._closed = True
            refused, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in refused:
            _set_exception(job.future, StageUnavailable("the stage stops"))
        self._count()
        self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._compute(job)
            # Frees the last result, perhaps a large tensor, before waiting for the next job.
            del job

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

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
            mean = compute_seconds if self._mean_seconds is None else self._mean_seconds
            self._mean_seconds = mean + _SMOOTHING * (compute_seconds - mean)
        self._running = None
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
        metrics.QUEUE_DEPTH.labels(self.name).set(self.queued_count)
        metrics.RUNNING.labels(self.name).set(self.running_count)
        seconds = _UNMEASURED_SECONDS if self._mean_seconds is None else self._mean_seconds
        metrics.BACKLOG_SECONDS.labels(self.name).set(seconds * (self.queued_count + self.running_count))


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

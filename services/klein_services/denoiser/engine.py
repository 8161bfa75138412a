"""Engine: the thread that runs the scheduler's batches on the device."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch

from klein_core.denoiser.sampler import Trajectory
from klein_core.errors import DeviceFault
from klein_services.denoiser.events import EventChannel, Queued, Started
from klein_services.denoiser.request_state import (
    CacheReferences,
    RequestState,
    Step,
    post_progress,
    post_result,
)
from klein_services.denoiser.scheduled_request import (
    Batch,
    ScheduledRequest,
    observe_abandoned,
    observe_budget,
    observe_finished,
    observe_load,
    observe_started,
    observe_step,
)
from klein_services.denoiser.scheduler import Load, Scheduler
from klein_services.runtime.errors import (
    DeadlinePassed,
    DeviceOutOfMemory,
    ReceiveTimeout,
    StageUnavailable,
    as_device_fault,
)
from klein_services.runtime.watchdog import watched

IDLE_SECONDS = 0.5
"""Interval at which deadlines of requests without tensors are checked while the device is idle."""
CLOSE_SECONDS = 5.0
"""Most time that `close` waits for a running step."""
_log = logging.getLogger("klein.denoiser")


class Engine:
    """Owns the scheduler and the engine thread. Every public method is thread-safe.

    The lock is held between steps only, so callers never wait for the device.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step: Step,
        cache_references: CacheReferences | None = None,
        *,
        warm_up: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`warm_up` runs first on the engine thread; `cache_references` is required for requests with such a cache."""
        self.clock = clock
        self._warm_up = warm_up
        self._warm: Future[None] = Future()
        self._scheduler = scheduler
        self._step = step
        self._cache_references = cache_references
        self._changed = threading.Condition()
        self._channels: dict[ScheduledRequest, EventChannel] = {}
        self._states: dict[ScheduledRequest, RequestState] = {}
        self._positions: dict[ScheduledRequest, int] = {}
        self._unavailable: Exception | None = None
        # A daemon: a step that cannot be interrupted must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._loop, name="denoiser-steps", daemon=True)

    def start(self) -> None:
        """Starts the engine thread and waits until it has warmed up; raises what the warm-up raises."""
        self._thread.start()
        self._warm.result()
        observe_budget(self._scheduler.budget.tokens)

    def admit(self, request: ScheduledRequest, channel: EventChannel) -> None:
        """Reserves a place in the queue; `submit` or `cancel` must follow.

        Raises:
            QueueFull, DeadlineUnreachable: see `Scheduler.admit`.
            StageUnavailable: the engine is closing.
            DeviceFault: the device was lost, which ends the server.
        """
        with self._changed:
            if self._unavailable is not None:
                raise self._unavailable
            dropped = self._scheduler.admit(request, self.clock())
            self._channels[request] = channel
            for silent in dropped:
                self._fail([silent], self._scheduler.queue_full(self.clock()))
            self._publish_queue_positions()
            self._changed.notify()

    def received(self, request: ScheduledRequest) -> None:
        """Notes that tensors of an admitted request begin to arrive."""
        with self._changed:
            self._scheduler.received(request)

    def submit(self, request: ScheduledRequest, state: RequestState) -> None:
        """Hands over an admitted request's tensors, so that it may be scheduled. No effect once it has left.

        Raises:
            QueueFull, DeadlineUnreachable: see `Scheduler.activate`.
        """
        with self._changed:
            if request in self._channels:
                self._scheduler.activate(
                    request,
                    self.clock(),
                    image_tokens=state.image_tokens,
                    memory_bytes=state.memory_bytes,
                    cache=state.cache,
                )
                self._states[request] = state
                self._changed.notify()

    def cancel(self, request: ScheduledRequest) -> None:
        """Removes a request at the next step boundary; no effect once it has left."""
        with self._changed:
            self._scheduler.cancel(request)
            self._changed.notify()

    def load(self, probe: ScheduledRequest) -> Load:
        """Returns how busy the engine is, and how long the probe request would wait."""
        with self._changed:
            return self._scheduler.load(probe)

    def close(self) -> None:
        """Stops the thread after the running step; the remaining requests fail with StageUnavailable."""
        with self._changed:
            self._unavailable = self._unavailable or StageUnavailable("the denoiser is shutting down")
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        with torch.inference_mode():
            # Here and on no other thread: CUDA libraries keep plans and workspaces for each thread.
            try:
                if self._warm_up is not None:
                    self._warm_up()
            except BaseException as error:
                self._warm.set_exception(error)
                return
            self._warm.set_result(None)
            while (batch := self._next_batch()) is not None:
                for request in batch.starting:
                    queue_seconds = (request.started_at or request.admitted_at) - request.admitted_at
                    observe_started(request, queue_seconds)
                    self._channels[request].post(Started(queue_seconds))
                if not self._execute(batch):
                    continue
                budget = self._scheduler.budget
                with self._changed:
                    has_grown = budget.record_success(batch.tokens)
                if has_grown:
                    observe_budget(budget.tokens)
                    _log.info("memory suffices: steps are limited to %d tokens again", budget.tokens)

    def _next_batch(self) -> Batch | None:
        """Waits until there is work; returns `None` once the engine is closed."""
        with self._changed:
            while self._unavailable is None:
                self._drop_abandoned(self._scheduler.reap(self.clock()))
                silent_seconds = self._scheduler.config.silent_seconds
                self._fail(self._scheduler.overdue(self.clock()), ReceiveTimeout(silent_seconds))
                batch = self._scheduler.schedule(self.clock())
                self._publish_queue_positions()
                if batch is not None:
                    return batch
                self._changed.wait(IDLE_SECONDS if self._channels else None)
            self._fail(self._scheduler.requests, self._unavailable)
        return None

    def _execute(self, batch: Batch) -> bool:
        """Runs a batch, item by item after a failure; returns whether the first attempt succeeded."""
        error = self._attempt(batch)
        if error is not None:
            self._recover(batch, error)
        return error is None

    def _attempt(self, batch: Batch) -> Exception | None:
        """Runs a batch and posts its events; returns the error of the step instead of raising it.

        A retry within an `except` block would run while the error's traceback still holds the failed step's frames.
        """
        begun = self.clock()
        try:
            with watched("a step", batch.tokens):
                self._compute(batch)
            seconds = self.clock() - begun
            with self._changed:
                finished = self._scheduler.on_step_done(batch, seconds)
        except Exception as error:
            # Whatever keeps the error must not keep the step's tensors: the retry needs their memory.
            clear_traceback_frames(error)
            return error
        observe_step(batch, seconds, self._scheduler.budget.tokens)
        self._post_step(batch, finished)
        return None

    def _compute(self, batch: Batch) -> None:
        for item in batch.items:
            if item.image is None:
                self._compute_cache(item.request)
        trajectories = [
            self._trajectory(item.request, item.image) for item in batch.items if item.image is not None
        ]
        if trajectories:
            self._step(trajectories)

    def _compute_cache(self, request: ScheduledRequest) -> None:
        caches, wanted = self._scheduler.caches, request.cache
        if wanted is None or request.has_cache:  # it was computed before the rest of the batch failed
            return
        if self._cache_references is None:
            raise RuntimeError("a request has a reference cache, but the model does not cache references")
        state = self._states[request]
        caches.make_room(wanted.size_bytes)
        caches.add(wanted.key, self._cache_references(state.cached_references, state.adapters))
        request.has_cache = True

    def _trajectory(self, request: ScheduledRequest, image: int) -> Trajectory:
        trajectory = self._states[request].trajectories[image]
        if request.has_cache and request.cache is not None:
            trajectory.reference_cache = self._scheduler.caches.get(request.cache.key)
        return trajectory

    def _post_step(self, batch: Batch, finished: Sequence[ScheduledRequest]) -> None:
        """Posts events of the requests in a batch; an error here fails only the request it occurs in."""
        for request in dict.fromkeys(item.request for item in batch.items if item.image is not None):
            channel, state = self._channels[request], self._states[request]
            try:
                if request not in finished:
                    if request.next_image == 0:
                        post_progress(request, state, channel)
                    continue
                if request.is_abandoned(self.clock()):
                    with self._changed:
                        self._drop_abandoned([request])
                    continue
                post_result(request, state, channel, self.clock())
                observe_finished(request)
                with self._changed:
                    self._forget(request)
            except Exception as error:
                clear_traceback_frames(error)
                self._fail_with_fault([request], as_device_fault(error))

    def _recover(self, batch: Batch, error: Exception) -> None:
        """Retries the items of a failed batch one by one, or fails their requests where a retry cannot help."""
        fault = as_device_fault(error)
        items = [item for item in batch.items if item.request in self._states]
        is_full = isinstance(fault, DeviceOutOfMemory)
        has_freed_memory = is_full and self._scheduler.caches.drop_unused()
        # A step that failed after it had advanced some images cannot be repeated.
        is_unchanged = all(
            self._trajectory(item.request, item.image).step_index == item.request.steps_done
            for item in items
            if item.image is not None
        )
        may_help = not _is_device_lost(fault) and (len(items) > 1 or has_freed_memory)
        if not may_help or not is_unchanged:
            self._fail_with_fault((item.request for item in items), fault)
            return
        _log.warning("a step failed; retrying its requests one by one", exc_info=error)
        if is_full and len(items) > 1:
            budget = self._scheduler.budget
            with self._changed:
                budget.cut(batch.tokens)
            observe_budget(budget.tokens)
            _log.warning("out of memory: steps are limited to %d tokens", budget.tokens)
        for item in items:
            # A retry before this one may have failed the request.
            if item.request in self._states:
                self._execute(Batch((item,)))

    def _fail_with_fault(self, requests: Iterable[ScheduledRequest], fault: Exception) -> None:
        """Fails requests. A lost device also stops the loop, which fails all others."""
        with self._changed:
            self._fail(requests, fault)
            if _is_device_lost(fault):
                self._unavailable = fault

    def _fail(self, requests: Iterable[ScheduledRequest], error: BaseException) -> None:
        for request in dict.fromkeys(requests):
            self._scheduler.remove([request])
            if request in self._channels:
                self._channels[request].fail(error)
                self._forget(request)

    def _drop_abandoned(self, requests: Iterable[ScheduledRequest]) -> None:
        """Drops cancelled and expired requests. Their clients may already have disconnected."""
        for request in requests:
            observe_abandoned(request, is_late=request.is_expired(self.clock()))
            self._channels[request].fail(DeadlinePassed())
            self._forget(request)

    def _forget(self, request: ScheduledRequest) -> None:
        """Releases everything held for a request that has left the scheduler."""
        if request.has_cache and request.cache is not None:
            self._scheduler.caches.release(request.cache.key)
            request.has_cache = False
        for by_request in (self._channels, self._states, self._positions):
            by_request.pop(request, None)
        self._observe_load()

    def _publish_queue_positions(self) -> None:
        """Posts the position of each waiting request whose position has changed."""
        for position, request in enumerate(self._scheduler.requests):
            if not request.is_started and self._positions.get(request) != position:
                self._positions[request] = position
                self._channels[request].post(Queued(position, self._scheduler.estimated_wait(request)))
        self._observe_load()

    def _observe_load(self) -> None:
        scheduler = self._scheduler
        observe_load(scheduler.queued_count, scheduler.running_count, scheduler.backlog_seconds)


def clear_traceback_frames(error: BaseException) -> None:
    """Frees the locals of all frames that an exception, its causes and its contexts passed through.

    A traceback keeps its frames, and their locals: after a failed step, gigabytes on the device for as long as the
    exception lives. File names and line numbers, which logs show, stay.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            pending += [each.__cause__, each.__context__]


def _is_device_lost(fault: Exception) -> bool:
    return isinstance(fault, DeviceFault) and not isinstance(fault, DeviceOutOfMemory)

"""Count of a request's suspensions in all of its tasks, and a cancellation of its handler at one of them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_watched: contextvars.ContextVar[Suspensions | None] = contextvars.ContextVar("watched", default=None)


@dataclass(eq=False)
class Suspensions:
    """Awaits at which one request was suspended, in its handler and in every task that it has begun.

    Args:
        cancel_at: number of the suspension at which the handler is cancelled; 0 only counts.
    """

    cancel_at: int = 0
    count: int = 0
    handler: asyncio.Task[Any] | None = None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the handler has ended."""

    @property
    def has_cancelled(self) -> bool:
        return 0 < self.cancel_at <= self.count

    def suspended(self) -> None:
        self.count += 1
        if self.count == self.cancel_at:
            assert self.handler is not None
            # In the handler's own step, asyncio cancels what it is about to wait for.
            self.handler.cancel()


class _Counted(Coroutine[Any, Any, Any]):
    """A task's coroutine that reports each of its suspensions."""

    def __init__(self, inner: Coroutine[Any, Any, Any], suspensions: Suspensions) -> None:
        self._inner = inner
        self._suspensions = suspensions
        self.__name__ = getattr(inner, "__name__", "")
        self.__qualname__ = getattr(inner, "__qualname__", "")

    def send(self, value: Any) -> Any:
        yielded = self._inner.send(value)
        self._suspensions.suspended()
        return yielded

    def throw(self, *error: Any) -> Any:
        yielded = self._inner.throw(*error)
        self._suspensions.suspended()
        return yielded

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("only tasks run it")


@contextmanager
def watched_tasks() -> Iterator[None]:
    """Makes the tasks that watched handlers begin report to their `Suspensions`, while the block runs."""
    loop = asyncio.get_running_loop()

    def make_task(loop, inner, **options) -> asyncio.Task[Any]:
        suspensions = _watched.get()
        if suspensions is None:
            return asyncio.Task(inner, loop=loop, **options)
        task = asyncio.Task(_Counted(inner, suspensions), loop=loop, **options)
        suspensions.tasks.add(task)
        return task

    loop.set_task_factory(make_task)
    try:
        yield
    finally:
        loop.set_task_factory(None)


class _Handling:
    """Awaitable that runs a handler inside the current task and reports each of its suspensions."""

    def __init__(self, inner: Coroutine[Any, Any, Any], suspensions: Suspensions) -> None:
        self._counted = _Counted(inner, suspensions)

    def __await__(self) -> Generator[Any, Any, Any]:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                yielded = self._counted.send(value) if error is None else self._counted.throw(error)
            except StopIteration as finished:
                return finished.value
            value = error = None
            try:
                value = yield yielded
            except BaseException as raised:
                error = raised


async def watched(handler: Coroutine[Any, Any, Any], suspensions: Suspensions) -> Any:
    """Runs a handler in the current task under `suspensions`."""
    suspensions.handler = asyncio.current_task()
    token = _watched.set(suspensions)
    try:
        return await _Handling(handler, suspensions)
    finally:
        _watched.reset(token)
        suspensions.ended.set()

"""SIGTERM and SIGINT as events."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger("klein.server")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(stop_requested: asyncio.Event, stop_now: asyncio.Event) -> Iterator[None]:
    """Sets `stop_requested` on the first signal and `stop_now` on the second, while the block runs."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        _log.info("signal", extra={"signal": signal.Signals(number).name})
        (stop_now if stop_requested.is_set() else stop_requested).set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

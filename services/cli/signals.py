"""The wish to stop, as Ctrl-C, SIGTERM or a closed terminal express it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Counts signals that ask this process to stop, inside a `with` block of the main thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._insisted = threading.Event()

    def __enter__(self) -> StopSignals:
        self._previous = {each: signal.signal(each, self._handle) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    @property
    def insisted(self) -> bool:
        """Whether a second signal came."""
        return self._insisted.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for the first signal; whether it came."""
        return self._requested.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        (self._insisted if self.requested else self._requested).set()

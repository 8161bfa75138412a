"""Callers that the orchestrator has let in, for the time when it does not answer."""

from __future__ import annotations

MAXIMUM_CALLERS = 1024


class KnownCallers:
    """Digests of tokens, or addresses; those that were not seen for longest make room."""

    def __init__(self) -> None:
        self._callers: dict[str, None] = {}

    def add(self, caller: str) -> None:
        """Remembers a caller."""
        self._callers.pop(caller, None)
        self._callers[caller] = None
        if len(self._callers) > MAXIMUM_CALLERS:
            del self._callers[next(iter(self._callers))]

    def __contains__(self, caller: str) -> bool:
        return caller in self._callers

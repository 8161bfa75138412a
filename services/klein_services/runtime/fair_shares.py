"""FairShares: start-time fair queueing of callers by the cost of their work and their weights. Torch-free."""

from __future__ import annotations

from klein_services.runtime.caller import Caller

_REMEMBERED_CALLERS = 256


class FairShares:
    """Start tags of callers in virtual time, which advances with the work that is begun.

    The caller with the least tag goes first. Beginning work moves its tag on by cost over weight, so over any busy time
    callers get service in proportion to their weights. A caller that had nothing waiting begins at the present virtual
    time: it neither pays for idle time nor saves it up.
    """

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._tags: dict[str, float] = {}
        """Tags that may lie ahead of the virtual time; all other callers stand at it."""

    def tag(self, name: str) -> float:
        """Returns the start tag of a caller's next work."""
        return max(self._virtual_time, self._tags.get(name, 0.0))

    def begin(self, caller: Caller, cost: float) -> None:
        """Counts work that begins."""
        self._virtual_time = self.tag(caller.name)
        self._tags[caller.name] = self._virtual_time + cost / caller.weight
        if len(self._tags) > _REMEMBERED_CALLERS:
            self._tags = {name: tag for name, tag in self._tags.items() if tag > self._virtual_time}

    def correct(self, caller: Caller, excess: float) -> None:
        """Counts the difference between what work cost and what `begin` was given."""
        self._tags[caller.name] = self.tag(caller.name) + excess / caller.weight

    def forget(self) -> None:
        """Lets all callers stand equal again: nothing waits, so none is owed anything."""
        self._virtual_time = max(self._tags.values(), default=self._virtual_time)
        self._tags.clear()

"""FairShares: start-time fair queueing of callers by the cost of their work and their weights. Torch-free."""

from __future__ import annotations

import heapq

from klein_services.runtime.caller import Caller

REMEMBERED_CALLERS = 256
"""Callers whose tags are kept although they have no work, at most; the others start anew."""


class FairShares:
    """Start tags of callers in virtual time, which advances with the work that is done.

    The caller with the least tag goes first. Work moves its caller's tag on by cost over weight, so over any busy time
    callers get service in proportion to their weights. A caller that had nothing waiting begins at the present virtual
    time: it neither pays for idle time nor saves it up.

    Virtual time is the tag of the work that was begun last or, between `arrive` and `leave`, the share that each
    caller of weight 1 could have had. Only the latter is safe from an endless row of new callers, none of which ever
    gets a later tag than those before it.
    """

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._tags: dict[str, float] = {}
        """Tags that may lie ahead of the virtual time; all other callers stand at it."""
        self._weights: dict[str, float] = {}
        """Weights of the callers between `arrive` and `leave`, whose tags stay as virtual time passes them."""

    def tag(self, name: str) -> float:
        """Returns the start tag of a caller's next work."""
        tag = self._tags.get(name, 0.0)
        return tag if name in self._weights else max(self._virtual_time, tag)

    def arrive(self, caller: Caller) -> None:
        """Counts a caller that has work from now on."""
        self._tags[caller.name] = self.tag(caller.name)
        self._weights[caller.name] = caller.weight

    def leave(self, caller: Caller) -> None:
        """Counts a caller that has no more work; after the last one all stand equal again."""
        self._weights.pop(caller.name, None)
        if not self._weights:
            self.forget()
        elif len(self._tags) - len(self._weights) > REMEMBERED_CALLERS:
            self._drop_tags()

    def advance(self, seconds: float) -> None:
        """Advances virtual time by work that was done, as if the callers that have work had shared it."""
        if self._weights:
            self._virtual_time += seconds / sum(self._weights.values())

    def begin(self, caller: Caller, cost: float) -> None:
        """Counts work that begins, of a caller that does not `arrive` and `leave`."""
        self._virtual_time = self.tag(caller.name)
        self._tags[caller.name] = self._virtual_time + cost / caller.weight
        if len(self._tags) > REMEMBERED_CALLERS:
            self._drop_tags()

    def correct(self, caller: Caller, excess: float) -> None:
        """Counts the difference between what work cost and what was counted for it before."""
        self._tags[caller.name] = self.tag(caller.name) + excess / caller.weight

    def forget(self) -> None:
        """Lets all callers stand equal again: nothing waits, so none is owed anything."""
        self._virtual_time = max(self._tags.values(), default=self._virtual_time)
        self._tags.clear()

    def _drop_tags(self) -> None:
        """Keeps the tags of callers with work, and of others those that lie farthest ahead of the virtual time."""
        ahead = {name: tag for name, tag in self._tags.items() if tag > self._virtual_time}
        kept = heapq.nlargest(REMEMBERED_CALLERS, ahead.keys() - self._weights.keys(), key=ahead.__getitem__)
        self._tags = {name: self._tags[name] for name in (*self._weights, *kept)}

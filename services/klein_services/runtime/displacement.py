"""Displacement: the places of a full queue are shared between callers by weight. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from klein_services.runtime.caller import Caller
from klein_services.runtime.urgency import Urgency


class Queued(Protocol):
    """Work that holds a place in a queue."""

    @property
    def caller(self) -> Caller:
        """Its caller."""

    @property
    def urgency(self) -> Urgency:
        """Its priority class."""

    @property
    def sequence(self) -> int:
        """Order of arrival."""


_Queued = TypeVar("_Queued", bound=Queued)


def to_displace(newcomer: Queued, waiting: Iterable[_Queued]) -> _Queued | None:
    """Returns the work that leaves a full queue for `newcomer`; `None` when the newcomer has to stay out.

    It is the latest of the least urgent class of the caller with the most places for its weight, and no more urgent
    than the newcomer. That caller keeps at least as many places as the newcomer's then has, by weight, so that two
    callers never displace each other in turn.

    Args:
        newcomer: work that finds no place.
        waiting: works that hold one and could give it up.
    """
    works = list(waiting)
    counts = Counter(work.caller.name for work in works)
    weights = {work.caller.name: work.caller.weight for work in works}
    kept = {name: (count - 1) / weights[name] for name, count in counts.items()}
    name = max(kept, key=lambda name: kept[name], default=newcomer.caller.name)
    own = (counts[newcomer.caller.name] + 1) / newcomer.caller.weight
    if name == newcomer.caller.name or kept[name] < own:
        return None
    least = [work for work in works if work.caller.name == name and work.urgency >= newcomer.urgency]
    return max(least, key=lambda work: (work.urgency, work.sequence), default=None)

"""ServiceOrder: the order in which the denoiser serves requests. Torch-free."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.runtime.fair_shares import FairShares
from klein_services.runtime.urgency import Urgency


@dataclass
class _Class:
    """Callers of one priority class."""

    shares: FairShares = field(default_factory=FairShares)
    ready_counts: Counter[str] = field(default_factory=Counter)
    """Requests of each caller that could be served."""


class ServiceOrder:
    """Strict priority classes; within a class callers share fairly; one caller's requests go earliest deadline first.

    A request that begins has a turn: it keeps its caller's start tag, so that it goes on before what comes later,
    because to serve callers step by step in rotation would end all of their images late. Its caller is charged for all
    of its work at once. It loses the turn, and its caller gets back what it has not used, when a request of the same
    caller that is due earlier begins, so that no caller can hold the device by overtaking itself.

    Args:
        cost: returns the device seconds that a request still needs.
    """

    def __init__(self, cost: Callable[[ScheduledRequest], float]) -> None:
        self._cost = cost
        self._classes: defaultdict[Urgency, _Class] = defaultdict(_Class)
        self._in_turn: dict[int, ScheduledRequest] = {}

    def sort(self, requests: Iterable[ScheduledRequest]) -> list[ScheduledRequest]:
        """Returns requests in the order of service if no other comes; those that were not added may be among them."""
        flows: defaultdict[Urgency, defaultdict[str, list[ScheduledRequest]]]
        flows = defaultdict(lambda: defaultdict(list))
        for request in sorted(requests, key=lambda request: request.due):
            flows[request.urgency][request.caller.name].append(request)
        return [
            request
            for urgency in sorted(flows)
            for request in self._class_order(self._classes[urgency].shares, flows[urgency])
        ]

    def add(self, request: ScheduledRequest) -> None:
        """Counts a request that may be served from now on."""
        of_class = self._classes[request.urgency]
        of_class.ready_counts[request.caller.name] += 1
        of_class.shares.arrive(request.caller)

    def begin(self, request: ScheduledRequest) -> None:
        """Gives a request its turn; no effect while it has one."""
        if request.turn is not None:
            return
        for other in list(self._in_turn.values()):
            is_of_flow = (other.urgency, other.caller.name) == (request.urgency, request.caller.name)
            if is_of_flow and other.due > request.due:
                self._end_turn(other)
        request.turn = self._classes[request.urgency].shares.tag(request.caller.name)
        self._in_turn[request.sequence] = request
        self._charge(request)

    def account(self, request: ScheduledRequest, seconds: float) -> None:
        """Accounts for device time that a request has had, and for its work that is left."""
        request.spent_seconds += seconds
        self._classes[request.urgency].shares.advance(seconds)
        self._charge(request)

    def remove(self, request: ScheduledRequest) -> None:
        """Ends the accounts of a request that leaves."""
        self._end_turn(request)
        if not request.is_ready:
            return
        of_class, name = self._classes[request.urgency], request.caller.name
        of_class.ready_counts[name] -= 1
        if not of_class.ready_counts[name]:
            del of_class.ready_counts[name]
            of_class.shares.leave(request.caller)

    def _end_turn(self, request: ScheduledRequest) -> None:
        if request.turn is not None:
            del self._in_turn[request.sequence]
            request.turn = None
            self._charge(request)

    def _charge(self, request: ScheduledRequest) -> None:
        """Charges the caller for what a request has had and, in its turn, for what it still needs."""
        total = request.spent_seconds + (0.0 if request.turn is None else self._cost(request))
        shares = self._classes[request.urgency].shares
        shares.correct(request.caller, total - request.charged_seconds)
        request.charged_seconds = total

    def _class_order(
        self, shares: FairShares, flows: dict[str, list[ScheduledRequest]]
    ) -> Iterator[ScheduledRequest]:
        """Yields one class's requests.

        Args:
            shares: of the class.
            flows: the requests of each caller, the earliest deadline first.
        """
        tags = {name: self._tags(shares, flow) for name, flow in flows.items()}
        heads = [(*next(tags[name]), flow[0].due, name, 0) for name, flow in flows.items()]
        heapq.heapify(heads)
        while heads:
            *_, name, place = heapq.heappop(heads)
            flow = flows[name]
            yield flow[place]
            if (place := place + 1) < len(flow):
                heapq.heappush(heads, (*next(tags[name]), flow[place].due, name, place))

    def _tags(self, shares: FairShares, flow: Sequence[ScheduledRequest]) -> Iterator[tuple[float, bool]]:
        """Yields the start tag of each of a caller's requests, and whether it waits for its turn."""
        going_on = list(takewhile(lambda request: request.turn is not None, flow))
        for request in going_on:
            yield request.turn or 0.0, False
        waiting = flow[len(going_on) :]
        # Those that will lose their turn give back what they have not used.
        unused = sum(each.charged_seconds - each.spent_seconds for each in waiting)
        tag = shares.tag(flow[0].caller.name) - unused / flow[0].caller.weight
        for request in waiting:
            yield tag, True
            tag += self._cost(request) / request.caller.weight

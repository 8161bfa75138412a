"""Lets the layers of one step add each span's adapters to that span's rows.

Between steps no layer knows of an adapter. Threads do not see each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate

import torch
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter, Segment
from klein_core.linear import Linear

_ATTACHING = threading.Lock()
"""Held for a moment, so that the end of one thread's step does not hide the adapters of another's."""
Adapters = tuple[ScaledAdapter, ...]
"""What one span wants added; empty is nothing."""
Range = tuple[int, int]


class Stream(Enum):
    """Which rows a layer sees."""

    SPANS = "one row a span"
    TEXT = "text tokens"
    IMAGE = "image tokens"
    JOINT = "text and image tokens, or in the last block the targets alone"
    TARGETS = "target tokens"


def stream_of(layer: str) -> Stream:
    """Returns which rows a layer of this name sees."""
    if "modulation" in layer or layer.startswith(("time_guidance_embed.", "norm_out.")):
        return Stream.SPANS
    if layer.startswith("single_transformer_blocks."):
        return Stream.JOINT
    if layer == "proj_out":
        return Stream.TARGETS
    of_text = ("context_embedder", "ff_context", "to_added_qkv", "to_add_out")
    return Stream.TEXT if any(part in layer for part in of_text) else Stream.IMAGE


Lengths = Mapping[Stream, Sequence[Sequence[int]]]
"""Rows of each span in each stream. A stream with several entries has different totals in each of them."""


@contextmanager
def adapted(linears: Mapping[str, Linear], lengths: Lengths, adapters: Sequence[Adapters]) -> Iterator[None]:
    """Applies adapters to all products that this thread makes of the layers whose streams `lengths` has.

    Args:
        linears: the network's layers by name.
        lengths: see there.
        adapters: one entry a span.
    """
    if not any(adapters):
        yield
        return
    thread, found = threading.get_ident(), _adaptations(lengths, adapters)
    of_step = dict.fromkeys(name for name in linears if stream_of(name) in lengths)
    # An adapter of another model fails here, before anything is attached.
    layers = [(linears[name], found.get(name, ())) for name in of_step | found]
    with _ATTACHING:
        for linear, additions in layers:
            linear.adapt(thread, additions)
    try:
        yield
    finally:
        with _ATTACHING:
            for linear, _ in layers:
                linear.restore(thread)


@dataclass(frozen=True)
class Group:
    """Spans that want the same of one layer."""

    ranges: Mapping[int, tuple[Range, ...]]
    """Rows of all spans → the rows of these."""
    segments: tuple[tuple[Segment, float], ...]
    """What is added, each with its scale."""

    def add_to(self, product: Tensor, rows: Tensor, offset: int) -> None:
        """Adds to this group's rows of a layer's product; see `Segment.add_to`."""
        if len(rows) == 0:
            return
        ranges = self.ranges[len(rows)]
        if len(ranges) == 1:
            ((start, stop),) = ranges
            self._add(product[start:stop], rows[start:stop], offset)
            return
        # Rows that lie apart are computed together: more, smaller products would cost more than the copies.
        mine = torch.cat([product[start:stop] for start, stop in ranges])
        self._add(mine, torch.cat([rows[start:stop] for start, stop in ranges]), offset)
        for (start, stop), part in zip(ranges, torch.split(mine, [b - a for a, b in ranges]), strict=True):
            product[start:stop] = part

    def _add(self, product: Tensor, rows: Tensor, offset: int) -> None:
        for segment, scale in self.segments:
            segment.add_to(product, rows, offset, scale)


Adaptation = tuple[Group, ...]
"""What one layer adds during one step."""


def _adaptations(lengths: Lengths, adapters: Sequence[Adapters]) -> dict[str, Adaptation]:
    """Returns what each layer adds, by name."""
    groups: dict[Adapters, list[int]] = {}
    for index, wanted in enumerate(adapters):
        if wanted:
            groups.setdefault(wanted, []).append(index)
    found: dict[str, list[Group]] = {}
    for wanted, spans in groups.items():
        ranges = {
            stream: {sum(rows): _ranges(rows, spans) for rows in choices}
            for stream, choices in lengths.items()
        }
        for layer in dict.fromkeys(layer for each in wanted for layer in each.adapter.segments):
            stream = stream_of(layer)
            if stream in ranges:
                found.setdefault(layer, []).append(Group(ranges[stream], _segments(layer, wanted)))
    return {layer: tuple(of_layer) for layer, of_layer in found.items()}


def _segments(layer: str, wanted: Adapters) -> tuple[tuple[Segment, float], ...]:
    return tuple((segment, scale) for adapter, scale in wanted for segment in adapter.segments.get(layer, ()))


def _ranges(lengths: Sequence[int], spans: Sequence[int]) -> tuple[Range, ...]:
    """Returns the rows of some spans, neighbors together."""
    ends = list(accumulate(lengths))
    ranges: list[Range] = []
    for span in spans:
        start, stop = ends[span] - lengths[span], ends[span]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(ranges)

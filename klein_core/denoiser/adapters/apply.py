"""Applies each span's adapters to that span's rows, for the duration of one step.

Between steps no layer refers to an adapter. Threads do not affect each other: a layer applies the adapters of the
calling thread only.
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

from klein_core.denoiser.adapters.adapter import DeltaSlice, ScaledAdapter
from klein_core.linear import Linear

_ATTACH_LOCK = threading.Lock()
"""Held while layers are changed, so that the end of one thread's step does not detach another thread's adapters."""

Adapters = tuple[ScaledAdapter, ...]
"""The adapters of one span; may be empty."""
Range = tuple[int, int]
"""First row, and the row after the last."""


class TokenStream(Enum):
    """The rows that a layer's input consists of."""

    SPANS = "one row for each span"
    TEXT = "text tokens"
    IMAGE = "image tokens"
    JOINT = "text and image tokens, or in the last block the targets alone"
    TARGETS = "target tokens"


RowCounts = Mapping[TokenStream, Sequence[Sequence[int]]]
"""Rows of each span in each stream. A stream with several alternatives has a different total in each of them."""


@contextmanager
def apply_adapters(
    linears: Mapping[str, Linear], row_counts: RowCounts, adapters: Sequence[Adapters]
) -> Iterator[None]:
    """Applies adapters to every product that this thread computes with the layers of the given streams.

    Args:
        linears: the network's layers by name.
        row_counts: by stream; layers of other streams are not changed.
        adapters: one entry for each span.
    """
    if not any(adapters):
        yield
        return
    thread, groups = threading.get_ident(), _groups_by_layer(row_counts, adapters)
    in_step = dict.fromkeys(name for name in linears if stream_of(name) in row_counts)
    # An adapter of another model fails here, before any layer is changed.
    layers = [(linears[name], groups.get(name, ())) for name in in_step | groups]
    with _ATTACH_LOCK:
        for linear, additions in layers:
            linear.adapt(thread, additions)
    try:
        yield
    finally:
        with _ATTACH_LOCK:
            for linear, _ in layers:
                linear.restore(thread)


def stream_of(layer: str) -> TokenStream:
    """Returns the rows that a layer's input consists of, from its name."""
    if "modulation" in layer or layer.startswith(("time_guidance_embed.", "norm_out.")):
        return TokenStream.SPANS
    if layer.startswith("single_transformer_blocks."):
        return TokenStream.JOINT
    if layer == "proj_out":
        return TokenStream.TARGETS
    of_text = ("context_embedder", "ff_context", "to_added_qkv", "to_add_out")
    return TokenStream.TEXT if any(part in layer for part in of_text) else TokenStream.IMAGE


@dataclass(frozen=True)
class SpanGroup:
    """Spans that get the same additions in one layer."""

    ranges: Mapping[int, tuple[Range, ...]]
    """Total rows of the layer's input → the rows of these spans."""
    slices: tuple[tuple[DeltaSlice, float], ...]
    """What to add, each with the request's scale."""

    def add_to(self, product: Tensor, rows: Tensor, offset: int) -> None:
        """Adds to this group's rows of a layer's product, in place; arguments as for `DeltaSlice.add_to`."""
        if len(rows) == 0:
            return
        ranges = self.ranges[len(rows)]
        if len(ranges) == 1:
            ((start, stop),) = ranges
            self._add(product[start:stop], rows[start:stop], offset)
            return
        # Separate rows are computed together: more but smaller products would cost more than the copies.
        mine = torch.cat([product[start:stop] for start, stop in ranges])
        self._add(mine, torch.cat([rows[start:stop] for start, stop in ranges]), offset)
        for (start, stop), part in zip(ranges, torch.split(mine, [b - a for a, b in ranges]), strict=True):
            product[start:stop] = part

    def _add(self, product: Tensor, rows: Tensor, offset: int) -> None:
        for delta_slice, scale in self.slices:
            delta_slice.add_to(product, rows, offset, scale)


def _groups_by_layer(row_counts: RowCounts, adapters: Sequence[Adapters]) -> dict[str, tuple[SpanGroup, ...]]:
    """Returns what each layer adds, by name. Spans with the same adapters form one group."""
    spans_by_adapters: dict[Adapters, list[int]] = {}
    for index, wanted in enumerate(adapters):
        if wanted:
            spans_by_adapters.setdefault(wanted, []).append(index)
    groups: dict[str, list[SpanGroup]] = {}
    for wanted, spans in spans_by_adapters.items():
        ranges = {
            stream: {sum(counts): _ranges(counts, spans) for counts in alternatives}
            for stream, alternatives in row_counts.items()
        }
        for layer in dict.fromkeys(layer for each in wanted for layer in each.adapter.slices):
            stream = stream_of(layer)
            if stream in ranges:
                slices = tuple(
                    (one, scale) for adapter, scale in wanted for one in adapter.slices.get(layer, ())
                )
                groups.setdefault(layer, []).append(SpanGroup(ranges[stream], slices))
    return {layer: tuple(of_layer) for layer, of_layer in groups.items()}


def _ranges(row_counts: Sequence[int], spans: Sequence[int]) -> tuple[Range, ...]:
    """Returns the rows of some spans, with the ranges of neighbors merged."""
    ends = list(accumulate(row_counts))
    ranges: list[Range] = []
    for span in spans:
        start, stop = ends[span] - row_counts[span], ends[span]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return tuple(ranges)

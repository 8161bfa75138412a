"""Record of a run: one JSON line for each case, written as soon as it is measured."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TIMED_SECONDS = 1.5
"""Time after which a case has enough repetitions."""


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured."""

    sides_px: tuple[int, ...]
    """Images; the second is the one that targets are stated for."""
    reference_counts: tuple[int, ...]
    batches: tuple[int, ...]
    matrix: int
    """Rows and columns of the largest product."""
    copied_bytes: int
    attention_tokens: tuple[int, ...]
    repeats: int
    client_seconds: float
    """Duration of each load on the suite."""
    busy_shares: tuple[float, ...] = (0.0, 0.5)
    """Of the time, in which another thread runs Python."""


SCALES = {
    "cpu": Scale((64, 128), (0, 1), (1, 2), 128, 1 << 20, (48, 96), 1, 0.5),
    "cuda": Scale(
        (512, 1024, 2048),
        (0, 1, 4),
        (1, 2, 4, 8),
        8192,
        8 << 30,
        (1536, 4608, 16896),
        10,
        15.0,
        (0.0, 0.2, 0.5),
    ),
}
"""By type of device; the first is for a rehearsal."""


@dataclass(frozen=True)
class Target:
    """What is measured where."""

    device: torch.device
    variant: str
    """One of `benchmarks.shapes.SHAPES`."""
    folder: Path
    """Where parts leave files for later ones, such as a checkpoint."""

    @property
    def scale(self) -> Scale:
        return SCALES[self.device.type]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32


class Record:
    """Appends the cases of one part to a file.

    Args:
        part: name of the part.
        file: JSON lines; other parts' lines stay.
        deadline: reading of `time.monotonic()` after which no further case begins.
    """

    def __init__(self, part: str, file: Path, deadline: float) -> None:
        self._part = part
        self._file = file
        self._deadline = deadline

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def add(self, case: str, **values: Any) -> None:
        """Writes one case."""
        line = json.dumps({"part": self._part, "case": case, **values})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        print(line, flush=True)

    def attempt(self, case: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Writes what `measure` returns, or its error; nothing once the deadline has passed."""
        if self.is_late:
            self.add(case, skipped="the part's time is over")
            return
        try:
            if values := measure():
                self.add(case, **values)
        except Exception as error:
            # One case that a device cannot do must not cost the others: the file holds the reason.
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.add(case, error=f"{type(error).__name__}: {error}"[:500], at=f"{where.name}:{where.lineno}")

    def time(self, case: str, target: Target, run: Callable[[], object], **facts: Any) -> None:
        """Writes the milliseconds of a call: the median, the least, and the first call's."""
        self.attempt(case, lambda: timed(run, target) | facts)


def timed(run: Callable[[], object], target: Target) -> dict[str, Any]:
    """Returns the milliseconds of a call: of the first, and median and least of the following ones."""
    first = _milliseconds(run, target)
    run()
    taken: list[float] = []
    begin = time.monotonic()
    least = min(3, target.scale.repeats)
    while len(taken) < least or (
        len(taken) < target.scale.repeats and time.monotonic() - begin < TIMED_SECONDS
    ):
        taken.append(_milliseconds(run, target))
    return {
        "ms": round(statistics.median(taken), 4),
        "least_ms": round(min(taken), 4),
        "first_ms": round(first, 3),
    }


def _milliseconds(run: Callable[[], object], target: Target) -> float:
    if not target.on_gpu:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event)


def read_lines(file: Path) -> Sequence[dict[str, Any]]:
    """Returns all cases of a file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

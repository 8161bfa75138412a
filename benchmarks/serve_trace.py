"""Traces of `benchmarks.serve`: mixed requests with their arrivals, the same for all contenders of a run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from PIL import Image

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api

CLASSES = {
    "interactive": image_pb2.PRIORITY_INTERACTIVE,
    "standard": image_pb2.PRIORITY_STANDARD,
    "batch": image_pb2.PRIORITY_BATCH,
}
SUBJECTS = ("a red circle", "a large yellow star", "two green triangles", "a small white heart")
GROUNDS = ("on a blue background", "on a black background", "on a yellow background")


@dataclass(frozen=True)
class Kind:
    """Requests of one form."""

    name: str
    share: float
    """Of all requests, relative to the other kinds'."""
    urgency: str
    side_px: int
    steps: int = 4
    reference_count: int = 0


MIXED = (
    Kind("text 64² interactive", 0.25, "interactive", 64),
    Kind("text 128²", 0.35, "standard", 128),
    Kind("text 256²", 0.10, "standard", 256),
    Kind("text 128², 12 steps, batch", 0.10, "batch", 128, steps=12),
    Kind("edit 128² interactive", 0.10, "interactive", 128, reference_count=1),
    Kind("two references 128², batch", 0.10, "batch", 128, reference_count=2),
)
"""Sizes, steps, references and classes of an installation with people and jobs."""
UNIFORM = (Kind("text 128²", 1.0, "standard", 128),)
MIXES = {"mixed": MIXED, "uniform": UNIFORM}


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at_seconds: float
    """Since the begin of the trace; 0 for all in a closed loop, whose clients wait for their answers."""
    kind: Kind
    seed: int
    references: tuple[bytes, ...] = field(repr=False, default=())

    @property
    def prompt(self) -> str:
        """Text that no other request of the trace has, so that no cache answers."""
        subject, ground = SUBJECTS[self.seed % len(SUBJECTS)], GROUNDS[self.seed % len(GROUNDS)]
        return f"{subject} {ground} {self.seed}"

    def spec(self) -> api.ImageSpec:
        """Returns the request as the public API takes it."""
        return api.ImageSpec(
            prompt=self.prompt,
            references=self.references,
            width_px=self.kind.side_px,
            height_px=self.kind.side_px,
            step_count=self.kind.steps,
            seed=self.seed,
            priority=CLASSES[self.kind.urgency],
        )


def requests(mix: tuple[Kind, ...], seed: int) -> Iterator[Arrival]:
    """Yields requests of a mix without end, all at the begin."""
    chance = random.Random(f"{seed} kinds")
    for number in range(10**9):
        kind = chance.choices(mix, [each.share for each in mix])[0]
        references = tuple(picture(10 * number + index) for index in range(kind.reference_count))
        yield Arrival(0.0, kind, number, references)


def poisson(mix: tuple[Kind, ...], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Returns requests that arrive at random, `rate` a second on average, for so long."""
    chance, at_seconds, arrivals = random.Random(f"{seed} arrivals"), 0.0, []
    for request in requests(mix, seed):
        at_seconds += chance.expovariate(rate)
        if at_seconds >= seconds:
            break
        arrivals.append(Arrival(at_seconds, request.kind, request.seed, request.references))
    return arrivals


def picture(seed: int) -> bytes:
    """Returns a PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

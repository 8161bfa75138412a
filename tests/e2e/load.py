"""Load of tests and benchmarks of faults: requests of all kinds, and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import grpc
from diffusers import Flux2Transformer2DModel
from PIL import Image, ImageDraw

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient
from klein_core.pico import WEIGHTS
from klein_services.runtime.status import explain
from tests.e2e.running_suite import picture
from tests.services.fakes.runtime_toy import until
from tests.tiny.adapters import FORMATS

CLIENTS = 3
REQUEST_SECONDS = 120
STEPS = 8
LOST_PAUSE_SECONDS = 0.2
"""Time after a lost request, so that a broken suite is not flooded."""
ADAPTER = "plain"
_SIZE = {"width_px": 64, "height_px": 64}
_RAW = {"format": image_pb2.IMAGE_FORMAT_RAW_RGB}
_WIDE = (96, 80)


def save_adapter(folder: Path) -> Path:
    """Writes an adapter for pico, which requests may name; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = Flux2Transformer2DModel.from_pretrained(WEIGHTS / "transformer")
    FORMATS["ai-toolkit"].write(transformer).save(folder / f"{ADAPTER}.safetensors")
    return folder


def mask(width: int, height: int) -> bytes:
    """Returns a PNG file whose right half is to be made anew."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle((width // 2, 0, width, height), fill=255)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def specs() -> list[api.ImageSpec]:
    """Returns requests of all kinds, long enough to be hit by a fault."""
    adapters = [image_pb2.Adapter(name=ADAPTER, scale=0.5)]
    kinds: list[dict] = [
        {"prompt": "a red circle on a blue background", **_SIZE, **_RAW},
        {"prompt": "make it green", "references": [picture(*_WIDE, 7)], "image_count": 2, **_RAW},
        {"prompt": "both", "references": [picture(*_WIDE, 8), picture(64, 64, 9)], **_SIZE, **_RAW},
        {
            "prompt": "a yellow star",
            "initial_image": picture(*_WIDE, 10),
            "mask": mask(*_WIDE),
            "strength": 0.75,
            "image_count": 2,
        },
        {"prompt": "three green squares", "image_count": 3, **_SIZE, **_RAW},
        {"prompt": "a blue triangle", "adapters": adapters, **_SIZE, **_RAW},
        {
            "prompt": "all of them",
            "references": [picture(64, 64, 11 + index) for index in range(3)],
            "adapters": adapters,
            "format": image_pb2.IMAGE_FORMAT_JPEG,
            **_SIZE,
        },
        {"prompt": "a white moon", "initial_image": picture(*_WIDE, 14), "mask": mask(*_WIDE), **_RAW},
    ]
    return [api.ImageSpec(seed=seed, step_count=STEPS, **kind) for seed, kind in enumerate(kinds)]


@dataclass
class Answer:
    """Images and previews of one request."""

    images: list[bytes]
    previews: dict[int, bytes] = field(default_factory=dict)
    """By step; those that come late are left out."""

    def equals(self, other: Answer) -> bool:
        """Returns whether all images are the same, and the previews that both have."""
        both = self.previews.keys() & other.previews.keys()
        return self.images == other.images and all(
            self.previews[step] == other.previews[step] for step in both
        )


class Disorder(Exception):
    """A stream's events are not once each and in order."""


async def streamed(stub, spec: api.ImageSpec, seconds: float = REQUEST_SECONDS) -> Answer:
    """Returns a request's answer, and checks that each step and image came once and in order."""
    steps: list[int] = []
    images: dict[int, bytes] = {}
    answer = Answer([])
    call = stub.StreamGenerateImage(
        api.StreamGenerateImageRequest(spec=spec, preview_interval_steps=3), timeout=seconds
    )
    async for event in call:
        if event.HasField("step"):
            steps.append(event.step.step)
        elif event.HasField("preview"):
            answer.previews[event.preview.step] = event.preview.data
        elif event.HasField("image"):
            if event.image.index in images:
                raise Disorder("an image came twice")
            images[event.image.index] = event.image.data
    if steps != sorted(set(steps)) or steps[-1:] != [STEPS]:
        raise Disorder(f"steps came as {steps}")
    answer.images = [images[index] for index in range(max(1, spec.image_count))]
    return answer


@dataclass
class Load:
    """Streams of clients that begin a request when the last one ends."""

    target: str
    expected: list[Answer]
    """Of `specs()`, undisturbed."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    answered: int = 0
    refused: int = 0
    """Requests that were refused with a time to come back, and came back."""
    longest_seconds: float = 0.0
    """Longest time until a request was answered."""
    longest_gap_seconds: float = 0.0
    """Longest time in which no request at all was answered."""
    lost: Counter[str] = field(default_factory=Counter)
    """Requests that ended with another status, by status and message."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that are not those of the undisturbed suite."""
    _answered_at: float = 0.0

    async def run(self) -> None:
        """Asks until `stopped` is set."""
        self._answered_at = time.monotonic()
        kinds = itertools.cycle(range(len(self.expected)))
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(kinds))
        self._note_gap()

    async def answer_more(self, count: int = 2 * CLIENTS) -> None:
        """Waits until so many more requests were answered."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal, REQUEST_SECONDS)

    @property
    def failures(self) -> list[str]:
        """Everything that should not have happened."""
        return [*self.lost, *self.wrong]

    async def _client(self, kinds: Iterator[int]) -> None:
        every = specs()
        async with AsyncClient(self.target) as client:
            stub = client.stub()
            while not self.stopped.is_set():
                kind = next(kinds)
                begin = time.monotonic()
                try:
                    answer = await self._answer(stub, every[kind])
                except grpc.aio.AioRpcError as error:
                    self.lost[f"{error.code().name}: {error.details()}"] += 1
                    await asyncio.sleep(LOST_PAUSE_SECONDS)
                    continue
                except Disorder as disorder:
                    self.wrong[f"kind {kind}: {disorder}"] += 1
                    continue
                self._note_gap()
                self.answered += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - begin)
                if not answer.equals(self.expected[kind]):
                    self.wrong[f"kind {kind}: other bytes than undisturbed"] += 1

    async def _answer(self, stub, spec: api.ImageSpec) -> Answer:
        """Asks, and asks again as often as the suite wants that."""
        end = time.monotonic() + REQUEST_SECONDS
        while True:
            try:
                return await streamed(stub, spec, end - time.monotonic())
            except grpc.aio.AioRpcError as error:
                wait_seconds = explain(error).retry_after_seconds
                if wait_seconds is None:
                    raise
                self.refused += 1
            await asyncio.sleep(wait_seconds)

    def _note_gap(self) -> None:
        now = time.monotonic()
        self.longest_gap_seconds = max(self.longest_gap_seconds, now - self._answered_at)
        self._answered_at = now


async def undisturbed(target: str) -> list[Answer]:
    """Returns the answers to `specs()`."""
    async with AsyncClient(target) as client:
        stub = client.stub()
        return [await streamed(stub, spec) for spec in specs()]

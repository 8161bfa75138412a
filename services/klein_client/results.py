"""Results of requests: events of a stream, images, and the summary at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_client.errors import InternalError

if TYPE_CHECKING:
    import os

    from PIL.Image import Image as PilImage

PROMPT_TRUNCATED = "The prompt was too long: its end was cut off."
"""Warning about a prompt of which the model saw only the begin."""
OPERATIONS = ("encode-prompt", "encode-initial-image", "encode-reference", "denoise", "decode")
"""Operations of a request, in the order in which it passes them."""
_FORMATS = {
    image_pb2.IMAGE_FORMAT_UNSPECIFIED: "png",
    image_pb2.IMAGE_FORMAT_PNG: "png",
    image_pb2.IMAGE_FORMAT_JPEG: "jpeg",
    image_pb2.IMAGE_FORMAT_WEBP: "webp",
    image_pb2.IMAGE_FORMAT_RAW_RGB: "raw",
}
_SUFFIXES = {
    "png": (".png",),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "webp": (".webp",),
    "raw": (".raw", ".rgb"),
}


@dataclass(frozen=True)
class Queued:
    """The request waits for the denoiser."""

    position: int
    """Requests ahead of it."""
    estimated_wait_seconds: float | None
    """Estimated time until it starts; `None` when unknown."""


@dataclass(frozen=True)
class Step:
    """A denoising step is done."""

    step: int
    """Steps done so far, from 1."""
    step_count: int
    """Steps in all."""


@dataclass(frozen=True)
class Image:
    """A finished image, or in a `Preview` an estimate of it."""

    index: int
    """Index in the request, from 0."""
    seed: int
    """Seed that makes the same image again."""
    width_px: int
    height_px: int
    format: str
    """`png`, `jpeg`, `webp` or `raw`: height × width × 3 bytes of RGB."""
    data: bytes = field(repr=False)
    """The image file."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file, replaces one that exists, and returns its path; a name without a suffix gets one.

        Raises:
            ValueError: the suffix is that of another format.
            OSError: the file cannot be written.
        """
        file = suffixed(Path(path), self.format)
        file.write_bytes(self.data)
        return file

    def pil(self) -> PilImage:
        """Returns the image for Pillow, which must be installed."""
        from PIL import Image as pillow

        if self.format == "raw":
            return pillow.frombytes("RGB", (self.width_px, self.height_px), self.data)
        image = pillow.open(BytesIO(self.data))
        image.load()
        return image

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, bytes | str]:
        """Returns the picture for notebooks, which show it."""
        return {"text/plain": repr(self)} | (
            {} if self.format == "raw" else {f"image/{self.format}": self.data}
        )


@dataclass(frozen=True)
class Preview:
    """The first image as estimated after some steps."""

    step: int
    """Steps that were done."""
    image: Image


@dataclass(frozen=True)
class Timing:
    """Durations of one operation of a stage for a request, all of its calls together."""

    stage: str
    """`text-encoder`, `denoiser` or `vae-decoder`."""
    operation: str
    """One of `OPERATIONS`."""
    call_count: int
    queue_seconds: float
    """Time in the stage's queue."""
    compute_seconds: float
    """Time of the computation, as the stage measured it."""
    call_seconds: float
    """Time from the call to its answer, as the orchestrator saw it."""


@dataclass(frozen=True)
class Summary:
    """Summary of a request: the last event of a stream."""

    request_id: str
    """Id of the request in the server's logs and traces."""
    model: str
    flow: str
    """`text-to-image`, `edit`, `multi-reference` or `masked-edit`."""
    prompt_token_count: int
    prompt_truncated: bool
    input_megapixels: float
    """Megapixels (10^6 pixels) of the initial image and the references as the model saw them."""
    output_megapixels: float
    step_count: int
    guidance_scale: float
    timings: tuple[Timing, ...]
    """Durations of each operation, in the order of a request's life."""
    total_seconds: float
    """From the request's arrival at the server to this summary."""
    warnings: tuple[str, ...]
    """Reasons why the images may not be what was wanted, one sentence each."""


Event: TypeAlias = Queued | Step | Preview | Image | Summary
"""Event of a stream."""


@dataclass(frozen=True)
class Generation:
    """Images of one request, in the order of their seeds, and its summary."""

    images: tuple[Image, ...]
    summary: Summary

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image:
        return self.images[index]

    @property
    def image(self) -> Image:
        """Returns the first image."""
        return self.images[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Returns the reasons why the images may not be what was wanted."""
        return self.summary.warnings

    @property
    def timings(self) -> tuple[Timing, ...]:
        """Returns the durations of each operation."""
        return self.summary.timings

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, ...]:
        """Writes the images and returns their paths: NAME.png, or NAME-1.png, NAME-2.png … when there are several.

        Raises:
            ValueError: the suffix is that of another format.
            OSError: a file cannot be written.
        """
        if len(self.images) == 1:
            return (self.image.save(path),)
        file = Path(path)
        return tuple(
            image.save(file.with_name(f"{file.stem}-{image.index + 1}{file.suffix}")) for image in self.images
        )


class Collector:
    """Images and summary of a stream, as they come."""

    def __init__(self) -> None:
        self._images: dict[int, Image] = {}
        self._summary: Summary | None = None

    def add(self, event: Event) -> None:
        """Keeps an image or the summary; other events are progress."""
        if isinstance(event, Image):
            self._images[event.index] = event
        elif isinstance(event, Summary):
            self._summary = event

    def generation(self) -> Generation:
        """Returns the result.

        Raises:
            InternalError: the server ended the stream without a summary.
        """
        if self._summary is None:
            raise InternalError(
                "the server ended the stream without a summary", code=grpc.StatusCode.INTERNAL
            )
        return Generation(tuple(self._images[index] for index in sorted(self._images)), self._summary)


def suffixed(file: Path, image_format: str) -> Path:
    """Returns the path with a suffix of the format, which is added when there is none.

    Raises:
        ValueError: the suffix is that of another format, or of none.
    """
    suffixes = _SUFFIXES[image_format]
    if not file.suffix:
        return file.with_name(file.name + suffixes[0])
    if file.suffix.lower() not in suffixes:
        raise ValueError(
            f"{file} does not end in {' or '.join(suffixes[:2])}, but the image is {image_format}; "
            "ask for another format with generate(format=…)"
        )
    return file


def read_event(message: api.StreamGenerateImageResponse) -> Event | None:
    """Returns a message of a stream as an event; `None` for one of a kind that this version does not have."""
    match message.WhichOneof("event"):
        case "queued":
            queued = message.queued
            wait = queued.estimated_wait.ToTimedelta().total_seconds()
            return Queued(queued.position, wait if queued.HasField("estimated_wait") else None)
        case "step":
            return Step(message.step.step, message.step.step_count)
        case "preview":
            return Preview(message.preview.step, _read_image(message.preview))
        case "image":
            return _read_image(message.image)
        case "summary":
            return _read_summary(message.summary)
        case _:
            return None


def _read_image(image: api.GeneratedImage) -> Image:
    image_format = _FORMATS.get(image.format, "png")
    return Image(image.index, image.seed, image.width_px, image.height_px, image_format, image.data)


def _read_summary(summary: api.GenerationSummary) -> Summary:
    position = {operation: index for index, operation in enumerate(OPERATIONS)}
    timings = [
        Timing(
            timing.stage,
            timing.operation,
            timing.call_count,
            timing.queue_duration.ToTimedelta().total_seconds(),
            timing.compute_duration.ToTimedelta().total_seconds(),
            timing.call_duration.ToTimedelta().total_seconds(),
        )
        for timing in summary.stage_timings
    ]
    return Summary(
        request_id=summary.request_id,
        model=summary.model,
        flow=summary.flow,
        prompt_token_count=summary.prompt_token_count,
        prompt_truncated=summary.prompt_truncated,
        input_megapixels=summary.input_megapixels,
        output_megapixels=summary.output_megapixels,
        step_count=summary.step_count,
        guidance_scale=summary.guidance_scale,
        timings=tuple(sorted(timings, key=lambda each: position.get(each.operation, len(position)))),
        total_seconds=summary.total_duration.ToTimedelta().total_seconds(),
        warnings=(*summary.warnings, *((PROMPT_TRUNCATED,) if summary.prompt_truncated else ())),
    )

"""Streams of OpenAI's images API: server-sent events with partial images and finished ones."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from klein_client import Event, Image, Preview, Summary


@dataclass(frozen=True)
class FinishedImage:
    """A finished image and the fields of its event, without its bytes."""

    image: Image
    fields: dict[str, Any]


class ShownEvents:
    """Events of a request in OpenAI's form.

    Args:
        kind: `image_generation` or `image_edit`.
        quality: that was asked for.
        output_format: likewise.
        partial_images: most previews to show.
    """

    def __init__(self, kind: str, quality: str, output_format: str, partial_images: int) -> None:
        self._kind = kind
        self._common = {"background": "opaque", "quality": quality, "output_format": output_format}
        self._partial_images = partial_images
        self._partial_count = 0
        self._images: dict[int, Image] = {}

    @property
    def image_count(self) -> int:
        """Images that are finished."""
        return len(self._images)

    def partial(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yields the event of a preview. Finished images are kept for `finished`; other events are not shown."""
        if isinstance(event, Image):
            self._images[event.index] = event
        elif isinstance(event, Preview) and self._partial_count < self._partial_images:
            yield {
                "type": f"{self._kind}.partial_image",
                "b64_json": base64.b64encode(event.image.data).decode("ascii"),
                "partial_image_index": self._partial_count,
                "created_at": int(time.time()),
                "size": f"{event.image.width_px}x{event.image.height_px}",
                "step": event.step,
                **self._common,
                "output_format": event.image.format,
            }
            self._partial_count += 1

    def finished(self, usage: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[FinishedImage]:
        """Yields each image. The request's usage belongs to all of them and is in the event of the last; the others
        have zeros, so that the sum over a stream is right.
        """
        last = max(self._images, default=0)
        for index, image in sorted(self._images.items()):
            fields = {
                "type": f"{self._kind}.completed",
                "created_at": int(time.time()),
                "size": f"{image.width_px}x{image.height_px}",
                **self._common,
                "usage": usage if index == last else _nothing(usage),
                "klein": facts,
            }
            yield FinishedImage(image, fields)


def facts(summary: Summary) -> dict[str, Any]:
    """Returns facts about a request that OpenAI's form has no field for."""
    return {
        "request_id": summary.request_id,
        "model": summary.model,
        "flow": summary.flow,
        "steps": summary.step_count,
        "guidance_scale": summary.guidance_scale,
        "seconds": round(summary.total_seconds, 4),
        "warnings": list(summary.warnings),
    }


def _nothing(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _nothing(value) if isinstance(value, Mapping) else value if isinstance(value, str) else 0
        for name, value in usage.items()
    }

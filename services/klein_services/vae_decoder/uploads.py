"""Uploads: image files that arrive in chunks, and how an initial image's two files are prepared."""

from __future__ import annotations

from dataclasses import dataclass

from klein_api.v1 import image_pb2
from klein_core.errors import InvalidInput, Violation
from klein_core.params import Expansion, inpainting_violations
from klein_core.vae_decoder.image_io import MODEL_PIXEL_COUNT, ReferenceLimits, open_image
from klein_core.vae_decoder.initial_image import InitialImage, prepare_initial_image
from klein_services.runtime.frames import MAX_FRAME_BYTES
from klein_services.vae_decoder.held_bytes import RequestBytes

LEAST_PIXEL_COUNT = 64 * 64
"""Least bound of an initial image's pixels: those of the smallest image."""


class FileReader:
    """Assembles one file from its chunks.

    Args:
        field: the file's name in errors.
        limit_bytes: largest file; the stream is refused as soon as it sends more.
        held: counts the bytes.
    """

    def __init__(self, field: str, limit_bytes: int, held: RequestBytes) -> None:
        self.field = field
        self._held = held
        self._limit_bytes = limit_bytes
        self._data = bytearray()

    @property
    def is_empty(self) -> bool:
        """Whether no chunk has been read."""
        return not self._data

    @property
    def data(self) -> bytes:
        """A copy of the file's bytes; make it off the event loop."""
        return bytes(self._data)

    def pixel_count(self, limits: ReferenceLimits) -> int:
        """Returns the pixels that the file's header announces. Copies the file: call it off the event loop.

        Raises:
            InvalidInput: the file is not an image, or exceeds the limits.
        """
        image = open_image(self.data, field=self.field, limits=limits)
        return image.width * image.height

    def add(self, chunk: bytes) -> None:
        """Reads the next chunk.

        Raises:
            InvalidInput: the chunk has the wrong size, or the file is too large.
            QueueFull: requests hold too many bytes.
        """
        if not 1 <= len(chunk) <= MAX_FRAME_BYTES:
            raise InvalidInput.of(
                self.field, f"has a chunk of {len(chunk)} bytes; must be in [1, {MAX_FRAME_BYTES}]"
            )
        if len(self._data) + len(chunk) > self._limit_bytes:
            raise InvalidInput.of(self.field, f"is larger than {self._limit_bytes} bytes, the most allowed")
        self._held.add(len(chunk))
        self._data += chunk

    def release(self) -> None:
        """Forgets the bytes, which are not needed any more."""
        self._held.release(len(self._data))
        self._data = bytearray()

    def require_data(self) -> None:
        """Checks that there is a file.

        Raises:
            InvalidInput: no chunk has been read.
        """
        if self.is_empty:
            raise InvalidInput.of(self.field, "is empty; the image's bytes must follow the spec")


@dataclass(frozen=True)
class Preparation:
    """Validated InpaintingSpec: how an initial image and its mask are prepared."""

    mask_is_alpha: bool
    mask_padding_px: int | None
    expand: Expansion
    pixel_count: int

    @classmethod
    def from_spec(cls, spec: image_pb2.InpaintingSpec) -> Preparation:
        """Validates a spec, except for what depends on the files.

        Raises:
            InvalidInput: fields are outside their limits; lists all violations.
        """
        preparation = cls(
            spec.mask_is_alpha,
            spec.mask_padding_px if spec.HasField("mask_padding_px") else None,
            Expansion(spec.expand.left_px, spec.expand.top_px, spec.expand.right_px, spec.expand.bottom_px),
            spec.pixel_count or MODEL_PIXEL_COUNT,
        )
        preparation.check(has_mask=True)
        return preparation

    def check(self, *, has_mask: bool) -> None:
        """Raises InvalidInput, with all violations, for what cannot be prepared with or without a mask."""
        violations = list(
            inpainting_violations(
                has_initial_image=True,
                has_mask=has_mask,
                strength=None,
                mask_padding_px=self.mask_padding_px,
                expand=self.expand,
                has_size=False,
            )
        )
        if self.pixel_count < LEAST_PIXEL_COUNT:
            violations.append(
                Violation("pixel_count", f"is {self.pixel_count}; must be 0 or at least {LEAST_PIXEL_COUNT}")
            )
        if violations:
            raise InvalidInput(violations)


class InitialImageFiles:
    """Assembles the files of an initial image and its mask, the image's first.

    Args:
        preparation: how they are prepared.
        limit_bytes: largest file, each.
        held: counts the bytes.
    """

    def __init__(self, preparation: Preparation, limit_bytes: int, held: RequestBytes) -> None:
        self._preparation = preparation
        self._image = FileReader("initial_image", limit_bytes, held)
        self._mask = FileReader("mask", limit_bytes, held)

    def add_image(self, chunk: bytes) -> None:
        """Reads the image's next chunk.

        Raises:
            InvalidInput: it does not fit, or comes after the mask's.
            QueueFull: requests hold too many bytes.
        """
        if not self._mask.is_empty:
            raise InvalidInput.of("initial_image", "has chunks after those of the mask; it must come first")
        self._image.add(chunk)

    def add_mask(self, chunk: bytes) -> None:
        """Reads the mask's next chunk.

        Raises:
            InvalidInput: it does not fit.
            QueueFull: requests hold too many bytes.
        """
        self._mask.add(chunk)

    def release(self) -> None:
        """Forgets the bytes of both files, which are not needed any more."""
        self._image.release()
        self._mask.release()

    def require_complete(self) -> None:
        """Checks that the files that the preparation needs are there.

        Raises:
            InvalidInput: the image is missing, or the mask that a padding needs.
        """
        self._image.require_data()
        self._preparation.check(has_mask=not self._mask.is_empty)

    def pixel_count(self, limits: ReferenceLimits) -> int:
        """Returns the pixels that both files announce, as `FileReader.pixel_count`."""
        mask_pixel_count = 0 if self._mask.is_empty else self._mask.pixel_count(limits)
        return self._image.pixel_count(limits) + mask_pixel_count

    def prepare(self, limits: ReferenceLimits) -> InitialImage:
        """Decodes both files. Slow: call it off the event loop.

        Raises:
            InvalidInput: as `prepare_initial_image`.
        """
        preparation = self._preparation
        return prepare_initial_image(
            self._image.data,
            None if self._mask.is_empty else self._mask.data,
            mask_is_alpha=preparation.mask_is_alpha,
            mask_padding_px=preparation.mask_padding_px,
            expand=preparation.expand,
            pixel_count=preparation.pixel_count,
            limits=limits,
        )

"""Masked edit of a request: the initial image that is painted over, its mask, and the checks of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klein_api.v1.image_pb2 import InpaintingSpec
from klein_api.v1.image_service_pb2 import ImageSpec
from klein_core.errors import Violation
from klein_core.params import DEFAULT_STRENGTH, Expansion, inpainting_violations
from klein_services.runtime.protowire import FileChunks

MASKED_EDIT = "masked-edit"
"""Flow of requests with an initial image."""


@dataclass(frozen=True)
class MaskedEdit:
    """The files of a masked edit and how they are used."""

    initial_image: bytes
    mask: bytes | None
    strength: float
    """Share of the steps that are run on the initial image."""
    inpainting: InpaintingSpec
    """How the vae-decoder prepares both files, for encoding and for the overlay."""
    has_overlay: bool
    """Whether the initial image's own pixels stand outside the mask."""

    @property
    def is_partial(self) -> bool:
        """Whether a part of the initial image is to stay: without a mask or added sides, all of it is made anew."""
        sides = self.inpainting.expand
        return self.mask is not None or any((sides.left_px, sides.top_px, sides.right_px, sides.bottom_px))

    def files(self, image_chunks: FileChunks, mask_chunks: FileChunks) -> Iterator[bytes]:
        """Yields both files as serialized messages, each in the field that its argument names."""
        yield from image_chunks.messages(self.initial_image)
        if self.mask is not None:
            yield from mask_chunks.messages(self.mask)


def masked_edit_of(spec: ImageSpec, pixel_count: int, *, is_lossless: bool) -> MaskedEdit | None:
    """Returns the masked edit of a valid request; `None` without an initial image.

    Args:
        spec: the request.
        pixel_count: most pixels of one image.
        is_lossless: whether the image file keeps every pixel, which decides what an unset `preserve_unmasked` means.
    """
    if not spec.HasField("initial_image"):
        return None
    inpainting = InpaintingSpec(mask_is_alpha=spec.mask_is_alpha, pixel_count=pixel_count)
    if spec.HasField("mask_padding_px"):
        inpainting.mask_padding_px = spec.mask_padding_px
    if spec.HasField("expand"):
        inpainting.expand.CopyFrom(spec.expand)
    preserves = spec.preserve_unmasked if spec.HasField("preserve_unmasked") else is_lossless
    # Where all of the image is made anew, no pixel stands outside the mask.
    has_unmasked = spec.HasField("mask") or bool(_expansion(spec))
    return MaskedEdit(
        initial_image=spec.initial_image,
        mask=spec.mask if spec.HasField("mask") else None,
        strength=spec.strength if spec.HasField("strength") else DEFAULT_STRENGTH,
        inpainting=inpainting,
        has_overlay=has_unmasked and (preserves or spec.HasField("mask_padding_px")),
    )


def masked_edit_violations(spec: ImageSpec, file_bytes: int) -> Iterator[Violation]:
    """Yields what is wrong with the fields of a masked edit, before any file is opened.

    Args:
        spec: the request.
        file_bytes: most bytes of a file.
    """
    yield from inpainting_violations(
        has_initial_image=spec.HasField("initial_image"),
        has_mask=spec.HasField("mask"),
        strength=spec.strength if spec.HasField("strength") else None,
        mask_padding_px=spec.mask_padding_px if spec.HasField("mask_padding_px") else None,
        expand=_expansion(spec),
        has_size=spec.HasField("width_px") or spec.HasField("height_px"),
    )
    if spec.HasField("initial_image"):
        yield from file_violations("initial_image", spec.initial_image, file_bytes)
        if spec.mask_is_alpha and not spec.HasField("mask"):
            yield Violation("mask_is_alpha", "needs a mask")
    else:
        for name, is_given in (
            ("mask_is_alpha", spec.mask_is_alpha),
            ("preserve_unmasked", spec.HasField("preserve_unmasked")),
        ):
            if is_given:
                yield Violation(name, "needs an initial_image")
    if spec.HasField("mask"):
        yield from file_violations("mask", spec.mask, file_bytes)


def file_violations(field: str, data: bytes, byte_count: int) -> Iterator[Violation]:
    """Yields what is wrong with the length of an image file."""
    if not data:
        yield Violation(field, "is empty; must be the bytes of an image file")
    elif len(data) > byte_count:
        yield Violation(field, f"has {len(data)} bytes; at most {byte_count} are allowed")


def _expansion(spec: ImageSpec) -> Expansion:
    sides = spec.expand
    return Expansion(sides.left_px, sides.top_px, sides.right_px, sides.bottom_px)

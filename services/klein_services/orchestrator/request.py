"""Validated requests: an `ImageSpec` checked against the limits of its model, with the defaults filled in."""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from klein_api.v1.image_pb2 import ImageFormat, Priority
from klein_api.v1.image_service_pb2 import ImageSpec
from klein_core.errors import InvalidInput, Violation
from klein_core.image_format import METADATA_BYTE_LIMIT, format_size_violations, metadata_violations
from klein_core.params import DEFAULT_LIMITS, AdapterChoice, GenerationParams, Limits, fitted_size
from klein_services.orchestrator.input_images import InputImage, input_images
from klein_services.orchestrator.masked_edit import (
    MASKED_EDIT,
    MaskedEdit,
    file_violations,
    masked_edit_of,
    masked_edit_violations,
)
from klein_services.orchestrator.routing import Route
from klein_services.orchestrator.stage_directory import RouteInfo

LOSSY_FORMATS = (ImageFormat.IMAGE_FORMAT_JPEG, ImageFormat.IMAGE_FORMAT_WEBP)
REFERENCE_PIXEL_COUNT = 1024 * 1024
"""Most pixels of a reference as the model sees it; the vae-decoder scales larger ones down."""
_OTHER_FIELDS_BYTES = 1 << 20
"""Room for everything but the image files; prompts take most of it."""
_OTHER_METADATA_BYTES = 4096
"""Room in an image file's metadata for what is stored besides the prompts."""
_WORD = re.compile(r"[^\W_]+")
_SHOWN_SUBJECT_WORDS = 6
_RANDOM_SEED_LIMIT = 2**32
"""Random seeds stay below this, so that they are easy to copy."""


@dataclass(frozen=True)
class ImageRequest:
    """A request that is within all limits."""

    route: Route
    info: RouteInfo
    params: GenerationParams
    """Parameters with defaults; a side that an input image gives has the smallest allowed value."""
    references: tuple[bytes, ...]
    masked_edit: MaskedEdit | None
    format: ImageFormat.ValueType
    quality: int | None
    priority: Priority.ValueType
    preview_interval_steps: int
    embedded_prompts: Mapping[str, str]
    """Prompts to store in the image files, by metadata key; empty unless the client asks for it."""
    follows_width: bool
    """Whether the initial image gives the width, or without one the first reference."""
    follows_height: bool
    """Whether one of them gives the height."""
    flow: str
    """text-to-image, edit, multi-reference or masked-edit."""

    @property
    def warnings(self) -> list[str]:
        """Sentences for the client of a valid request that may not give what it wants."""
        if self.has_input_images or names_a_subject(self.params.prompt, self.info.subject_words):
            return []
        shown = ", ".join(self.info.subject_words[:_SHOWN_SUBJECT_WORDS])
        return [
            f"The prompt names nothing that the model {self.route.name!r} can draw, so an image may show only a "
            f"background; it draws, for example: {shown}."
        ]

    @cached_property
    def input_images(self) -> tuple[InputImage, ...]:
        """The files of the request: the initial image, its mask, the references."""
        return input_images(self.masked_edit, self.references)

    @property
    def most_pixel_count(self) -> int:
        """Most pixels that the input images and the images may have together, before any file is decoded."""
        limit = self.params.limits.pixel_count
        initial = 0 if self.masked_edit is None else max(limit, REFERENCE_PIXEL_COUNT)
        output = self.params.width_px * self.params.height_px if self.size_is_known else limit
        return initial + len(self.references) * REFERENCE_PIXEL_COUNT + output * len(self.params.seeds)

    @property
    def has_input_images(self) -> bool:
        return bool(self.references) or self.masked_edit is not None

    @property
    def size_is_known(self) -> bool:
        return not (self.follows_width or self.follows_height)

    def sized(self, width_px: int, height_px: int) -> GenerationParams:
        """Returns the parameters, with an input image's processed size where the request gives none.

        A reference that is larger than the model's images may be gives a smaller size of a like aspect ratio. An
        initial image is processed to the model's size already.

        Raises:
            InvalidInput: with the side that the request gives, the image would have too many pixels; or the initial
                image has a side below the smallest.
        """
        if self.masked_edit is None:
            width_px, height_px = fitted_size(width_px, height_px, self.params.limits)
        return replace(
            self.params,
            width_px=width_px if self.follows_width else self.params.width_px,
            height_px=height_px if self.follows_height else self.params.height_px,
        )


@dataclass(frozen=True)
class AdmissionLimits:
    """Limits that the operator sets for requests of every model; the size is limited for each model."""

    reference_count: int = DEFAULT_LIMITS.reference_count
    reference_bytes: int = 20 * 1024 * 1024
    image_count: int = DEFAULT_LIMITS.image_count
    adapter_count: int = DEFAULT_LIMITS.adapter_count

    @property
    def request_bytes(self) -> int:
        """Most bytes of a request's message: all image files, and one too many, so that an error can name it."""
        return (self.reference_count + 3) * self.reference_bytes + _OTHER_FIELDS_BYTES

    def of(self, route: Route) -> Limits:
        """Returns the limits of requests for `route`'s model."""
        return Limits(
            pixel_count=route.maximum_pixel_count,
            reference_count=self.reference_count,
            image_count=self.image_count,
            adapter_count=self.adapter_count,
        )


def validated(
    spec: ImageSpec, preview_interval_steps: int, route: Route, info: RouteInfo, limits: AdmissionLimits
) -> ImageRequest:
    """Checks all fields of a request.

    Raises:
        InvalidInput: one or more fields are outside their limits; all of them are named.
    """
    route = route.narrowed(info.default_size_px, info.pixel_count)
    violations = list(_violations(spec, preview_interval_steps, limits))
    params: GenerationParams | None = None
    try:
        params = _params(spec, route, info, limits)
    except InvalidInput as error:
        violations = [*error.violations, *violations]
    if params is not None:
        is_known = spec.format in ImageFormat.values() and spec.format
        name = ImageFormat.Name(spec.format if is_known else ImageFormat.IMAGE_FORMAT_PNG)
        name = name.removeprefix("IMAGE_FORMAT_").lower()
        # A side that follows a reference is below every format's end.
        violations += format_size_violations(name, params.width_px, params.height_px)
    if violations or params is None:
        raise InvalidInput(violations)
    return ImageRequest(
        route=route,
        info=info,
        params=params,
        references=tuple(spec.references),
        masked_edit=masked_edit_of(
            spec, params.limits.pixel_count, is_lossless=spec.format not in LOSSY_FORMATS
        ),
        format=spec.format or ImageFormat.IMAGE_FORMAT_PNG,
        quality=spec.quality if spec.HasField("quality") else None,
        priority=spec.priority,
        preview_interval_steps=preview_interval_steps,
        embedded_prompts=_embedded_prompts(spec),
        follows_width=_has_input_images(spec) and not spec.HasField("width_px"),
        follows_height=_has_input_images(spec) and not spec.HasField("height_px"),
        flow=flow_of(spec),
    )


def _params(spec: ImageSpec, route: Route, info: RouteInfo, limits: AdmissionLimits) -> GenerationParams:
    bounds = limits.of(route)
    default_side_px = bounds.side_px if _has_input_images(spec) else route.default_size_px
    first_seed = spec.seed if spec.HasField("seed") else secrets.randbelow(_RANDOM_SEED_LIMIT)
    # A count outside its limits is a violation that `_violations` names, and may be far too large for a range.
    count = min(max(image_count(spec), 1), limits.image_count)
    return GenerationParams(
        width_px=spec.width_px if spec.HasField("width_px") else default_side_px,
        height_px=spec.height_px if spec.HasField("height_px") else default_side_px,
        is_distilled=info.distilled,
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt if spec.HasField("negative_prompt") else None,
        seeds=tuple(range(first_seed, first_seed + count)),
        step_count=spec.step_count if spec.HasField("step_count") else info.default_step_count,
        guidance_scale=(
            spec.guidance_scale if spec.HasField("guidance_scale") else info.default_guidance_scale
        ),
        reference_count=len(spec.references),
        adapters=tuple(
            AdapterChoice(adapter.name, adapter.scale if adapter.HasField("scale") else 1.0)
            for adapter in spec.adapters
        ),
        limits=bounds,
    )


def _violations(spec: ImageSpec, preview_interval_steps: int, limits: AdmissionLimits) -> Iterator[Violation]:
    """Yields what is wrong with the fields that `GenerationParams` does not check."""
    count = image_count(spec)
    if not 1 <= count <= limits.image_count:
        yield Violation("image_count", f"is {count}; must be in [1, {limits.image_count}]")
    for index, reference in enumerate(spec.references[: limits.reference_count]):
        yield from file_violations(f"references[{index}]", reference, limits.reference_bytes)
    yield from masked_edit_violations(spec, limits.reference_bytes)
    if spec.format not in ImageFormat.values():
        yield Violation("format", f"is {spec.format}; must be one of {', '.join(ImageFormat.keys())}")
    if spec.HasField("quality"):
        if spec.format not in LOSSY_FORMATS:
            yield Violation(
                "quality", "is not taken by lossless formats; leave it out or choose JPEG or WebP"
            )
        elif not 1 <= spec.quality <= 100:
            yield Violation("quality", f"is {spec.quality}; must be in [1, 100]")
    if spec.priority not in Priority.values():
        yield Violation("priority", f"is {spec.priority}; must be one of {', '.join(Priority.keys())}")
    if any(metadata_violations(_embedded_prompts(spec) | {"other": "." * _OTHER_METADATA_BYTES})):
        yield Violation(
            "embed_prompt",
            f"is true; the prompts are longer than the {METADATA_BYTE_LIMIT} bytes that a file holds",
        )
    if preview_interval_steps < 0:
        yield Violation(
            "preview_interval_steps", f"is {preview_interval_steps}; must be at least 0, which means none"
        )


def _embedded_prompts(spec: ImageSpec) -> dict[str, str]:
    if not spec.embed_prompt:
        return {}
    return {"prompt": spec.prompt} | (
        {"negative_prompt": spec.negative_prompt} if spec.negative_prompt else {}
    )


def _has_input_images(spec: ImageSpec) -> bool:
    return bool(spec.references) or spec.HasField("initial_image")


def flow_of(spec: ImageSpec) -> str:
    """Returns masked-edit with an initial image, else text-to-image, edit or multi-reference by the references."""
    if spec.HasField("initial_image"):
        return MASKED_EDIT
    return ("text-to-image", "edit", "multi-reference")[min(len(spec.references), 2)]


def image_count(spec: ImageSpec) -> int:
    """Returns how many images a request asks for, unchecked."""
    return spec.image_count if spec.HasField("image_count") else 1


def names_a_subject(prompt: str, subject_words: Sequence[str]) -> bool:
    """Returns whether a prompt contains one of the words or phrases, in any case; true when there are none.

    Only whole words count: "ring" is not in "string".
    """
    text = f" {_words(prompt)} "
    return not subject_words or any(f" {_words(subject)} " in text for subject in subject_words)


def _words(text: str) -> str:
    """Returns a text's words, case-folded and in one Unicode form, with one space between them."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))

"""Requests: the arguments of `generate` and `stream`, and the message that they become."""

from __future__ import annotations

import difflib
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_client.endpoint import authorization
from klein_client.errors import ARGUMENTS, InvalidRequest
from klein_client.results import Generation
from klein_client.sources import ImageSource, listed

AdapterNames: TypeAlias = Mapping[str, float] | Sequence[str | tuple[str, float | None]]
"""Adapters by name, with or without their scales."""
LONGEST_TIMEOUT_SECONDS = 24 * 3600.0
"""Longest time that a request may take; no server allows more."""
IDEMPOTENCY_KEY = "idempotency-key"
_KEY = re.compile(r"[!-~]{1,128}")
_FORMATS = {
    "png": image_pb2.IMAGE_FORMAT_PNG,
    "jpeg": image_pb2.IMAGE_FORMAT_JPEG,
    "jpg": image_pb2.IMAGE_FORMAT_JPEG,
    "webp": image_pb2.IMAGE_FORMAT_WEBP,
    "raw": image_pb2.IMAGE_FORMAT_RAW_RGB,
}
_PRIORITIES = {
    "interactive": image_pb2.PRIORITY_INTERACTIVE,
    "standard": image_pb2.PRIORITY_STANDARD,
    "batch": image_pb2.PRIORITY_BATCH,
}
_SCALARS = (
    "model",
    "negative_prompt",
    "width_px",
    "height_px",
    "step_count",
    "guidance_scale",
    "seed",
    "image_count",
    "quality",
    "embed_prompt",
    "mask_is_alpha",
    "strength",
    "mask_padding_px",
    "preserve_unmasked",
)
"""Fields of `ImageSpec` that take an argument as it is."""


class ImageOptions(TypedDict, total=False):
    """Options of a request; one that is left out or `None` is left to the server."""

    model: str | None
    """Name of a model; by default the server's default model."""
    negative_prompt: str | None
    """Description of what the image should not show; base models only."""
    references: ImageSource | Sequence[ImageSource] | Generation | None
    """Images to edit or to combine."""
    initial_image: ImageSource | None
    """Image that is painted over; it decides the size."""
    mask: ImageSource | None
    """Image of the same aspect: white is made anew. By default all of the initial image."""
    mask_is_alpha: bool | None
    """Whether the mask's alpha channel counts, where 0 is made anew."""
    mask_padding: int | None
    """Makes only the mask's surroundings, so many pixels wide, at full resolution."""
    strength: float | None
    """Share of the steps that are run on the initial image, above 0 and at most 1."""
    expand: tuple[int, int, int, int] | None
    """Pixels that are added left, top, right and bottom of the initial image and made."""
    preserve_unmasked: bool | None
    """Whether the initial image's own pixels stand outside the mask."""
    width: int | None
    """Pixels, a multiple of 16; by default those of the first reference, else of the model."""
    height: int | None
    """Likewise."""
    steps: int | None
    """Denoising steps."""
    guidance_scale: float | None
    """Strength of guidance; base models only."""
    seed: int | None
    """Seed of the first image; the following images take the next numbers. Random by default."""
    count: int | None
    """Number of images."""
    format: str | None
    """File format of the images: `png` by default, `jpeg`, `webp` or `raw`."""
    quality: int | None
    """Quality of JPEG and WebP, 1 to 100."""
    priority: str | None
    """Class in the server's queues: `interactive`, `standard` by default, or `batch`."""
    adapters: AdapterNames | None
    """Names of adapters, or names with scales: `{"watercolor": 0.8}`, `[("watercolor", 0.8), "ink"]`."""
    embed_prompt: bool | None
    """Whether the prompts are stored in the image files."""
    timeout_seconds: float | None
    """Longest time for the whole request, downloads and repeated attempts included; by default the client's."""
    idempotency_key: str | None
    """Key by which the server recognizes a repeated request; by default a new one for each request."""
    token: str | None
    """Token for this request in place of the client's."""
    metadata: Sequence[tuple[str, str]] | None
    """Further gRPC metadata, for example `[("traceparent", …)]`."""


def check_names(options: Mapping[str, Any], method: str) -> None:
    """Raises TypeError for an option that there is none of."""
    for name in options:
        if name not in ImageOptions.__annotations__:
            close = difflib.get_close_matches(name, ImageOptions.__annotations__, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")


def timeout_of(seconds: float | None, default: float) -> float:
    """Returns the timeout of a call.

    Raises:
        InvalidRequest: it is no number above 0 and up to a day.
    """
    timeout = default if seconds is None else seconds
    if not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST_TIMEOUT_SECONDS:
        raise InvalidRequest.of(
            "timeout_seconds", f"is {timeout!r}; it must be above 0 and at most {LONGEST_TIMEOUT_SECONDS:.0f}"
        )
    return float(timeout)


def image_sources(options: ImageOptions) -> dict[str, ImageSource]:
    """Returns the sources of a request's image files by the field that takes them."""
    sources = {f"references[{index}]": each for index, each in enumerate(listed(options.get("references")))}
    if (initial := options.get("initial_image")) is not None:
        sources["initial_image"] = initial
    if (mask := options.get("mask")) is not None:
        sources["mask"] = mask
    return sources


def call_metadata(
    options: ImageOptions, default_authorization: tuple[tuple[str, str], ...], *, retry: bool
) -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a request, with a new idempotency key if it may be repeated.

    Raises:
        InvalidRequest: the idempotency key has other characters than those that servers take.
        ValueError: the token cannot be one.
    """
    token = options.get("token")
    metadata = list(default_authorization if token is None else authorization(token))
    key = options.get("idempotency_key") or (str(uuid.uuid4()) if retry else None)
    if key is not None:
        if not _KEY.fullmatch(key):
            raise InvalidRequest.of(IDEMPOTENCY_KEY, "must have 1 to 128 visible ASCII characters")
        metadata.append((IDEMPOTENCY_KEY, key))
    return (*metadata, *(options.get("metadata") or ()))


def image_spec(
    prompt: str,
    options: ImageOptions,
    files: Mapping[str, bytes],
    metadata: Sequence[tuple[str, str]] = (),
    *,
    retry: bool = False,
) -> api.ImageSpec:
    """Returns the message of a request. Only the server knows its limits, so it checks them.

    Args:
        prompt: the prompt.
        options: the other arguments.
        files: image files by field, as `image_sources` names them.
        metadata: of the call.
        retry: chooses the seed here when there is none, so that a repeated attempt makes the same images. It follows
            from the idempotency key: a client that repeats a request with its own key sends the same message.

    Raises:
        InvalidRequest: an argument fits no request.
    """
    spec = api.ImageSpec()
    arguments: Mapping[str, Any] = options
    _set(spec, "prompt", prompt)
    for field in _SCALARS:
        if (value := arguments.get(ARGUMENTS.get(field, field))) is not None:
            _set(spec, field, value)
    for field, names in (("format", _FORMATS), ("priority", _PRIORITIES)):
        if (name := arguments.get(field)) is not None:
            if name not in names:
                raise InvalidRequest.of(field, f"is {name!r}; it must be one of {', '.join(names)}")
            _set(spec, field, names[name])
    for field, data in files.items():
        if field.startswith("references["):
            spec.references.append(data)
        else:
            _set(spec, field, data)
    _add_adapters(spec, options.get("adapters") or ())
    if (sides := options.get("expand")) is not None:
        _set_expansion(spec, sides)
    if retry and not spec.HasField("seed"):
        key = dict(metadata).get(IDEMPOTENCY_KEY, "")
        spec.seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return spec


def _add_adapters(spec: api.ImageSpec, adapters: AdapterNames) -> None:
    listed_adapters: Iterable[Any] = [adapters] if isinstance(adapters, str) else adapters
    if isinstance(adapters, Mapping):
        listed_adapters = adapters.items()
    for index, each in enumerate(listed_adapters):
        pair = (each, None) if isinstance(each, str) else each
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise InvalidRequest.of(f"adapters[{index}]", f"is {each!r}; give a name, or a name and a scale")
        name, scale = pair
        adapter = spec.adapters.add()
        _set(adapter, "name", name, f"adapters[{index}].name")
        if scale is not None:
            _set(adapter, "scale", scale, f"adapters[{index}].scale")


def _set_expansion(spec: api.ImageSpec, sides: Sequence[int]) -> None:
    names = ("left_px", "top_px", "right_px", "bottom_px")
    if not isinstance(sides, Sequence) or len(sides) != len(names):
        raise InvalidRequest.of(
            "expand", f"is {sides!r}; it must have four numbers: left, top, right and bottom"
        )
    spec.expand.SetInParent()
    for name, side in zip(names, sides, strict=True):
        _set(spec.expand, name, side, f"expand.{name}")


def _set(message: Any, name: str, value: object, field: str = "") -> None:
    """Sets a field; raises InvalidRequest for a value that does not fit its type."""
    try:
        setattr(message, name, value)
    except UnicodeError as error:
        raise InvalidRequest.of(field or name, "is not valid UTF-8") from error
    except TypeError as error:
        raise InvalidRequest.of(field or name, f"cannot be of type {type(value).__name__}") from error
    except ValueError as error:
        raise InvalidRequest.of(field or name, f"is far outside its limits: {value!r}") from error

"""Requests of OpenAI's images API: their fields, and the options of the orchestrator that they become."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from starlette.datastructures import FormData, UploadFile

from klein_client import ImageOptions
from klein_services.gateway.errors import invalid_field
from klein_services.gateway.gateway import Gateway
from klein_services.gateway.json_fields import MAXIMUM_SEED, JsonFields

FIELDS = {
    "n": "count",
    "size": "width",
    "output_format": "format",
    "output_compression": "quality",
    "image": "references",
    "partial_images": "preview_interval",
}
"""Field → option of the orchestrator's client that it becomes, where the names differ."""
PROMPT_CHARACTERS = 32768
MAXIMUM_IMAGES = 16
"""Images of an edit, as many as OpenAI takes; the model's own limit is usually lower."""
MAXIMUM_PARTIAL_IMAGES = 3
_QUALITIES = ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})", re.ASCII)
_PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_NUMBERS = (
    *("n", "output_compression", "partial_images", "seed", "steps", "guidance_scale", "strength"),
    "mask_padding",
)
_FLAGS = ("stream", "preserve_unmasked", "embed_prompt")
_JSON_TEXTS = ("adapters",)
"""Fields that a form carries as JSON, because a form has no lists of pairs."""


@dataclass(frozen=True)
class OpenAiRequest:
    """A request, checked as far as the gateway can."""

    prompt: str
    options: ImageOptions
    output_format: str
    quality: str
    wants_url: bool
    wants_stream: bool
    partial_images: int


@dataclass(frozen=True)
class InputImages:
    """Image files of an edit."""

    images: Sequence[bytes] = ()
    mask: bytes | None = None


def read_request(values: Mapping[str, Any], inputs: InputImages, aliases: Mapping[str, str]) -> OpenAiRequest:
    """Reads the fields of a request.

    Args:
        values: all fields but the image files.
        inputs: image files; empty for generations.
        aliases: model by alias.

    Raises:
        ApiError: fields are wrong or unknown; all of them are named.
    """
    fields = JsonFields(values)
    prompt = fields.text("prompt", limit=PROMPT_CHARACTERS, required=True)
    model = fields.text("model", limit=256)
    output_format = fields.choice("output_format", ("png", "jpeg", "webp"), "png")
    compression = fields.integer("output_compression", minimum=0, maximum=100)
    if compression is not None and compression != 100 and output_format == "png":
        fields.refuse("output_compression", "is for jpeg and webp; png loses nothing")
    if fields.choice("background", ("auto", "opaque", "transparent"), "auto") == "transparent":
        fields.refuse("background", "is transparent; the models make opaque images only")
    # Accepted without effect: the models have one quality and no style, and clients send these by default.
    quality = fields.choice("quality", _QUALITIES, "auto")
    fields.choice("moderation", ("auto", "low"), "auto")
    fields.choice("style", ("vivid", "natural"), "vivid")
    fields.choice("input_fidelity", ("high", "low"), "high")
    for name in ("user", "safety_identifier"):
        fields.text(name, limit=512)
    wants_url = fields.choice("response_format", ("b64_json", "url"), "b64_json") == "url"
    wants_stream = fields.boolean("stream") or False
    partial_images = fields.integer("partial_images", minimum=0, maximum=MAXIMUM_PARTIAL_IMAGES) or 0
    if partial_images and not wants_stream:
        fields.refuse("partial_images", "needs stream to be true")
    width, height = _size(fields, inputs)
    options = ImageOptions(
        model=aliases.get(model, model) if model else None,
        count=fields.integer("n", minimum=1, maximum=64),
        width=width,
        height=height,
        format=cast("Any", output_format),
        quality=None if compression is None or output_format == "png" else max(1, compression),
        seed=fields.integer("seed", minimum=0, maximum=MAXIMUM_SEED),
        steps=fields.integer("steps", minimum=1, maximum=1000),
        guidance_scale=fields.number("guidance_scale", minimum=1, maximum=100),
        negative_prompt=fields.text("negative_prompt", limit=PROMPT_CHARACTERS),
        strength=fields.number("strength", minimum=0, maximum=1),
        mask_padding=fields.integer("mask_padding", minimum=0, maximum=1024),
        preserve_unmasked=fields.boolean("preserve_unmasked"),
        embed_prompt=fields.boolean("embed_prompt"),
        priority=cast("Any", fields.choice("priority", ("interactive", "standard", "batch"), "standard")),
        adapters=_adapters(fields),
    )
    if inputs.mask is None:
        options["references"] = list(inputs.images)
    else:
        # The mask belongs to the first image, and its transparent parts are made anew.
        options["initial_image"], options["references"] = inputs.images[0], list(inputs.images[1:])
        options["mask"], options["mask_is_alpha"] = inputs.mask, True
    fields.check(HTTPStatus.BAD_REQUEST)
    return OpenAiRequest(
        prompt or "", options, output_format, quality, wants_url, wants_stream, partial_images
    )


def _size(fields: JsonFields, inputs: InputImages) -> tuple[int | None, int | None]:
    size = fields.text("size", limit=16)
    if size is None or size == "auto":
        return None, None
    if (match := _SIZE.fullmatch(size)) is None:
        fields.refuse("size", "must be auto or WIDTHxHEIGHT, such as 1024x1024")
        return None, None
    width, height = int(match[1]), int(match[2])
    if width % 16 or height % 16 or min(width, height) < 64:
        fields.refuse("size", f"is {size}; width and height must be multiples of 16, at least 64")
    if inputs.mask is not None:
        if png_size(inputs.mask) != (width, height):
            fields.refuse("size", "must be auto or the size of the mask, whose image decides the size")
        return None, None
    return width, height


def _adapters(fields: JsonFields) -> Any:
    """Returns adapters as the client takes them: a list of names, or an object of names and scales."""
    value = fields.raw("adapters")
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    if isinstance(value, dict) and all(type(scale) in (int, float) for scale in value.values()):
        return value
    fields.refuse("adapters", "must be a list of names, or an object of names and scales")
    return None


def png_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a PNG file; `None` when it is none."""
    if not data.startswith(_PNG_BEGIN) or len(data) < 24:
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


async def read_form(form: FormData, gateway: Gateway) -> tuple[dict[str, Any], InputImages]:
    """Splits a form into its fields and image files.

    Raises:
        ApiError: a field is there twice, has another type, or is no image.
    """
    values: dict[str, Any] = {}
    images: list[Any] = []
    masks: list[Any] = []
    problems = JsonFields({})
    for name, value in form.multi_items():
        content: Any = await value.read() if isinstance(value, UploadFile) else value
        if name in ("image", "image[]"):
            images.append(content)
        elif name in ("mask", "mask[]"):
            masks.append(content)
        elif isinstance(content, bytes):
            problems.refuse(name[:64], "is a file; only image and mask are")
        elif name in values:
            problems.refuse(name[:64], "is there twice")
        else:
            values[name] = _typed(name, content, problems)
    problems.check(HTTPStatus.BAD_REQUEST)
    return values, await read_inputs(images, masks, gateway)


def _typed(name: str, text: str, problems: JsonFields) -> Any:
    """Returns a form's text as the JSON value that the field has elsewhere."""
    if name in _FLAGS:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if name in _NUMBERS:
        try:
            return float(text) if re.search(r"[.eE]", text) else int(text)
        except ValueError:
            return text
    if name in _JSON_TEXTS:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            problems.refuse(name, "is no JSON")
    return text


async def read_inputs(images: Sequence[Any], masks: Sequence[Any], gateway: Gateway) -> InputImages:
    """Returns the image files of an edit: uploaded ones, URLs, or base64.

    Raises:
        ApiError: there is none, there are too many, or one is no image.
    """
    problems = JsonFields({})
    if not images:
        problems.refuse("image", "is missing")
    if len(images) > MAXIMUM_IMAGES:
        problems.refuse("image", f"is there {len(images)} times; at most {MAXIMUM_IMAGES} are allowed")
    if len(masks) > 1:
        problems.refuse("mask", "is there more than once")
    problems.check(HTTPStatus.BAD_REQUEST)
    files = [await _file(each, f"image[{index}]", gateway) for index, each in enumerate(images)]
    mask = await _file(masks[0], "mask", gateway) if masks else None
    return InputImages(files, mask)


async def _file(content: Any, field: str, gateway: Gateway) -> bytes:
    if isinstance(content, bytes):
        return gateway.downloads.checked(content, field)
    if isinstance(content, str):
        return await gateway.downloads.image(content, field)
    raise invalid_field(field, "must be a file, a URL, a data: URL or base64")


async def read_json_edit(values: Mapping[str, Any], gateway: Gateway) -> tuple[dict[str, Any], InputImages]:
    """Splits a JSON object into its fields and image files; `image` is a text or a list of texts.

    Raises:
        ApiError: one is no image.
    """
    rest = dict(values)
    image, mask = rest.pop("image", None), rest.pop("mask", None)
    images = image if isinstance(image, list) else [image] if image is not None else []
    return rest, await read_inputs(images, [mask] if mask is not None else [], gateway)


def preview_interval(partial_images: int, step_count: int) -> int:
    """Returns the steps between previews by which at least so many come before the last step, where there are steps."""
    return max(1, step_count // (partial_images + 1))

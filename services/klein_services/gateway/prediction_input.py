"""Input of predictions: the fields that Replicate's and eachlabs' clients send for FLUX.2 [klein]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klein_client import Model
from klein_services.gateway.input_images import InputImages, shown
from klein_services.gateway.job_requests import MAXIMUM_PROMPT_CHARACTERS, fit_size
from klein_services.gateway.json_fields import MAXIMUM_SEED, JsonFields

ASPECTS = {
    "1:1": (1, 1),
    "16:9": (16, 9),
    "3:2": (3, 2),
    "2:3": (2, 3),
    "4:5": (4, 5),
    "5:4": (5, 4),
    "9:16": (9, 16),
    "3:4": (3, 4),
    "4:3": (4, 3),
    "21:9": (21, 9),
    "9:21": (9, 21),
}
MATCH_IMAGE = "match_input_image"
MEGAPIXELS = ("0.25", "0.5", "1", "2", "4")
FORMATS = {"webp": "webp", "jpg": "jpeg", "jpeg": "jpeg", "png": "png"}
IMAGE_FIELDS = ("images", "input_images", "image", "input_image")
"""Names of the list of references, or of a single one; a request has one of them."""
IGNORED_FIELDS = ("disable_safety_checker", "go_fast")
"""Fields that are checked and change nothing: the operator's policy holds, and the model is as fast as it is."""
MAXIMUM_QUALITY = 100
LARGEST_LIST = 1000

INPUT_SCHEMA: Mapping[str, Any] = {
    "title": "Input",
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string", "maxLength": MAXIMUM_PROMPT_CHARACTERS},
        "images": {"type": "array", "items": {"type": "string", "format": "uri"}},
        "aspect_ratio": {"type": "string", "enum": [*ASPECTS, MATCH_IMAGE], "default": MATCH_IMAGE},
        "output_megapixels": {"type": "string", "enum": list(MEGAPIXELS)},
        "width": {"type": "integer", "minimum": 64, "multipleOf": 16},
        "height": {"type": "integer", "minimum": 64, "multipleOf": 16},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAXIMUM_SEED},
        "num_outputs": {"type": "integer", "minimum": 1, "default": 1},
        "num_inference_steps": {"type": "integer", "minimum": 1},
        "guidance": {"type": "number", "minimum": 1, "maximum": 100},
        "negative_prompt": {"type": "string", "maxLength": MAXIMUM_PROMPT_CHARACTERS},
        "output_format": {"type": "string", "enum": list(FORMATS), "default": "jpg"},
        "output_quality": {"type": "integer", "minimum": 1, "maximum": MAXIMUM_QUALITY, "default": 95},
        "disable_safety_checker": {"type": "boolean"},
        "go_fast": {"type": "boolean"},
    },
}
"""JSON schema of the input."""


@dataclass(frozen=True)
class PredictionInput:
    """The input of a prediction, read."""

    parameters: Mapping[str, Any]
    """Parameters of the job's request."""
    files: Sequence[bytes]
    echo: Mapping[str, Any]
    """The input as answers repeat it."""


async def read_input(values: Mapping[str, Any], model: Model, images: InputImages) -> PredictionInput:
    """Reads and checks the input of a prediction.

    Raises:
        ApiError: fields are wrong or unknown, or an image cannot be read.
    """
    fields = JsonFields(values, "input.")
    # Limits of a model whose stages do not serve are unknown; the job meets them when it runs.
    limits = model.limits if model.is_serving else None
    parameters: dict[str, Any] = {
        "model": model.name,
        "prompt": fields.text("prompt", limit=MAXIMUM_PROMPT_CHARACTERS, required=True),
        "negative_prompt": fields.text("negative_prompt", limit=MAXIMUM_PROMPT_CHARACTERS),
        "seed": fields.integer("seed", minimum=0, maximum=MAXIMUM_SEED),
        "count": fields.integer(
            "num_outputs", minimum=1, maximum=limits.image_count if limits else LARGEST_LIST
        ),
        "steps": fields.integer(
            "num_inference_steps", minimum=1, maximum=limits.step_count if limits else LARGEST_LIST
        ),
        "guidance_scale": fields.number("guidance", minimum=1, maximum=100),
        "format": FORMATS[fields.choice("output_format", list(FORMATS), "jpg")],
    }
    quality = fields.integer("output_quality", minimum=0, maximum=MAXIMUM_QUALITY)
    if parameters["format"] != "png" and quality is not None:
        # Replicate's quality begins at 0.
        parameters["quality"] = max(1, quality)
    for name in IGNORED_FIELDS:
        fields.boolean(name)
    most = limits.reference_count if limits else LARGEST_LIST
    sources = {name: fields.texts(name, count=most) for name in IMAGE_FIELDS}
    given = [name for name, texts in sources.items() if texts]
    for name in given[1:]:
        fields.refuse(name, f"is there in addition to {given[0]}; send one of them")
    parameters |= _read_size(
        fields, has_images=bool(given), pixel_limit=limits.pixel_count if limits else None
    )
    fields.check()
    files = [
        await images.read(text, f"input.{name}[{index}]")
        for name in given
        for index, text in enumerate(sources[name])
    ]
    echo = {name: shown(value) if name in IMAGE_FIELDS else value for name, value in values.items()}
    return PredictionInput(parameters, files, echo)


def _read_size(fields: JsonFields, *, has_images: bool, pixel_limit: int | None) -> dict[str, int | None]:
    """Returns width and height; `None` leaves them to the first image, or to the model."""
    width, height = fields.side("width"), fields.side("height")
    aspect = fields.choice("aspect_ratio", (*ASPECTS, MATCH_IMAGE), MATCH_IMAGE)
    megapixels = fields.raw("output_megapixels")
    if megapixels is not None:
        shortened = str(megapixels).removesuffix(" MP").removesuffix(".0")
        if shortened not in MEGAPIXELS:
            fields.refuse("output_megapixels", f"must be one of {', '.join(MEGAPIXELS)}")
            megapixels = None
        else:
            megapixels = float(shortened)
    if (width is None) != (height is None):
        fields.refuse("width" if width is None else "height", "must be given, too, or neither of both")
    elif width is None and (aspect != MATCH_IMAGE or (megapixels is not None and not has_images)):
        width, height = fit_size(ASPECTS.get(aspect, (1, 1)), megapixels or 1.0)
    elif width is not None and aspect != MATCH_IMAGE:
        fields.refuse("aspect_ratio", "contradicts width and height; send either")
    if width and height and pixel_limit is not None and width * height > pixel_limit:
        place = "width" if fields.raw("width") is not None else "output_megapixels"
        fields.refuse(place, f"makes {width} x {height} pixels; the model makes at most {pixel_limit}")
    return {"width": width, "height": height}

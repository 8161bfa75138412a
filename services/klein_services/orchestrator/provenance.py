"""Provenance of an image: the C2PA manifest that records how it was made, and its digital source type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from klein_api.v1.image_pb2 import ImageFormat
from klein_api.v1.image_service_pb2 import GeneratedImage
from klein_core.image_format import COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA, TRAINED_ALGORITHMIC_MEDIA
from klein_services.orchestrator.input_images import INITIAL_IMAGE_FIELD, InputImage
from klein_services.orchestrator.request import ImageRequest
from klein_services.runtime.logs import request_id
from klein_services.runtime.stage import software_version

MEDIA_TYPES: Final[Mapping[int, str]] = {
    ImageFormat.IMAGE_FORMAT_PNG: "image/png",
    ImageFormat.IMAGE_FORMAT_JPEG: "image/jpeg",
    ImageFormat.IMAGE_FORMAT_WEBP: "image/webp",
}
"""Media types of the formats that can hold a manifest."""
SOFTWARE_NAME: Final = "klein-suite"
_PREFIX = "org.klein-suite"
"""Namespace of the manifest's own fields, as C2PA asks for."""
DIGEST_FIELD: Final = f"{_PREFIX}.sha256"
"""Field of an ingredient's metadata with the SHA-256 of the client's file."""

Manifest = dict[str, Any]
"""A manifest's definition as c2pa takes it."""


def digital_source_type(request: ImageRequest) -> str:
    """Returns the IPTC digital source type of a request's images, a URI.

    The model makes every pixel of an image, also from references. Only inpainting and outpainting join its pixels
    with those of the client's image.
    """
    edit = request.masked_edit
    if edit is not None and edit.is_partial:
        return COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA
    return TRAINED_ALGORITHMIC_MEDIA


def image_manifest(
    request: ImageRequest, image: GeneratedImage, steps: int, *, has_parameters: bool
) -> Manifest:
    """Returns the manifest of an image or a preview, without its ingredients.

    Args:
        request: the request that made it.
        image: everything but its data.
        steps: steps of the finished image.
        has_parameters: whether seed, steps, adapters and strength are recorded.
    """
    agent = {"name": SOFTWARE_NAME, "version": software_version()}
    parameters: dict[str, Any] = {
        f"{_PREFIX}.model": request.route.name,
        f"{_PREFIX}.flow": request.flow,
        f"{_PREFIX}.request_id": request_id.get(),
    }
    if has_parameters:
        # As text, because numbers of JSON lose the last digits of a large seed.
        parameters |= {f"{_PREFIX}.seed": str(image.seed), f"{_PREFIX}.steps": str(image.step or steps)}
        if request.params.adapters:
            adapters = ", ".join(f"{each.name}:{each.scale:g}" for each in request.params.adapters)
            parameters[f"{_PREFIX}.adapters"] = adapters
        if request.masked_edit is not None:
            parameters[f"{_PREFIX}.strength"] = f"{request.masked_edit.strength:g}"
    inputs = [each.field for each in request.input_images if each.field != INITIAL_IMAGE_FIELD]
    if inputs:
        parameters["ingredientIds"] = inputs
    made: dict[str, Any] = {
        "action": "c2pa.created",
        "digitalSourceType": digital_source_type(request),
        "softwareAgent": agent,
        "parameters": parameters,
    }
    actions = [made]
    if request.masked_edit is not None:
        made["action"] = "c2pa.edited"
        opened = {"action": "c2pa.opened", "softwareAgent": agent}
        actions = [opened | {"parameters": {"ingredientIds": [INITIAL_IMAGE_FIELD]}}, made]
    if image.step:
        made["description"] = f"Preview after step {image.step} of {steps}"
    disclosure = {
        "modelType": "c2pa.types.model",
        "modelName": request.route.name,
        "contentProfile": {"humanOversightLevel": "prompt_guided"},
    }
    return {
        "claim_generator_info": [agent],
        "title": f"Image {image.index} of {request.route.name}",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": "c2pa.ai-disclosure", "data": disclosure},
        ],
    }


def ingredient(image: InputImage) -> Manifest:
    """Returns the ingredient that stands for a file of the request: its digest, not the picture. Hashes the file."""
    is_parent = image.field == INITIAL_IMAGE_FIELD
    definition: Manifest = {
        "title": image.field,
        "relationship": "parentOf" if is_parent else "inputTo",
        "label": image.field,
        "metadata": {DIGEST_FIELD: image.sha256.hex()},
    }
    return definition | ({"format": image.media_type} if image.media_type else {})

"""OpenAPI document of the gateway, made from the table of its routes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_services.gateway.errors import ApiError, FieldViolation
from klein_services.gateway.route_group import RouteGroup
from klein_services.runtime.stage import software_version

PATH = "/openapi.json"
JSON = "application/json"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_TEXT: Mapping[str, Any] = {"type": "string"}
_OWN_FIELDS: Mapping[str, Any] = {
    "prompt": {"type": "string", "maxLength": 32768},
    "model": _TEXT,
    "n": {"type": "integer", "minimum": 1, "maximum": 64},
    "size": {"type": "string", "pattern": r"^(auto|\d{2,5}x\d{2,5})$"},
    "output_format": {"enum": ["png", "jpeg", "webp"]},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    "response_format": {"enum": ["b64_json", "url"]},
    "background": {"enum": ["auto", "opaque"]},
    "quality": {"enum": ["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]},
    "moderation": {"enum": ["auto", "low"]},
    "style": {"enum": ["vivid", "natural"]},
    "input_fidelity": {"enum": ["high", "low"]},
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "steps": {"type": "integer", "minimum": 1, "maximum": 1000},
    "guidance_scale": {"type": "number", "minimum": 1, "maximum": 100},
    "negative_prompt": {"type": "string", "maxLength": 32768},
    "strength": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "mask_padding": {"type": "integer", "minimum": 0, "maximum": 1024},
    "preserve_unmasked": {"type": "boolean"},
    "embed_prompt": {"type": "boolean"},
    "adapters": {
        "oneOf": [
            {"type": "array", "items": _TEXT},
            {"type": "object", "additionalProperties": {"type": "number"}},
        ]
    },
    "priority": {"enum": ["interactive", "standard", "batch"]},
}
_IMAGES = {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 16}]}
_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_FILES = {"oneOf": [_FILE, {"type": "array", "items": _FILE, "minItems": 1, "maxItems": 16}]}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


BODIES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("POST", "/v1/images/generations"): {JSON: _object(_OWN_FIELDS, "prompt")},
    ("POST", "/v1/images/edits"): {
        "multipart/form-data": _object({**_OWN_FIELDS, "image": _FILES, "mask": _FILE}, "prompt", "image"),
        JSON: _object({**_OWN_FIELDS, "image": _IMAGES, "mask": _TEXT}, "prompt", "image"),
    },
}
"""Method and path → schema of the body by media type; bodies of other routes are any object."""
_WITHOUT_BODY = re.compile(r".*/cancel")
_EXAMPLE = FieldViolation("prompt", "is missing")


def document(groups: Sequence[RouteGroup]) -> dict[str, Any]:
    """Returns the document of all routes of these groups."""
    paths: dict[str, dict[str, Any]] = {}
    for group, route, method in operations(groups):
        paths.setdefault(shown_path(route), {})[method.lower()] = _operation(group, route, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "klein-suite gateway", "version": software_version()},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-key": {"type": "apiKey", "in": "header", "name": "x-key"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        },
        # Any of them, or none where the suite wants no token.
        "security": [{"bearer": []}, {"x-key": []}, {"x-api-key": []}, {}],
    }


def operations(groups: Sequence[RouteGroup]) -> Iterator[tuple[RouteGroup, Route, str]]:
    """Yields group, route and method of each operation; folders of files are none."""
    for group in groups:
        for route in group.routes:
            if isinstance(route, Route):
                for method in sorted((route.methods or set()) - {"HEAD"}):
                    yield group, route, method


def shown_path(route: Route) -> str:
    """Returns the path of a route as the document has it, without the kinds of its parameters."""
    return _PARAMETER.sub(r"{\1}", route.path)


def _operation(group: RouteGroup, route: Route, method: str) -> dict[str, Any]:
    about = inspect.getdoc(route.endpoint) or ""
    error = group.error_body(ApiError(400, "invalid_field", "prompt is missing.", violations=[_EXAMPLE]))  # type: ignore[arg-type]
    shown: dict[str, Any] = {
        "tags": [group.name],
        "operationId": f"{group.name}_{method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.path.lower()).strip('_')}",
        "summary": about.splitlines()[0] if about else group.name,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": _TEXT}
            for name in _PARAMETER.findall(route.path)
        ],
        "responses": {
            "200": {"description": "The answer."},
            "default": {"description": "An error.", "content": {JSON: {"example": error}}},
        },
    }
    if body := BODIES.get((method, route.path)):
        shown["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in body.items()},
        }
    elif method in ("POST", "PUT") and not _WITHOUT_BODY.fullmatch(route.path):
        shown["requestBody"] = {"required": True, "content": {JSON: {"schema": {"type": "object"}}}}
    return shown


def openapi_group(groups: Sequence[RouteGroup]) -> RouteGroup:
    """Returns the group that serves the document of all others and of itself."""

    async def openapi(request: Request) -> Response:
        """Returns this document."""
        return JSONResponse(described, headers={"Access-Control-Allow-Origin": "*"})

    own = RouteGroup(
        "openapi", [Route(PATH, openapi, methods=["GET"])], lambda error: {"error": error.message}
    )
    described = document([*groups, own])
    return own

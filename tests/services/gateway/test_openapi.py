"""The OpenAPI document against the routes that the gateway really has."""

from __future__ import annotations

import re

import httpx2
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Mount, Route

from klein_services.gateway.application import GROUPS
from klein_services.gateway.errors import ApiError
from klein_services.gateway.openai_request import InputImages, read_request
from klein_services.gateway.openapi import BODIES, PATH, document
from klein_services.gateway.server import running_gateway
from klein_services.gateway.settings import GatewaySettings

GENERATION = BODIES["POST", "/v1/images/generations"]["application/json"]


def real_routes() -> set[tuple[str, str]]:
    """Method and path of every route, as Starlette has them."""
    return {
        (method, re.sub(r":\w+\}", "}", route.path))
        for group in GROUPS
        for route in group.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }


async def test_the_served_document_has_exactly_the_routes():
    async with (
        running_gateway(GatewaySettings(target="127.0.0.1:1")) as url,
        httpx2.AsyncClient(base_url=url) as client,
    ):
        served = (await client.get(PATH)).json()
        found = {(method.upper(), path) for path, each in served["paths"].items() for method in each}
        assert found == real_routes()
        assert ("GET", PATH) in found
        assert len(found) > 10
    assert [route.path for group in GROUPS for route in group.routes if isinstance(route, Mount)] == ["/page"]


def test_operations_are_described_and_named_once():
    described = [each for path in document(GROUPS)["paths"].values() for each in path.values()]
    names = [each["operationId"] for each in described]
    assert len(names) == len(set(names))
    for each in described:
        assert each["summary"].endswith(".") or each["summary"].endswith(":"), each["operationId"]
        assert "content" in each["responses"]["default"]
        for body in each.get("requestBody", {}).get("content", {}).values():
            Draft202012Validator.check_schema(body["schema"])
    assert BODIES.keys() <= real_routes()


@pytest.mark.parametrize("name", sorted(GENERATION["properties"]))
def test_every_documented_field_is_taken(name: str):
    values = {
        "prompt": "x",
        "n": 2,
        "size": "128x128",
        "output_format": "jpeg",
        "output_compression": 100,
        "partial_images": 1,
        "stream": True,
        "seed": 1,
        "steps": 2,
        "guidance_scale": 2.0,
        "strength": 0.5,
        "mask_padding": 3,
        "preserve_unmasked": True,
        "embed_prompt": True,
        "adapters": {"a": 0.5},
    }
    schema = GENERATION["properties"][name]
    body = {"prompt": "x", "stream": True, name: values.get(name, schema.get("enum", ["text"])[0])}
    Draft202012Validator(GENERATION).validate(body)
    assert read_request(body, InputImages(), {}).prompt == "x"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": 3},
        {"prompt": "x", "n": 0},
        {"prompt": "x", "n": 65},
        {"prompt": "x", "size": "large"},
        {"prompt": "x", "background": "transparent"},
        {"prompt": "x", "seed": 2**63},
        {"prompt": "x", "adapters": "a"},
        {"prompt": "x", "unknown": 1},
        {"prompt": "x" * 32769},
    ],
)
def test_what_the_document_forbids_is_refused(body: dict[str, object]):
    assert not Draft202012Validator(GENERATION).is_valid(body)
    with pytest.raises(ApiError):
        read_request(body, InputImages(), {})

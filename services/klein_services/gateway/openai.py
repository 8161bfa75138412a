"""OpenAI's images API: generations, edits, models, and the caller's usage."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_client import AsyncEventStream, Event, Generation, Image, KleinError, Preview, Summary
from klein_services.gateway.api_key import api_key, caller_of
from klein_services.gateway.call_errors import call_error
from klein_services.gateway.errors import ApiError
from klein_services.gateway.event_stream import EventStream, ServerSentEvent
from klein_services.gateway.gateway import Gateway, gateway_of
from klein_services.gateway.openai_request import (
    FIELDS,
    InputImages,
    OpenAiRequest,
    preview_interval,
    read_form,
    read_json_edit,
    read_request,
)
from klein_services.gateway.request_log import call_metadata
from klein_services.gateway.result_store import new_key
from klein_services.gateway.route_group import RouteGroup, while_connected

NAME = "openai"
PIXELS_PER_TOKEN = 256
"""16 × 16 pixels are one token of the model's latents."""
STORE_RETRY_SECONDS = 5.0
_MASKED_FIELDS = FIELDS | {"image": "initial_image"}
_SHOWN_QUALITIES = ("low", "medium", "high", "xhigh", "max")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


async def generate(request: Request) -> Response:
    """Makes images from a prompt."""
    gateway = gateway_of(request)
    gateway.limits.admit(caller_of(request))
    async with gateway.bodies.json(request) as values:
        asked = read_request(values, InputImages(), gateway.settings.aliases)
    return await _answer(request, gateway, asked, "image_generation")


async def edit(request: Request) -> Response:
    """Makes images from a prompt and other images."""
    gateway = gateway_of(request)
    gateway.limits.admit(caller_of(request))
    if request.headers.get("content-type", "").startswith("application/json"):
        async with gateway.bodies.json(request) as values:
            rest, inputs = await read_json_edit(values, gateway)
            asked = read_request(rest, inputs, gateway.settings.aliases)
            return await _answer(request, gateway, asked, "image_edit")
    async with gateway.bodies.form(request) as form:
        rest, inputs = await read_form(form, gateway)
        asked = read_request(rest, inputs, gateway.settings.aliases)
        return await _answer(request, gateway, asked, "image_edit")


async def models(request: Request) -> Response:
    """Lists the models that the caller's key allows, the default one first."""
    return JSONResponse({"object": "list", "data": await _models(request)})


async def model(request: Request) -> Response:
    """Returns one model."""
    name = request.path_params["model"]
    found = next((each for each in await _models(request) if each["id"] == name), None)
    if found is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "model_not_found", f"There is no model {name!r}.")
    return JSONResponse(found)


async def usage(request: Request) -> Response:
    """Returns the totals of the caller since the gateway's start."""
    gateway = gateway_of(request)
    if not api_key(request):
        raise ApiError(
            HTTPStatus.UNAUTHORIZED, "missing_api_key", "Totals are those of an API key; send one."
        )
    totals = gateway.usage.of(caller_of(request))
    return JSONResponse(
        {
            "object": "usage",
            "requests": totals.requests,
            "images": totals.images,
            "input_megapixels": round(totals.input_megapixels, 6),
            "output_megapixels": round(totals.output_megapixels, 6),
            "cost": round(totals.cost, 6),
            "currency": gateway.usage.prices.currency,
        }
    )


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error in OpenAI's form; `param` is the first wrong field."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    shown = {"message": error.message, "type": kind, "param": error.field or None, "code": error.reason}
    return {"error": shown}


def usage_of(summary: Summary, cost: float | None, currency: str) -> dict[str, Any]:
    """Returns the usage of a request in tokens, and its cost where there is a price."""
    text = summary.prompt_token_count
    image = round(summary.input_megapixels * 1e6 / PIXELS_PER_TOKEN)
    output = round(summary.output_megapixels * 1e6 / PIXELS_PER_TOKEN)
    counted: dict[str, Any] = {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": output},
        "total_tokens": text + image + output,
    }
    return counted if cost is None else counted | {"cost": cost, "currency": currency}


async def _answer(request: Request, gateway: Gateway, asked: OpenAiRequest, kind: str) -> Response:
    fields = _MASKED_FIELDS if asked.options.get("mask") is not None else FIELDS
    key = api_key(request)
    asked.options["token"] = key
    asked.options["metadata"] = call_metadata(request)
    if idempotency_key := request.headers.get("idempotency-key"):
        asked.options["idempotency_key"] = idempotency_key
    try:
        interval = 0
        if asked.partial_images:
            steps = asked.options.get("steps") or await _default_steps(gateway, asked, key)
            interval = preview_interval(asked.partial_images, steps)
        events = gateway.client.stream(asked.prompt, preview_interval=interval, **asked.options)
        if asked.wants_stream:
            return await _streamed(request, gateway, asked, kind, events)
        async with events:
            generation = await while_connected(request, events.result())
    except KleinError as error:
        raise call_error(error, fields) from error
    cost = gateway.usage.add(NAME, caller_of(request), generation.summary, len(generation.images))
    return JSONResponse(await _body(request, gateway, asked, generation, cost))


async def _body(
    request: Request, gateway: Gateway, asked: OpenAiRequest, generation: Generation, cost: float | None
) -> dict[str, Any]:
    data = [
        await image_fields(image, gateway, gateway.base_url(request), wants_url=asked.wants_url)
        for image in generation.images
    ]
    first, summary = generation.image, generation.summary
    body: dict[str, Any] = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": asked.output_format,
        "size": f"{first.width_px}x{first.height_px}",
        "data": data,
        "usage": usage_of(summary, cost, gateway.usage.prices.currency),
        "klein": facts(summary),
    }
    return body | ({"quality": asked.quality} if asked.quality in _SHOWN_QUALITIES else {})


async def image_fields(image: Image, gateway: Gateway, base_url: str, *, wants_url: bool) -> dict[str, Any]:
    """Returns an image as an entry of `data`: its bytes or its link, and its seed.

    Raises:
        ApiError: the image cannot be stored.
    """
    if not wants_url:
        return {"b64_json": base64.b64encode(image.data).decode("ascii"), "seed": image.seed}
    name = new_key()
    try:
        await gateway.results.put(name, image.data, f"image/{image.format}")
    except OSError as error:
        raise ApiError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "result_store_failed",
            "The image was made and could not be stored. Ask for b64_json, or try again.",
            retry_after_seconds=STORE_RETRY_SECONDS,
        ) from error
    return {"url": gateway.result_url(name, base_url), "seed": image.seed}


async def _streamed(
    request: Request, gateway: Gateway, asked: OpenAiRequest, kind: str, events: AsyncEventStream
) -> Response:
    """Answers with server-sent events, once the orchestrator has accepted the request."""
    try:
        first = await while_connected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    caller, base_url = caller_of(request), gateway.base_url(request)

    async def shown_events() -> AsyncGenerator[ServerSentEvent, None]:
        shown = ShownEvents(kind, asked.quality, asked.output_format, asked.partial_images)
        try:
            async with events:
                event = first
                while not isinstance(event, Summary):
                    for partial in shown.partial(event):
                        yield partial["type"], partial
                    event = await anext(events)
            cost = gateway.usage.add(NAME, caller, event, shown.image_count)
            counted = usage_of(event, cost, gateway.usage.prices.currency)
            for image in shown.finished(counted, facts(event)):
                entry = await image_fields(image.image, gateway, base_url, wants_url=asked.wants_url)
                yield image.fields["type"], image.fields | entry
        except (KleinError, ApiError) as error:
            yield "error", error_body(call_error(error, FIELDS) if isinstance(error, KleinError) else error)

    return EventStream(shown_events())


async def _default_steps(gateway: Gateway, asked: OpenAiRequest, key: str) -> int:
    status = await gateway.client.status(token=key)
    name = asked.options.get("model") or status.default_model
    return next((each.default_step_count for each in status.models if each.name == name), 1) or 1


async def _models(request: Request) -> list[dict[str, Any]]:
    gateway = gateway_of(request)
    try:
        status = await gateway.client.status(token=api_key(request))
    except KleinError as error:
        raise call_error(error, FIELDS) from error
    ordered = sorted(status.models, key=lambda each: not each.is_default)
    return [
        {
            "id": each.name,
            "object": "model",
            "created": 0,
            "owned_by": "klein-suite",
            "default": each.is_default,
            "serving": each.is_serving,
            "description": each.description,
            "default_steps": each.default_step_count,
            "takes_guidance": not each.is_distilled,
            "limits": {
                "images": each.limits.image_count,
                "references": each.limits.reference_count,
                "pixels": each.limits.pixel_count,
                "default_size": each.limits.default_size_px,
            },
            "adapters": [adapter.name for adapter in each.adapters if not adapter.problem],
        }
        for each in ordered
    ]


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


GROUP = RouteGroup(
    NAME,
    [
        Route("/v1/images/generations", generate, methods=["POST"]),
        Route("/v1/images/edits", edit, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{model}", model, methods=["GET"]),
        Route("/v1/usage", usage, methods=["GET"]),
    ],
    error_body,
)

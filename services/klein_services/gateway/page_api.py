"""Page at `/`: its files, and the endpoints that only it calls."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from time import monotonic
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_client import Event, Image, KleinError, Preview, Queued, Step, Summary
from klein_client.models import Model, Status
from klein_client.request import ImageOptions
from klein_services.gateway.api_key import api_key, caller_of
from klein_services.gateway.bodies import parse_json_object
from klein_services.gateway.call_errors import call_error
from klein_services.gateway.errors import ApiError, invalid_field
from klein_services.gateway.event_stream import EventStream, ServerSentEvent
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.route_group import RouteGroup, method_or_path_error, while_connected
from klein_services.runtime.logs import request_id

NAME = "page"
FILES = Path(__file__).resolve().parent / "page"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    # A new version must reach browsers with the first request; unchanged files cost an answer without a body.
    "cache-control": "no-cache",
}
STATUS_SECONDS = 5.0
"""Longest time that the state of the suite may take; the page asks again."""
_OPTIONS = {
    "model": "model",
    "negative_prompt": "negative_prompt",
    "width_px": "width",
    "height_px": "height",
    "step_count": "steps",
    "guidance_scale": "guidance_scale",
    "image_count": "count",
    "format": "format",
    "quality": "quality",
    "strength": "strength",
    "mask_padding_px": "mask_padding",
}
"""Fields of the page's requests → options of the client."""


async def index(request: Request) -> Response:
    """Returns the page."""
    return FileResponse(FILES / "index.html", headers=HEADERS)


async def models(request: Request) -> Response:
    """Returns the models with what the page shows of them."""
    _require_own_origin(request)
    status = await _status(request)
    body = {
        "models": [_model(model) for model in status.models],
        "default_model": status.default_model,
        "target": gateway_of(request).settings.target,
    }
    return JSONResponse(body, headers={"cache-control": "no-store"})


async def suite(request: Request) -> Response:
    """Returns the state of the suite: load of the processes, caches, and the caller's last requests.

    While the orchestrator does not answer, only callers that it has let in before get an answer.
    """
    _require_own_origin(request)
    gateway, caller = gateway_of(request), caller_of(request)
    problem, found = "", None
    try:
        found = await _status(request)
    except ApiError as error:
        if error.status < 500 or caller not in gateway.known_callers:
            raise
        problem = error.message
    view = await gateway.suite_watch.view()
    now = monotonic()
    totals = asdict(view.totals)
    body = {
        "models": [_model(model) for model in found.models] if found else [],
        "models_problem": problem or view.problem or " ".join(found.problems if found else ()),
        **{name: totals[name] for name in _TOTALS},
        "processes": [asdict(process) for process in view.processes],
        "caches": [asdict(cache) for cache in view.caches],
        "requests": [
            asdict(each) | {"age_seconds": now - each.ended_at} for each in gateway.recent_requests.of(caller)
        ],
    }
    return JSONResponse(body, headers={"cache-control": "no-store"})


async def generate(request: Request) -> Response:
    """Streams a request's events: queued, step, preview, image, summary; at its end, error when it failed.

    The form has the part `settings`, a JSON object with names of the gRPC API, and the files `references`,
    `initial_image` and `mask`.
    """
    _require_own_origin(request)
    gateway, caller = gateway_of(request), caller_of(request)
    gateway.limits.admit(caller)
    token = api_key(request)
    async with AsyncExitStack() as stack:
        form = await stack.enter_async_context(gateway.bodies.form(request))
        prompt, options = _parsed(form)
        for field in ("references", "initial_image", "mask"):
            files = [await each.read() for each in form.getlist(field) if isinstance(each, UploadFile)]
            if files:
                options[field] = files if field == "references" else files[0]
        options["token"] = token
        options["priority"] = "interactive"
        options["metadata"] = [("x-request-id", request_id.get())]
        if key := request.headers.get("idempotency-key"):
            options["idempotency_key"] = key
        recording = gateway.recent_requests.begin(caller, options.get("model") or "")
        # The bytes of the body count against the memory of all bodies as long as the request runs.
        held = stack.pop_all()
    stream = gateway.client.stream(prompt, preview_interval=1, **options)

    async def events() -> AsyncGenerator[ServerSentEvent, None]:
        outcome, image_count = "cancelled", 0
        async with held:
            try:
                async with stream:
                    async for event in stream:
                        recording.add(event)
                        image_count += isinstance(event, Image)
                        if isinstance(event, Summary):
                            gateway.usage.add(NAME, caller, event, image_count)
                            # The page leaves with it.
                            outcome = "succeeded"
                        yield _sent(event)
            except KleinError as error:
                outcome = "failed"
                yield "error", error_body(call_error(error))["error"]
            finally:
                recording.end(outcome)

    return EventStream(events())


def _parsed(form: FormData) -> tuple[str, ImageOptions]:
    """Returns the prompt and the options of a form; only the orchestrator checks limits.

    Raises:
        ApiError: the settings are missing, no JSON object, or have a name or a seed that cannot be.
    """
    text = form.get("settings")
    if not isinstance(text, str):
        raise invalid_field("settings", "is missing; it must be a JSON object")
    settings = parse_json_object(text.encode())
    prompt = settings.pop("prompt", "")
    options: dict[str, Any] = {}
    for field, value in settings.items():
        if value is None:
            continue
        match field, value:
            case "seed", int() | str():
                if not (isinstance(value, int) or (value.isascii() and value.isdecimal())):
                    raise invalid_field("seed", f"is {value[:40]!r}; it must be a whole number from 0")
                options["seed"] = int(value)
            case "adapters", list():
                options["adapters"] = _adapters(value)
            case _ if field in _OPTIONS:
                options[_OPTIONS[field]] = value or None if field == "model" else value
            case _:
                raise invalid_field(field[:64], "is no setting of a request, or not of its type")
    return prompt, options  # type: ignore[return-value]  # the client checks the types


def _adapters(values: list[Any]) -> dict[str, float]:
    """Returns adapters and scales; raises ApiError when an item has neither form."""
    found: dict[str, float] = {}
    for index, value in enumerate(values):
        match value:
            case {"name": str(name), "scale": float() | int() as scale} if name not in found:
                found[name] = scale
            case {"name": str(name), "scale": None} if name not in found:
                raise invalid_field(f"adapters[{index}]", f"{name[:64]} needs a number as its scale")
            case _:
                raise invalid_field(f"adapters[{index}]", "must have a name and a scale, and each name once")
    return found


async def _status(request: Request) -> Status:
    """Returns the models that the caller may use, and remembers the caller.

    Raises:
        ApiError: the orchestrator does not answer, or wants another token.
    """
    gateway = gateway_of(request)
    call = gateway.client.status(timeout_seconds=STATUS_SECONDS, token=api_key(request))
    try:
        status = await while_connected(request, call)
    except KleinError as error:
        raise call_error(error) from None
    gateway.known_callers.add(caller_of(request))
    return status


def _model(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "serving": model.is_serving,
        "distilled": model.is_distilled,
        "default_step_count": model.default_step_count,
        "default_guidance_scale": model.default_guidance_scale,
        "description": model.description,
        "subject_words": model.subject_words,
        "limits": asdict(model.limits),
        "adapters": [
            {"name": each.name, "kind": each.kind, "rank": each.rank, "problem": each.problem}
            for each in model.adapters
        ],
        "stages": [
            {"name": each.name, "target": each.target, "serving": each.is_serving, "problem": each.problem}
            for each in model.stages
        ],
    }


def _sent(event: Event) -> ServerSentEvent:
    """Returns an event as the page reads it."""
    match event:
        case Queued():
            return "queued", asdict(event)
        case Step():
            return "step", asdict(event)
        case Preview():
            return "preview", _image(event.image) | {"step": event.step}
        case Image():
            return "image", _image(event) | {"step": 0}
        case _:
            timings = [asdict(timing) for timing in event.timings]
            return "summary", asdict(event) | {"stage_timings": timings}


def _image(image: Image) -> dict[str, Any]:
    return {
        "index": image.index,
        # Seeds have 63 bits, numbers of JavaScript 53.
        "seed": str(image.seed),
        "width_px": image.width_px,
        "height_px": image.height_px,
        "format": image.format,
        "data": b64encode(image.data).decode("ascii"),
    }


def _require_own_origin(request: Request) -> None:
    """Refuses calls from pages of other origins, which could use a suite on the visitor's own machine.

    Raises:
        ApiError: the browser names another origin. Clients that are no browser send no such header.
    """
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        message = "Only this gateway's own page may call this path."
        raise ApiError(HTTPStatus.FORBIDDEN, "other_origin", message)


class _Files:
    """Files of the page, with its headers."""

    def __init__(self) -> None:
        self._app: ASGIApp = StaticFiles(directory=FILES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *given]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except HTTPException as error:
            raise method_or_path_error(error.status_code) from None


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error as the page reads it."""
    return {
        "error": {
            "status": int(error.status),
            "code": error.reason,
            "message": error.message,
            "violations": [{"field": each.field, "description": each.message} for each in error.violations],
            "retry_after_seconds": error.retry_after_seconds,
        }
    }


_TOTALS = (
    "images_per_second",
    "megapixels_per_second",
    "in_progress",
    "median_seconds",
    "p95_seconds",
    "cache_hit_ratio",
)
GROUP = RouteGroup(
    NAME,
    [
        Route("/", index, methods=["GET"]),
        Route("/page/api/models", models, methods=["GET"]),
        Route("/page/api/suite", suite, methods=["GET"]),
        Route("/page/api/generate", generate, methods=["POST"]),
        Mount("/page", _Files()),
    ],
    error_body,
)

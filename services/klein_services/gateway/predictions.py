"""Predictions in the shape of Replicate's API and cog's."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.job import Job, Webhook, WebhookEvent
from klein_services.gateway.job_forms import PREDICTIONS
from klein_services.gateway.job_requests import JobRequest, read_webhook_url
from klein_services.gateway.json_fields import JsonFields
from klein_services.gateway.prediction_input import INPUT_SCHEMA, read_input
from klein_services.gateway.prediction_stream import prediction_stream
from klein_services.gateway.route_group import RouteGroup, while_connected

PATH = "/v1/predictions"
COG_PATH = "/predictions"
PAGE_JOBS = 100
MAXIMUM_WAIT_SECONDS = 60
MAXIMUM_NAME_CHARACTERS = 256
_CURSOR = re.compile(r"([0-9]{1,12}\.[0-9]{1,6})-([0-9a-f]{26})")
_WAIT = re.compile(r"\s*wait(?:\s*=\s*\"?([0-9]{1,5})\"?)?\s*", re.IGNORECASE)
_COG_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


async def create(request: Request) -> Response:
    """Makes a prediction; with `Prefer: wait` the answer waits for its end."""
    return await _create(request, path=PATH)


async def create_cog(request: Request) -> Response:
    """Makes a prediction as cog's server does: at once, or with `Prefer: respond-async` in the background."""
    return await _create(request, path=COG_PATH)


async def _create(request: Request, *, path: str) -> Response:
    job_request = JobRequest(request, PREDICTIONS)
    job_request.admit()
    cog_id: str | None = request.path_params.get("id")
    if cog_id is not None and not _COG_ID.fullmatch(cog_id):
        raise ApiError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_field", "id: must be 1 to 64 of A-Z a-z 0-9 _ -."
        )
    async with gateway_of(request).bodies.json(request) as body:
        fields = JsonFields(body)
        job_request.check_key(fields)
        name = _model_name(request, fields)
        values = fields.raw("input")
        if not isinstance(values, dict):
            fields.refuse("input", "must be an object")
        fields.boolean("stream")
        webhook = _read_webhook(fields, job_request)
        if path == COG_PATH:
            # cog's servers give these to their own storage; here links to images are always made.
            fields.raw("output_file_prefix")
            given = fields.text("id", limit=64)
            if cog_id is not None and given not in (None, cog_id):
                fields.refuse("id", f"must be {cog_id}, as in the path, or missing")
        fields.check()
        model = await job_request.jobs.models.model(job_request.key, name)
        read = await read_input(values, model, job_request.images(model))
    shown_name = name or model.name
    echo: dict[str, Any] = {
        "model": shown_name if "/" in shown_name else f"klein/{shown_name}",
        "version": str(body.get("version") or "hidden"),
        "input": read.echo,
        "path": path,
    }
    if cog_id is not None:
        echo["id"] = cog_id
    job, is_new = await job_request.submit(
        read.parameters,
        echo,
        files=read.files,
        webhook=webhook,
        idempotency_key=None if cog_id is None else _cog_key(cog_id),
    )
    seconds = _wait_seconds(request, default=MAXIMUM_WAIT_SECONDS if path == COG_PATH else 0)
    if seconds:
        job = await while_connected(request, job_request.jobs.wait(job, seconds))
    answer = job_request.jobs.forms.prediction(job)
    if seconds and not job.state.final and path == PATH:
        # Replicate's clients take every other status of an answer that they waited for as its end.
        answer["status"] = "starting"
    return JSONResponse(answer, _created_status(job, is_new=is_new, waited=bool(seconds)))


def _created_status(job: Job, *, is_new: bool, waited: bool) -> HTTPStatus:
    if job.echo["path"] == COG_PATH and (waited or not is_new):
        return HTTPStatus.OK if job.state.final else HTTPStatus.ACCEPTED
    return HTTPStatus.CREATED if waited or job.echo["path"] == PATH else HTTPStatus.ACCEPTED


async def get(request: Request) -> Response:
    """Returns a prediction."""
    job_request = JobRequest(request, PREDICTIONS)
    return JSONResponse(job_request.jobs.forms.prediction(await _job(request, job_request)))


async def cancel(request: Request) -> Response:
    """Cancels a prediction that has not ended."""
    job_request = JobRequest(request, PREDICTIONS)
    job = await job_request.jobs.cancel(await _job(request, job_request))
    return JSONResponse(job_request.jobs.forms.prediction(job))


async def stream(request: Request) -> Response:
    """Streams a prediction's progress and its output as server-sent events."""
    job_request = JobRequest(request, PREDICTIONS)
    return prediction_stream(job_request.jobs, await _job(request, job_request))


async def list_all(request: Request) -> Response:
    """Returns the predictions of a key, the latest first."""
    job_request = JobRequest(request, PREDICTIONS)
    cursor = request.query_params.get("cursor")
    before = None
    if cursor is not None:
        match = _CURSOR.fullmatch(cursor)
        if match is None:
            raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_field", "cursor: is none of this API.")
        before = (float(match[1]), match[2])
    page = await job_request.jobs.list(job_request.owner, PREDICTIONS, limit=PAGE_JOBS, before=before)
    following = None
    if page.next is not None:
        following = f"{job_request.base_url}{PATH}?cursor={page.next[0]:.6f}-{page.next[1]}"
    results = [job_request.jobs.forms.prediction(job) for job in page.jobs]
    return JSONResponse({"previous": None, "next": following, "results": results})


async def describe_model(request: Request) -> Response:
    """Returns a model with the schema of its input."""
    job_request = JobRequest(request, PREDICTIONS)
    owner, name = request.path_params["owner"], request.path_params["name"]
    model = await job_request.jobs.models.model(job_request.key, name)
    schema = {"components": {"schemas": {"Input": INPUT_SCHEMA, "Output": _OUTPUT_SCHEMA}}}
    return JSONResponse(
        {
            "url": f"{job_request.base_url}/v1/models/{owner}/{name}",
            "owner": owner,
            "name": name,
            "description": model.description,
            "visibility": "private",
            "run_count": 0,
            "latest_version": {
                "id": model.name,
                "created_at": "1970-01-01T00:00:00Z",
                "cog_version": "0.0.0",
                "openapi_schema": schema,
            },
        }
    )


async def webhook_secret(request: Request) -> Response:
    """Returns the secret that signs the webhooks of the key that asks."""
    job_request = JobRequest(request, PREDICTIONS)
    # Asked for, because an unknown key has no webhooks.
    await job_request.jobs.models.check_key(job_request.key)
    return JSONResponse({"key": job_request.jobs.secret.webhook_secret(job_request.owner)})


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error in Replicate's form, a problem of RFC 7807."""
    body: dict[str, Any] = {"title": error.reason, "detail": error.message, "status": int(error.status)}
    if error.violations:
        body["invalid_fields"] = [
            {"type": error.reason, "field": each.field, "description": each.message}
            for each in error.violations
        ]
    return body


async def _job(request: Request, job_request: JobRequest) -> Job:
    """Returns the prediction of the path; cog's ids are those that its client chose."""
    job_id: str = request.path_params["id"]
    if request.url.path.startswith(COG_PATH):
        try:
            return await job_request.jobs.find(job_request.owner, _cog_key(job_id))
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
    return await job_request.jobs.get(job_request.owner, job_id, PREDICTIONS)


def _cog_key(cog_id: str) -> str:
    """Returns the idempotency key of an id that a client chose; no header can hold it."""
    return f"put {cog_id}"


def _model_name(request: Request, fields: JsonFields) -> str:
    """Returns the model that a request names: in its path, as `model`, or as `version`, which may be OWNER/NAME:ID."""
    version = fields.text("version", limit=MAXIMUM_NAME_CHARACTERS)
    model = fields.text("model", limit=MAXIMUM_NAME_CHARACTERS)
    if "name" in request.path_params:
        return str(request.path_params["name"])
    named = (model or version or "").rpartition("/")[2]
    return named.partition(":")[0]


def _read_webhook(fields: JsonFields, job_request: JobRequest) -> Webhook | None:
    url = read_webhook_url(fields, "webhook")
    completed_url = read_webhook_url(fields, "webhook_completed")
    names = fields.texts("webhook_events_filter", count=len(WebhookEvent))
    for name in sorted(set(names) - set(WebhookEvent)):
        fields.refuse("webhook_events_filter", f"has {name[:32]!r}; known are {', '.join(WebhookEvent)}")
        return None
    secret = job_request.jobs.secret.webhook_secret(job_request.owner)
    if url is not None:
        # Without a filter Replicate posts all events.
        return Webhook(url=url, secret=secret, events=frozenset(map(WebhookEvent, names or WebhookEvent)))
    return None if completed_url is None else Webhook(url=completed_url, secret=secret)


def _wait_seconds(request: Request, default: float) -> float:
    """Returns the time that a client wants to wait; `Prefer` may have several entries."""
    entries = [entry for value in request.headers.getlist("prefer") for entry in value.split(",")]
    if any(entry.strip().lower() == "respond-async" for entry in entries):
        return 0
    for entry in entries:
        if match := _WAIT.fullmatch(entry):
            seconds = min(float(match[1] or MAXIMUM_WAIT_SECONDS), MAXIMUM_WAIT_SECONDS)
            # Replicate's client stops to read half a second after the time that it asks for.
            return seconds - min(1.0, seconds / 4)
    return default


_OUTPUT_SCHEMA = {"type": "array", "items": {"type": "string", "format": "uri"}, "title": "Output"}
GROUP = RouteGroup(
    PREDICTIONS,
    [
        Route(PATH, create, methods=["POST"]),
        Route(PATH, list_all, methods=["GET"]),
        Route(PATH + "/{id}", get, methods=["GET"]),
        Route(PATH + "/{id}/cancel", cancel, methods=["POST"]),
        Route(PATH + "/{id}/stream", stream, methods=["GET"]),
        Route("/v1/models/{owner}/{name}", describe_model, methods=["GET"]),
        Route("/v1/models/{owner}/{name}/predictions", create, methods=["POST"]),
        Route("/v1/webhooks/default/secret", webhook_secret, methods=["GET"]),
        Route(COG_PATH, create_cog, methods=["POST"]),
        Route(COG_PATH + "/{id}", create_cog, methods=["PUT"]),
        Route(COG_PATH + "/{id}", get, methods=["GET"]),
        Route(COG_PATH + "/{id}/cancel", cancel, methods=["POST"]),
        Route(COG_PATH + "/{id}/stream", stream, methods=["GET"]),
    ],
    error_body,
)

"""eachlabs' API: the two calls that make a prediction and return it, and the description of a model."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.job import Webhook
from klein_services.gateway.job_forms import EACHLABS
from klein_services.gateway.job_requests import JobRequest, read_webhook_url
from klein_services.gateway.json_fields import JsonFields
from klein_services.gateway.prediction_input import INPUT_SCHEMA, read_input
from klein_services.gateway.route_group import RouteGroup

VERSION = "0.0.1"
"""The version of every model; requests may name it or none."""
MAXIMUM_NAME_CHARACTERS = 128


async def create(request: Request) -> Response:
    """Makes a job."""
    job_request = JobRequest(request, EACHLABS)
    job_request.admit()
    async with gateway_of(request).bodies.json(request) as body:
        fields = JsonFields(body)
        job_request.check_key(fields)
        name = fields.text("model", limit=MAXIMUM_NAME_CHARACTERS, required=True)
        fields.choice("version", (VERSION,), VERSION)
        url = read_webhook_url(fields, "webhook_url")
        values = fields.raw("input")
        if not isinstance(values, dict):
            fields.refuse("input", "must be an object")
        fields.check()
        model = await job_request.jobs.models.model(job_request.key, name or "")
        read = await read_input(values, model, job_request.images(model))
    webhook = None
    if url is not None:
        webhook = Webhook(url=url, secret=job_request.jobs.secret.webhook_secret(job_request.owner))
    job, _ = await job_request.submit(
        read.parameters, {"model": name, "input": read.echo}, files=read.files, webhook=webhook
    )
    return JSONResponse({"status": "success", "message": "Prediction created", "predictionID": job.id})


async def get(request: Request) -> Response:
    """Returns a prediction."""
    job_request = JobRequest(request, EACHLABS)
    job = await job_request.jobs.get(job_request.owner, request.path_params["id"], EACHLABS)
    return JSONResponse(job_request.jobs.forms.eachlabs(job))


async def describe_model(request: Request) -> Response:
    """Returns a model with the schema of its input."""
    job_request = JobRequest(request, EACHLABS)
    slug = request.query_params.get("slug", "")
    model = await job_request.jobs.models.model(job_request.key, slug)
    return JSONResponse(
        {
            "title": model.name,
            "slug": slug or model.name,
            "version": VERSION,
            "output_type": "image",
            "request_schema": INPUT_SCHEMA,
        }
    )


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error in eachlabs' form."""
    return {"status": "error", "message": error.message, "details": error.field or error.reason}


GROUP = RouteGroup(
    EACHLABS,
    [
        Route("/v1/prediction", create, methods=["POST"]),
        Route("/v1/prediction/{id}", get, methods=["GET"]),
        Route("/v1/model", describe_model, methods=["GET"]),
    ],
    error_body,
)

"""BFL's API of FLUX.2 [klein]: jobs that are posted, polled, and reported to webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_client import Model
from klein_core.params import Limits, fitted_size
from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.image_size import SMALLEST_SIDE, image_size, reference_size
from klein_services.gateway.input_images import shown
from klein_services.gateway.job import Webhook
from klein_services.gateway.job_forms import BFL
from klein_services.gateway.job_requests import (
    MAXIMUM_PROMPT_CHARACTERS,
    MAXIMUM_SECRET_CHARACTERS,
    JobRequest,
    read_webhook_url,
)
from klein_services.gateway.json_fields import MAXIMUM_SEED, JsonFields
from klein_services.gateway.route_group import RouteGroup

IMAGE_FIELDS = ("input_image", "input_image_2", "input_image_3", "input_image_4")
MAXIMUM_IMAGE_CHARACTERS = 1 << 30
"""The body's limit is lower."""
FORMATS = ("jpeg", "png", "webp")


class _FluxName(StringConvertor):
    """Name of a model in a path; all others belong to other APIs."""

    regex = "flux-[a-z0-9.-]{1,64}"


register_url_convertor("flux", _FluxName())
MAXIMUM_ID_CHARACTERS = 64


async def create(request: Request) -> Response:
    """Makes a job."""
    job_request = JobRequest(request, BFL)
    job_request.admit()
    async with gateway_of(request).bodies.json(request) as body:
        model = await job_request.jobs.models.model(job_request.key, request.path_params["model"])
        fields = JsonFields(body)
        job_request.check_key(fields)
        prompt = fields.text("prompt", limit=MAXIMUM_PROMPT_CHARACTERS, required=True)
        sources = {
            name: value
            for name in IMAGE_FIELDS
            if (value := fields.text(name, limit=MAXIMUM_IMAGE_CHARACTERS)) is not None
        }
        seed = fields.integer("seed", minimum=0, maximum=MAXIMUM_SEED)
        width, height = fields.side("width"), fields.side("height")
        image_format = fields.choice("output_format", FORMATS, "jpeg")
        fields.integer("safety_tolerance", minimum=0, maximum=5)
        url = read_webhook_url(fields, "webhook_url")
        secret = fields.text("webhook_secret", limit=MAXIMUM_SECRET_CHARACTERS)
        most = model.limits.reference_count
        if model.is_serving and len(sources) > most:
            fields.refuse(list(sources)[most], f"is image {most + 1}; the model takes {most}")
        if model.is_serving and width and height and width * height > model.limits.pixel_count:
            fields.refuse(
                "width", f"times height is {width * height}; at most {model.limits.pixel_count} are allowed"
            )
        fields.check()
        reader = job_request.images(model)
        files = [await reader.read(value, name) for name, value in sources.items()]
    values = {
        "prompt": prompt,
        "model": model.name,
        "width": width,
        "height": height,
        "seed": seed,
        "format": image_format,
    }
    echo = values | {
        "model": request.path_params["model"],
        "images": [shown(each) for each in sources.values()],
    }
    webhook = None
    if url is not None:
        webhook = Webhook(url=url, secret=secret or job_request.jobs.secret.webhook_secret(job_request.owner))
    job, _ = await job_request.submit(values, echo, files=files, webhook=webhook)
    inputs, outputs = _megapixels(model, files, width, height)
    cost = None
    if inputs is not None and outputs is not None:
        cost = gateway_of(request).usage.prices.cost(model.name, inputs, outputs)
    return JSONResponse(
        {
            "id": job.id,
            "polling_url": f"{job_request.base_url}/v1/get_result?id={job.id}",
            "cost": cost,
            "input_mp": inputs,
            "output_mp": outputs,
        }
    )


def _megapixels(
    model: Model, files: Sequence[bytes], width: int | None, height: int | None
) -> tuple[float | None, float | None]:
    """Returns the megapixels of a request's images and of its result as the stages will find them.

    They are `None` where an image's header has no usable size, which fails the job, or the model does not serve.
    """
    sizes = []
    for data in files:
        size = image_size(data)
        if size is None or min(reduced := reference_size(*size)) < SMALLEST_SIDE:
            return None, None
        sizes.append(reduced)
    inputs = sum(across * down for across, down in sizes) / 1e6
    if not width or not height:
        if not model.is_serving:
            return inputs, None
        side = model.limits.default_size_px
        first = (
            fitted_size(*sizes[0], Limits(pixel_count=model.limits.pixel_count)) if sizes else (side, side)
        )
        width, height = width or first[0], height or first[1]
    return inputs, width * height / 1e6


async def get_result(request: Request) -> Response:
    """Returns a job's status, and its image when it is ready."""
    job_request = JobRequest(request, BFL)
    job_id = request.query_params.get("id", "")
    try:
        job = await job_request.jobs.get(job_request.owner, job_id[:MAXIMUM_ID_CHARACTERS], BFL)
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        body = {"id": job_id[:MAXIMUM_ID_CHARACTERS], "status": "Task not found", "result": None}
        return JSONResponse(body, HTTPStatus.NOT_FOUND)
    return JSONResponse(job_request.jobs.forms.bfl_result(job))


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error in BFL's form, which is FastAPI's."""
    if error.violations:
        return {
            "detail": [
                {"loc": ["body", *each.field.split(".")], "msg": each.message, "type": error.reason}
                for each in error.violations
            ]
        }
    return {"detail": error.message}


GROUP = RouteGroup(
    BFL,
    [
        Route("/v1/get_result", get_result, methods=["GET"]),
        Route("/v1/{model:flux}", create, methods=["POST"]),
    ],
    error_body,
)

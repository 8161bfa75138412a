"""Uploaded files in the shape of Replicate's API."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.input_images import UPLOADS_PATH
from klein_services.gateway.job_forms import PREDICTIONS, iso_time
from klein_services.gateway.job_requests import JobRequest
from klein_services.gateway.json_fields import JsonFields
from klein_services.gateway.predictions import error_body
from klein_services.gateway.route_group import RouteGroup
from klein_services.gateway.uploads import Upload

MAXIMUM_NAME_CHARACTERS = 128


async def create(request: Request) -> Response:
    """Keeps a file; only images are taken, because nothing else can be an input."""
    job_request = JobRequest(request, PREDICTIONS)
    gateway = gateway_of(request)
    # An unknown key stores nothing.
    await job_request.jobs.models.check_key(job_request.key)
    async with gateway.bodies.form(request) as form:
        fields = JsonFields({name: form[name] for name in form})
        content = fields.raw("content")
        for name in ("metadata", "filename", "type"):
            fields.raw(name)
        if not isinstance(content, UploadFile):
            fields.refuse("content", "must be a file")
        fields.check()
        data = gateway.downloads.checked(await content.read(), "content")
        name = (content.filename or "file")[:MAXIMUM_NAME_CHARACTERS]
        kind = (content.content_type or "application/octet-stream")[:MAXIMUM_NAME_CHARACTERS]
    with job_request.jobs.uploads() as uploads:
        upload = await uploads.add(job_request.owner, name, kind, data)
    return JSONResponse(_file(upload, job_request.base_url), 201)


async def list_all(request: Request) -> Response:
    """Returns the latest files of a key."""
    job_request = JobRequest(request, PREDICTIONS)
    with job_request.jobs.uploads() as uploads:
        found = await uploads.list(job_request.owner)
    results = [_file(upload, job_request.base_url) for upload in found]
    return JSONResponse({"previous": None, "next": None, "results": results})


async def get(request: Request) -> Response:
    """Returns the description of a file."""
    job_request = JobRequest(request, PREDICTIONS)
    with job_request.jobs.uploads() as uploads:
        upload = await uploads.get(job_request.owner, request.path_params["id"])
    return JSONResponse(_file(upload, job_request.base_url))


async def delete(request: Request) -> Response:
    """Deletes a file."""
    job_request = JobRequest(request, PREDICTIONS)
    with job_request.jobs.uploads() as uploads:
        await uploads.delete(job_request.owner, request.path_params["id"])
    return Response(status_code=204)


def _file(upload: Upload, base_url: str) -> dict[str, Any]:
    return {
        "id": upload.id,
        "name": upload.name,
        "content_type": upload.content_type,
        "size": upload.size,
        "etag": upload.sha256,
        "checksums": {"sha256": upload.sha256},
        "metadata": {},
        "created_at": iso_time(upload.created_at),
        "expires_at": iso_time(upload.expires_at),
        "urls": {"get": f"{base_url}{UPLOADS_PATH}/{upload.id}"},
    }


GROUP = RouteGroup(
    "files",
    [
        Route(UPLOADS_PATH, create, methods=["POST"]),
        Route(UPLOADS_PATH, list_all, methods=["GET"]),
        Route(UPLOADS_PATH + "/{id}", get, methods=["GET"]),
        Route(UPLOADS_PATH + "/{id}", delete, methods=["DELETE"]),
    ],
    error_body,
)

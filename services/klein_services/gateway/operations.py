"""Routes of the gateway itself: liveness, readiness, and the images of the local result store."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from klein_services.gateway.downloads import image_type
from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.result_store import PATH, LocalResultStore
from klein_services.gateway.route_group import RouteGroup

_RESULT_HEADERS = {
    # A browser must take the file for nothing but the image that it is.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=3600",
    # Pages of other origins may show it; its link is the only permission that it needs.
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Access-Control-Allow-Origin": "*",
}


async def live(request: Request) -> Response:
    """Answers as long as the event loop runs."""
    return PlainTextResponse("live\n")


async def ready(request: Request) -> Response:
    """Answers 200 while new requests are wanted, else 503 with the reason."""
    readiness = gateway_of(request).readiness
    if readiness.is_ready:
        return PlainTextResponse("ready\n")
    return PlainTextResponse(f"{readiness.reason}\n", 503)


async def result(request: Request) -> Response:
    """Returns the image of a link."""
    store = gateway_of(request).results
    data = None
    if isinstance(store, LocalResultStore):
        query = request.query_params
        data = await store.read(
            request.path_params["key"], query.get("expires", ""), query.get("signature", "")
        )
    if data is None:
        raise ApiError(
            HTTPStatus.NOT_FOUND, "not_found", "This link is wrong, it has expired, or its image was deleted."
        )
    kind = image_type(data) or "application/octet-stream"
    return Response(data, media_type=kind, headers=_RESULT_HEADERS)


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error as these routes report it."""
    return {"error": {"code": error.reason, "message": error.message}}


GROUP = RouteGroup(
    "operations",
    [
        Route("/healthz", live, methods=["GET"]),
        Route("/readyz", ready, methods=["GET"]),
        Route(f"{PATH}/{{key}}", result, methods=["GET"]),
    ],
    error_body,
)

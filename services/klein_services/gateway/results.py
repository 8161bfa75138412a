"""Results: images of the local store, served to everyone who has their link."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from klein_services.gateway.downloads import image_type
from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.operations import error_body
from klein_services.gateway.result_store import PATH, LocalResultStore
from klein_services.gateway.route_group import RouteGroup

_HEADERS = {
    # A browser must take the file for nothing but the image that it is.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=3600",
    # Pages of other origins may show it; its link is the only permission that it needs.
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Access-Control-Allow-Origin": "*",
}


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
    return Response(data, media_type=kind, headers=_HEADERS)


GROUP = RouteGroup("results", [Route(f"{PATH}/{{key}}", result, methods=["GET"])], error_body)

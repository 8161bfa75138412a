"""Operation of the gateway: liveness and readiness over HTTP."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from klein_services.gateway.errors import ApiError
from klein_services.gateway.gateway import gateway_of
from klein_services.gateway.route_group import RouteGroup


async def live(request: Request) -> Response:
    """Answers as long as the event loop runs."""
    return PlainTextResponse("live\n")


async def ready(request: Request) -> Response:
    """Answers 200 while new requests are wanted, else 503 with the reason."""
    readiness = gateway_of(request).readiness
    if readiness.is_ready:
        return PlainTextResponse("ready\n")
    return PlainTextResponse(f"{readiness.reason}\n", 503)


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error as these routes report it."""
    return {"error": {"code": error.reason, "message": error.message}}


GROUP = RouteGroup(
    "operations",
    [Route("/healthz", live, methods=["GET"]), Route("/readyz", ready, methods=["GET"])],
    error_body,
)

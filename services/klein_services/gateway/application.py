"""HTTP application of the gateway: every API, in one list."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp

from klein_services.gateway import (
    bfl,
    eachlabs,
    openai,
    operations,
    page_api,
    predictions,
    upload_routes,
)
from klein_services.gateway.gateway import Gateway, open_gateway
from klein_services.gateway.openapi import openapi_group
from klein_services.gateway.request_log import RequestLog
from klein_services.gateway.route_group import API_KEY, RouteGroup, method_or_path_error
from klein_services.gateway.settings import GatewaySettings

_APIS: tuple[RouteGroup, ...] = (
    operations.GROUP,
    bfl.GROUP,
    predictions.GROUP,
    upload_routes.GROUP,
    eachlabs.GROUP,
    openai.GROUP,
    page_api.GROUP,
)
"""Every API. Routes are tried in this order; a group with a path of everything belongs at the end."""
GROUPS = (openapi_group(_APIS), *_APIS)
"""The APIs, and the document that describes them."""
FALLBACK = openai.GROUP
"""Group whose form of errors unknown paths get."""


@asynccontextmanager
async def running_application(
    settings: GatewaySettings, groups: Sequence[RouteGroup] = GROUPS
) -> AsyncIterator[tuple[ASGIApp, Gateway]]:
    """Opens the gateway's parts and yields its application with them."""
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(settings))
        for group in groups:
            if group.lifespan is not None:
                await stack.enter_async_context(group.lifespan(gateway))
        yield make_application(gateway, groups), gateway


def make_application(gateway: Gateway, groups: Sequence[RouteGroup]) -> ASGIApp:
    """Returns the application of these groups."""

    async def refuse(request: Request, error: Exception) -> Response:
        """Answers a request that no route takes, in the form of the API that has its path."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        owner = next((group for group in groups if _has_path(group, request)), FALLBACK)
        request.scope[API_KEY] = owner.name
        response = owner.error_response(method_or_path_error(status))
        response.headers.update((error.headers or {}) if isinstance(error, HTTPException) else {})
        return response

    application = Starlette(
        routes=[route for group in groups for route in group.guarded_routes()],
        exception_handlers={HTTPException: refuse},
    )
    # `/v1/models/` is not `/v1/models`; a redirect would name the address of this process, not the public one.
    application.router.redirect_slashes = False
    application.state.gateway = gateway
    if origins := gateway.settings.origins:
        application.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "retry-after-ms", "x-request-id"],
            max_age=600,
        )
    return RequestLog(application)


def _has_path(group: RouteGroup, request: Request) -> bool:
    return any(route.matches(request.scope)[0] is not Match.NONE for route in group.routes)

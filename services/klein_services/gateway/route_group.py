"""Route group: the routes of one API and the form of its errors."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_services.gateway.errors import ApiError, internal_error
from klein_services.gateway.gateway import Gateway
from klein_services.runtime.logs import request_id

API_KEY = "klein.api"
"""Key of the scope that holds the name of the group whose route was taken."""
ROUTE_KEY = "klein.route"
"""Key of the scope that holds the path of that route, with its parameters' names."""
CLIENT_LEFT = 499
"""Status in logs and metrics of a request whose client disconnected; it is never sent."""
_log = logging.getLogger("klein.gateway")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RouteGroup:
    """One API. `application.GROUPS` lists all of them."""

    name: str
    """Value of the metrics' label `api`."""
    routes: Sequence[Route | Mount]
    error_body: Callable[[ApiError], Any]
    """Returns the JSON value by which this API reports an error; `ApiError.headers` are sent with it."""
    lifespan: Callable[[Gateway], AbstractAsyncContextManager[None]] | None = None
    """Runs from before the first request to after the last, for an API with work of its own."""

    def error_response(self, error: ApiError) -> Response:
        """Returns the response that reports an error."""
        return JSONResponse(self.error_body(error), int(error.status), error.headers)

    def guarded_routes(self) -> list[Route | Mount]:
        """Returns the routes; an exception of their handlers becomes a response in this API's form."""
        guarded = []
        for route in self.routes:
            copied = copy.copy(route)
            copied.app = _Guard(self, route.path, route.app)
            guarded.append(copied)
        return guarded


class _Guard:
    """The application of one route, between the router and the handler."""

    def __init__(self, group: RouteGroup, path: str, app: ASGIApp) -> None:
        self._group = group
        self._path = path
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[API_KEY], scope[ROUTE_KEY] = self._group.name, self._path
        has_begun = False

        async def send_noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except ApiError as error:
            answer = error
        except ClientDisconnect:
            return
        except Exception:
            _log.exception("a request failed because of a fault")
            answer = internal_error(request_id.get())
        else:
            return
        if has_begun:
            # The status has been sent; a connection that ends early is the only sign that is left.
            raise answer
        await self._group.error_response(answer)(scope, receive, send)


async def while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Runs work for a request whose body was read, and cancels it when the client disconnects.

    Raises:
        ClientDisconnect: the client did.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def method_or_path_error(status: int) -> ApiError:
    """Returns the error of a request that no route takes."""
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        message = "This path does not take this method."
        return ApiError(HTTPStatus.METHOD_NOT_ALLOWED, "method_not_allowed", message)
    return ApiError(HTTPStatus.NOT_FOUND, "not_found", "There is no such path; /openapi.json lists all.")


Handler = Callable[[Request], Awaitable[Response]]
"""A route's handler."""

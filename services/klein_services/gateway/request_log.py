"""Request log: the id, trace, log line and metrics of each HTTP request; id and trace go on to the orchestrator."""

from __future__ import annotations

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klein_services.gateway import metrics
from klein_services.gateway.route_group import API_KEY, CLIENT_LEFT, ROUTE_KEY
from klein_services.runtime import logs, tracing

NO_API = "none"
"""Label of requests that failed before a route was chosen."""
_QUIET = ("/healthz", "/readyz")
"""Paths of probes, whose log lines would drown everything else."""
_TRACE_HEADERS = ("traceparent", "tracestate")
_VALUE = re.compile(r"[\x20-\x7e]{1,1024}")
_log = logging.getLogger("klein.access")


class RequestLog:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request; an exception is logged where it happened and ends the connection."""
        began = time.monotonic()
        headers = Headers(scope=scope)
        identifier = logs.take_request_id(
            [
                (logs.REQUEST_ID_KEY, value)
                for value in headers.getlist(logs.REQUEST_ID_KEY)
                if value.isascii()
            ]
        )
        token = logs.request_id.set(identifier)
        status = 0
        is_complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = identifier
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        span = tracing.http_server_span(scope["method"], headers.items())
        metrics.IN_PROGRESS.inc()
        try:
            with span.current():
                await self._app(scope, receive, send_with_id)
        finally:
            metrics.IN_PROGRESS.dec()
            # Without an end the client left, or a fault broke the connection, which its own log line shows.
            status = status if is_complete else CLIENT_LEFT
            api, route = scope.get(API_KEY, NO_API), scope.get(ROUTE_KEY, "")
            seconds = time.monotonic() - began
            metrics.REQUESTS.labels(api, str(status)).inc()
            metrics.REQUEST_SECONDS.labels(api).observe(seconds)
            tracing.end_http_server_span(span, route, status, identifier)
            if scope["path"] not in _QUIET:
                fields = {"api": api, "route": route, "method": scope["method"], "status": status}
                _log.info("request", extra=fields | {"seconds": round(seconds, 4)})
            logs.request_id.reset(token)


def call_metadata(request: Request) -> tuple[tuple[str, str], ...]:
    """Returns the metadata for calls that are part of a request; without own spans the client's trace is passed on."""
    passed: tuple[tuple[str, str], ...] = ()
    if not tracing.enabled():
        values = ((name, request.headers.get(name, "")) for name in _TRACE_HEADERS)
        passed = tuple((name, value) for name, value in values if _VALUE.fullmatch(value))
    return (*logs.request_metadata(), *passed)

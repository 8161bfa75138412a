"""Metadata of calls to the orchestrator: the request's id and its trace."""

from __future__ import annotations

import re

from starlette.requests import Request

from klein_services.runtime import tracing
from klein_services.runtime.logs import request_metadata

_TRACE_HEADERS = ("traceparent", "tracestate")
_VALUE = re.compile(r"[\x20-\x7e]{1,1024}")


def call_metadata(request: Request) -> tuple[tuple[str, str], ...]:
    """Returns the metadata for calls that are part of a request; without own spans the client's trace is passed on."""
    passed: tuple[tuple[str, str], ...] = ()
    if not tracing.enabled():
        values = ((name, request.headers.get(name, "")) for name in _TRACE_HEADERS)
        passed = tuple((name, value) for name, value in values if _VALUE.fullmatch(value))
    return (*request_metadata(), *passed)

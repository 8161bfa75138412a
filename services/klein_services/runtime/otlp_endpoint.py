"""Endpoint that spans are sent to: KLEIN_OTLP_ENDPOINT, else OpenTelemetry's own variables."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

from klein_core.errors import KleinError

_ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/:]+)(:\d{1,5})?/?")
_SETTING = "KLEIN_OTLP_ENDPOINT"
_STANDARD_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_log = logging.getLogger("klein.tracing")


class EndpointError(KleinError):
    """Spans cannot be sent to the endpoint; the text names the variable and its value."""


def endpoint_problems(endpoint: str, source: str = _SETTING) -> Iterator[str]:
    """Yields a sentence when spans cannot be sent to the endpoint that a variable names; an empty one is not set."""
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        yield f"{source} is {endpoint!r}; it must be http://HOST:PORT, or https://HOST:PORT for TLS"


def wanted_endpoint(setting: str, environment: Mapping[str, str]) -> str:
    """Returns the endpoint to export to; empty leaves tracing off.

    Args:
        setting: KLEIN_OTLP_ENDPOINT, which wins over OpenTelemetry's variables.
        environment: where OpenTelemetry's variables are.

    Raises:
        EndpointError: the endpoint is no URL.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    if environment.get("OTEL_TRACES_EXPORTER", "") == "none":
        return ""
    given = {_SETTING: setting} | {name: environment.get(name, "") for name in _STANDARD_ENDPOINTS}
    source, endpoint = next(((name, value) for name, value in given.items() if value), ("", ""))
    for problem in endpoint_problems(endpoint, source):
        raise EndpointError(problem)
    protocol = next(filter(None, map(environment.get, _PROTOCOLS)), "grpc")
    if source in _STANDARD_ENDPOINTS and protocol != "grpc":
        _log.warning(
            "no traces: OpenTelemetry's variables ask for the protocol %s, and only grpc is supported; "
            "name a gRPC endpoint with %s",
            protocol,
            _SETTING,
        )
        return ""
    return endpoint

"""Span of one request of the public API: an operation of OpenTelemetry's GenAI conventions."""

from __future__ import annotations

import grpc

from klein_core.errors import InvalidInput
from klein_core.params import GenerationParams
from klein_services.orchestrator.request import ImageRequest
from klein_services.runtime import semantic_conventions as names
from klein_services.runtime import tracing
from klein_services.runtime.errors import ServiceError
from klein_services.runtime.logs import request_id
from klein_services.runtime.status import status_of
from klein_services.runtime.tracing import Attributes, OpenSpan, Value


def open_generation_span(model: str) -> OpenSpan:
    """Begins the span of a request for a model."""
    if not tracing.enabled():
        return tracing.NO_SPAN
    return tracing.open_span(
        names.generation_span_name(model),
        {
            names.GEN_AI_OPERATION_NAME: names.GENERATE_CONTENT,
            names.GEN_AI_OUTPUT_TYPE: names.OUTPUT_IMAGE,
            names.GEN_AI_PROVIDER_NAME: names.PROVIDER,
            names.GEN_AI_REQUEST_MODEL: model,
            names.KLEIN_REQUEST_ID: request_id.get(),
        },
    )


def request_attributes(request: ImageRequest, *, is_streamed: bool) -> Attributes:
    """Returns the attributes that are known once a request is validated; never its prompts."""
    params = request.params
    attributes: dict[str, Value] = {
        names.GEN_AI_REQUEST_CHOICE_COUNT: len(params.seeds),
        names.GEN_AI_REQUEST_SEED: params.seeds[0],
        names.GEN_AI_REQUEST_STREAM: is_streamed,
        names.GEN_AI_RESPONSE_ID: request_id.get(),
        names.GEN_AI_RESPONSE_MODEL: request.route.name,
        names.KLEIN_FLOW: request.flow,
        names.KLEIN_STEPS: params.steps,
        names.KLEIN_GUIDANCE_SCALE: params.guidance,
        names.KLEIN_REFERENCE_COUNT: params.reference_count,
    }
    if request.size_is_known:
        attributes.update(size_attributes(params))
    return attributes


def size_attributes(params: GenerationParams) -> Attributes:
    """Returns the attributes of the size of a request's images."""
    return {names.KLEIN_WIDTH: params.width_px, names.KLEIN_HEIGHT: params.height_px}


def end_generation_span(span: OpenSpan, outcome: str, error: BaseException) -> None:
    """Ends the span of a request that failed, with the code that its client gets.

    Args:
        span: of the request.
        outcome: the label under which the request is counted.
        error: how it ended.
    """
    if not span:
        return
    if outcome == "expired":
        span.end(grpc.StatusCode.DEADLINE_EXCEEDED)
    elif outcome == "cancelled":
        # Not an error: the client did not wait.
        span.end(grpc.StatusCode.CANCELLED, is_error=False)
    elif isinstance(error, InvalidInput | ServiceError):
        span.end(status_of(error).code)
    else:
        span.end(grpc.StatusCode.INTERNAL)

"""Names of spans and of their attributes: OpenTelemetry's conventions for GenAI and RPC, and the suite's own.

Spelled out rather than imported, because the released package of the conventions marks most of them as unstable and
moves them; a test compares them with it. The suite's own names begin with `klein.`: the GenAI conventions have no image
operation, and so no names for sizes, steps, guidance or references.
"""

from __future__ import annotations

import json
from typing import Final

import grpc

# GenAI, https://opentelemetry.io/docs/specs/semconv/gen-ai/
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_OUTPUT_TYPE: Final = "gen_ai.output.type"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_INPUT_MESSAGES: Final = "gen_ai.input.messages"
GENERATE_CONTENT: Final = "generate_content"
"""Value of `gen_ai.operation.name`, the well-known one that fits images."""
OUTPUT_IMAGE: Final = "image"
"""Value of `gen_ai.output.type`."""
PROVIDER: Final = "klein-suite"
"""Value of `gen_ai.provider.name`, and name of the tracer."""

# RPC, https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
"""The fully qualified method, `package.Service/Method`; also the span's name."""
RPC_RESPONSE_STATUS_CODE: Final = "rpc.response.status_code"
"""The code's name, such as `DEADLINE_EXCEEDED`."""
GRPC: Final = "grpc"
"""Value of `rpc.system.name`."""

# HTTP, https://opentelemetry.io/docs/specs/semconv/http/http-spans/
HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_RESPONSE_STATUS_CODE: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"

ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

SERVER_ERRORS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that are errors of a server's span; the others are mistakes or wishes of its client. In a client's span every
code but OK is an error."""

KLEIN_REQUEST_ID: Final = "klein.request_id"
KLEIN_CALLER: Final = "klein.caller"
"""Name of the token that the request was made with."""
KLEIN_FLOW: Final = "klein.flow"
KLEIN_WIDTH: Final = "klein.image.width"
KLEIN_HEIGHT: Final = "klein.image.height"
KLEIN_STEPS: Final = "klein.steps"
KLEIN_GUIDANCE_SCALE: Final = "klein.guidance_scale"
KLEIN_REFERENCE_COUNT: Final = "klein.reference_count"
KLEIN_FIRST_STEP: Final = "klein.step.first"
KLEIN_LAST_STEP: Final = "klein.step.last"
KLEIN_STEP_REQUESTS: Final = "klein.step.requests"
"""Most requests that shared a step of the group."""
KLEIN_STEP_TOKENS: Final = "klein.step.tokens"
"""Most tokens in a step of the group."""
KLEIN_HOP_SOURCE: Final = "klein.hop.source"
KLEIN_HOP_DESTINATION: Final = "klein.hop.destination"
KLEIN_HOP_BYTES: Final = "klein.hop.bytes"
KLEIN_CACHE_KIND: Final = "klein.cache.kind"
KLEIN_CACHE_OUTCOME: Final = "klein.cache.outcome"

QUEUE: Final = "queue"
"""Name of the span of a wait for the device."""
DENOISE_STEPS: Final = "denoise steps"
"""Name of the span of a group of steps."""
DESCRIBE_STAGES: Final = "describe stages"
"""Name of the span in which the orchestrator learns whether the stages of a route serve."""
CACHE_LOOKUP: Final = "cache look-up"
"""Name of an event of the request's span."""


def generation_span_name(model: str) -> str:
    """Returns the name of the span of one request: operation and model."""
    return f"{GENERATE_CONTENT} {model}"


def hop_span_name(source: str, destination: str) -> str:
    """Returns the name of the span of one tensor or image between two processes."""
    return f"hop {source} → {destination}"


def input_messages(prompt: str, negative_prompt: str | None) -> str:
    """Returns prompts in the JSON form of `gen_ai.input.messages`."""
    texts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
    parts = [{"type": "text", "content": text} for text in texts]
    return json.dumps([{"role": "user", "parts": parts}], ensure_ascii=False)

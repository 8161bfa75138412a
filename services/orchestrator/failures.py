"""What a stage's failure becomes for the caller of the public API.

| the stage says | the caller gets |
|---|---|
| INVALID_ARGUMENT on fields of the caller's | INVALID_ARGUMENT, the violations under the public field names |
| INVALID_ARGUMENT on anything else | INTERNAL: the stages disagree about a tensor |
| NOT_FOUND with UNKNOWN_ADAPTER | the same: adapters' names are the caller's |
| any other NOT_FOUND | UNAVAILABLE: the stage serves another model than the routing table says |
| UNAVAILABLE, CANCELLED | UNAVAILABLE with the stage, its target and the reason |
| RECEIVE_TIMEOUT | UNAVAILABLE: another stage was too slow, not the caller |
| RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, INTERNAL and the rest | the same code and details |
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from klein_core.errors import InvalidInput, Violation
from services.orchestrator.routing import StageAddress
from services.runtime.errors import StagesLost
from services.runtime.status import UNKNOWN_ADAPTER, PeerFailure, explain

PUBLIC_FIELDS: Mapping[str, str] = {
    "prompt": "prompt",
    "width_px": "width_px",
    "height_px": "height_px",
    "seeds": "seed",
    "step_count": "step_count",
    "guidance_scale": "guidance_scale",
    "reference_count": "references",
    "reference_latents": "references",
    "priority": "priority",
    "format": "format",
    "quality": "quality",
    "preview_interval_steps": "preview_interval_steps",
    "adapters": "adapters",
}
"""Public names of the fields that the orchestrator passes on, by their names in stage requests."""

_RECEIVE_TIMEOUT = "RECEIVE_TIMEOUT"
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class StageDisagreement(Exception):
    """A stage sent or refused what the protocol between stages does not foresee; a fault of ours."""


def failure_of(
    address: StageAddress, error: grpc.aio.AioRpcError, fields: Mapping[str, str] = PUBLIC_FIELDS
) -> Exception:
    """Returns what the caller of the public API is to get for a stage's failed call.

    Args:
        address: the stage.
        error: how its call ended.
        fields: public names of the fields that the call passed on.
    """
    code, message = error.code(), error.details() or ""
    if code in _LOST or explain(error).reason == _RECEIVE_TIMEOUT:
        return StagesLost(f"{address.stage} at {address.target} is unavailable: {message}")
    if code is grpc.StatusCode.NOT_FOUND and explain(error).reason != UNKNOWN_ADAPTER:
        return StagesLost(
            f"{address.stage} at {address.target} does not serve {address.model!r}, "
            f"as the routing table says: {message}"
        )
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return _invalid_input(address, error, fields)
    return PeerFailure(error, address.stage)


def _invalid_input(
    address: StageAddress, error: grpc.aio.AioRpcError, fields: Mapping[str, str]
) -> Exception:
    violations = explain(error).violations
    public = [
        Violation(fields.get(violation.field, violation.field), violation.description)
        for violation in violations
        if violation.field in fields or violation.field.startswith(("references[", "adapters["))
    ]
    if public and len(public) == len(violations):
        return InvalidInput(public)
    return StageDisagreement(f"{address.stage} at {address.target} refused its input: {error.details()}")

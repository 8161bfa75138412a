"""KEDA's external scaler: ScaledObjects scale a stage by the backlog that this orchestrator holds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from klein_api.externalscaler import external_scaler_service_pb2 as api
from klein_api.externalscaler.external_scaler_service_pb2_grpc import ExternalScalerServicer
from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.backlog import Backlog, PoolBacklog
from klein_services.orchestrator.generator import ImageGenerator
from klein_services.orchestrator.routing import (
    DENOISER,
    TEXT_ENCODER,
    VAE_DECODER,
    RoutingTable,
    StageAddress,
)
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.errors import StageUnavailable

SERVICE_NAME = "externalscaler.ExternalScaler"
STREAM_LIMIT = 64
"""Most streams of `StreamIsActive`: one for each ScaledObject and replica of KEDA, with room to spare."""
BACKLOG_SECONDS = "backlogSeconds"
BACKLOG_REQUESTS = "backlogRequests"
_STAGES = (TEXT_ENCODER, DENOISER, VAE_DECODER)
_KEYS = ("stage", "model", BACKLOG_SECONDS, BACKLOG_REQUESTS, "expectedSeconds")
_KEDA_KEYS = frozenset({"scalerAddress", "enableTLS", "unsafeSsl", "caCert", "tlsClientCert", "tlsClientKey"})
"""Keys that KEDA reads itself and passes on."""
_LARGEST = 1e6
_IDLE_SECONDS = 5.0
"""Time without work after which a stream reports it, so that single requests do not make it report twice each."""
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Trigger:
    """A ScaledObject's trigger: the pool of replicas that it scales, and by which metric."""

    address: StageAddress
    metric: str
    """backlogSeconds or backlogRequests."""
    target: float
    """Value of the metric per replica."""
    expected_seconds: float | None
    """Device time of a call until the first one was measured; `None` when the metadata gives none."""

    @property
    def metric_name(self) -> str:
        unit = "seconds" if self.metric == BACKLOG_SECONDS else "requests"
        return f"{self.address.stage}-backlog-{unit}"

    @classmethod
    def of(cls, metadata: Mapping[str, str], table: RoutingTable) -> Trigger:
        """Reads a trigger's metadata.

        Raises:
            InvalidInput: keys are missing, unknown or have bad values; all of them are named.
        """
        violations = list(_unknown_keys(metadata))
        stage = metadata.get("stage", "")
        if stage not in _STAGES:
            violations.append(_violation("stage", f"is {stage!r}; must be one of {', '.join(_STAGES)}"))
        model = metadata.get("model", "")
        if model and model not in table.routes:
            violations.append(_violation("model", f"is {model!r}; routed are {', '.join(table.routes)}"))
        metrics = [key for key in (BACKLOG_SECONDS, BACKLOG_REQUESTS) if key in metadata]
        if len(metrics) != 1:
            found = "are both there" if metrics else "is missing"
            violations.append(
                _violation(BACKLOG_SECONDS, f"{found}; give either {BACKLOG_SECONDS} or {BACKLOG_REQUESTS}")
            )
        numbers = {}
        for key in (*metrics, *({"expectedSeconds"} & metadata.keys())):
            numbers[key] = _number(metadata[key])
            if not 0 < numbers[key] <= _LARGEST:
                text = f"is {metadata[key]!r}; must be a number above 0 and at most {_LARGEST:.0f}"
                violations.append(_violation(key, text))
        if violations:
            raise InvalidInput(violations)
        return cls(
            _address(stage, model, table), metrics[0], numbers[metrics[0]], numbers.get("expectedSeconds")
        )


class ExternalScaler(ExternalScalerServicer):
    """Handlers of KEDA's ExternalScaler.

    Never returns 0 for what is not known: then the call is UNAVAILABLE, and KEDA keeps the replicas (`fallback`).

    Args:
        generator: holds the routing table and the backlog.
        settle_seconds: time after the start during which an empty backlog proves nothing, because clients of the
            orchestrator that was there before are still connecting.
    """

    def __init__(self, generator: ImageGenerator, settle_seconds: float) -> None:
        self._generator = generator
        self._settle_seconds = settle_seconds
        self._started_at = time.monotonic()
        self._is_draining = False
        self._streams = ConcurrencyLimit(STREAM_LIMIT)

    def drain(self) -> None:
        """Ends the streams; from here on other orchestrators get the requests, and this one's backlog means nothing."""
        self._is_draining = True
        self._backlog.notify()

    async def IsActive(self, request: api.ScaledObjectRef, context: _Context) -> api.IsActiveResponse:
        """Returns whether there is work for the pool."""
        pool = self._pool(self._trigger(request))
        self._require_knowledge(pool)
        return api.IsActiveResponse(result=pool.count > 0)

    async def StreamIsActive(self, request: api.ScaledObjectRef, context: _Context) -> Any:
        """Yields whether there is work for the pool, at once and after each change, until the orchestrator drains."""
        reported: bool | None = None
        with self._streams.slot():
            while True:
                pool = self._pool(self._trigger(request))
                is_active = pool.count > 0
                wait_seconds = 0.0
                if not is_active and reported is not False:
                    wait_seconds = (
                        _IDLE_SECONDS - pool.idle_seconds() if reported else self._unsettled_seconds(pool)
                    )
                if wait_seconds <= 0 and is_active is not reported:
                    yield api.IsActiveResponse(result=is_active)
                    reported = is_active
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_seconds if wait_seconds > 0 else None):
                        await self._backlog.change()

    async def GetMetricSpec(
        self, request: api.ScaledObjectRef, context: _Context
    ) -> api.GetMetricSpecResponse:
        """Returns the metric that the metadata names, and its target. Does not depend on what is known."""
        trigger = self._trigger(request)
        spec = api.MetricSpec(
            metricName=trigger.metric_name,
            targetSize=math.ceil(trigger.target),
            targetSizeFloat=trigger.target,
        )
        return api.GetMetricSpecResponse(metricSpecs=[spec])

    async def GetMetrics(self, request: api.GetMetricsRequest, context: _Context) -> api.GetMetricsResponse:
        """Returns the pool's backlog over all replicas.

        Raises:
            StageUnavailable: it is not known.
        """
        trigger = self._trigger(request.scaledObjectRef)
        if request.metricName != trigger.metric_name:
            raise InvalidInput.of(
                "metricName", f"is {request.metricName!r}; this ScaledObject has {trigger.metric_name!r}"
            )
        pool = self._pool(trigger)
        self._require_knowledge(pool)
        value = float(pool.count)
        if trigger.metric == BACKLOG_SECONDS:
            seconds = pool.seconds(trigger.expected_seconds)
            if seconds is None:
                raise StageUnavailable(
                    f"{pool.count} requests wait for the {trigger.address.stage}, and none was measured yet; "
                    "until then the trigger's metadata may give expectedSeconds for each"
                )
            value = seconds
        metric = api.MetricValue(
            metricName=trigger.metric_name, metricValue=math.ceil(value), metricValueFloat=value
        )
        return api.GetMetricsResponse(metricValues=[metric])

    @property
    def _backlog(self) -> Backlog:
        return self._generator.backlog

    def _trigger(self, reference: api.ScaledObjectRef) -> Trigger:
        if self._is_draining:
            raise StageUnavailable("the orchestrator drains; its backlog is only a part of the requests")
        return Trigger.of(reference.scalerMetadata, self._generator.table)

    def _pool(self, trigger: Trigger) -> PoolBacklog:
        return self._backlog.pool(trigger.address)

    def _unsettled_seconds(self, pool: PoolBacklog) -> float:
        """Returns the time for which an empty pool still proves nothing; 0 when it does."""
        if pool.was_used:
            return 0.0
        return max(0.0, self._settle_seconds - (time.monotonic() - self._started_at))

    def _require_knowledge(self, pool: PoolBacklog) -> None:
        seconds = self._unsettled_seconds(pool)
        if seconds:
            raise StageUnavailable(
                f"no request has come since the start; that this means no work is known in {seconds:.0f} s"
            )


def _unknown_keys(metadata: Mapping[str, str]) -> Iterator[Violation]:
    for key in sorted(metadata.keys() - _KEDA_KEYS - set(_KEYS)):
        if not key.endswith("FromEnv"):
            yield _violation(key, f"is unknown; known are {', '.join(_KEYS)}")


def _violation(key: str, description: str) -> Violation:
    return Violation(f"scalerMetadata.{key}", description)


def _number(text: str) -> float:
    """Returns a number, NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _address(stage: str, model: str, table: RoutingTable) -> StageAddress:
    """Returns the pool of a stage.

    Raises:
        InvalidInput: no model is given, and the models have several pools of the stage.
    """
    routes = [table.routes[model]] if model else table.routes.values()
    found = {
        address.target: address for route in routes for address in route.stages if address.stage == stage
    }
    if len(found) > 1:
        text = (
            f"is missing; the {stage} has {len(found)} pools, so it must be one of {', '.join(table.routes)}"
        )
        raise InvalidInput([_violation("model", text)])
    return next(iter(found.values()))

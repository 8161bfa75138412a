"""Model of what scales a Deployment by a ScaledObject: KEDA's triggers and fallback, and the HPA's algorithm.

Written from the documentation of both. The manifests are read as they are; `speed` divides every period of theirs, so
that minutes pass in seconds. Ranges inside a query keep their real length.
"""

from __future__ import annotations

import asyncio
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import yaml

from klein_api.externalscaler import external_scaler_service_pb2 as external
from klein_api.externalscaler.external_scaler_service_pb2_grpc import ExternalScalerStub

SYNC_SECONDS = 15.0
"""The HPA's period, as kube-controller-manager has it by default."""
TOLERANCE = 0.1
_TIMEOUT_SECONDS = 3.0


class ScalerError(Exception):
    """A trigger gives no value; KEDA counts it and applies the fallback after `failureThreshold` of them."""


@dataclass(frozen=True)
class Policy:
    """Largest change within a period."""

    is_percent: bool
    value: float
    period_seconds: float


@dataclass(frozen=True)
class Direction:
    """Behavior in one direction."""

    stabilization_seconds: float
    policies: tuple[Policy, ...]
    takes_largest: bool

    @classmethod
    def of(cls, spec: Mapping[str, Any], default_stabilization_seconds: float) -> Direction:
        policies = tuple(
            Policy(each["type"] == "Percent", float(each["value"]), float(each["periodSeconds"]))
            for each in spec["policies"]
        )
        seconds = float(spec.get("stabilizationWindowSeconds", default_stabilization_seconds))
        return cls(seconds, policies, spec.get("selectPolicy", "Max") == "Max")


@dataclass(frozen=True)
class ScaledObject:
    """A ScaledObject with one trigger of the type `AverageValue`."""

    name: str
    minimum: int
    maximum: int
    failure_threshold: int
    fallback_replicas: int
    fallback_behavior: str
    up: Direction
    down: Direction
    trigger: str
    """prometheus, external or external-push."""
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> ScaledObject:
        """Reads a manifest; a field that this model does not know is an error rather than ignored."""
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
        known = {"scaleTargetRef", "pollingInterval", "minReplicaCount", "maxReplicaCount", "fallback"}
        if unknown := spec.keys() - known - {"advanced", "triggers"}:
            raise ValueError(f"{path}: the model does not know {', '.join(sorted(unknown))}")
        (trigger,) = spec["triggers"]
        if trigger.get("metricType", "AverageValue") != "AverageValue":
            raise ValueError(f"{path}: the model knows AverageValue only")
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        return cls(
            name=spec["scaleTargetRef"]["name"],
            minimum=spec["minReplicaCount"],
            maximum=spec["maxReplicaCount"],
            failure_threshold=spec["fallback"]["failureThreshold"],
            fallback_replicas=spec["fallback"]["replicas"],
            fallback_behavior=spec["fallback"].get("behavior", "static"),
            up=Direction.of(behavior["scaleUp"], 0),
            down=Direction.of(behavior["scaleDown"], 300),
            trigger=trigger["type"],
            metadata=trigger["metadata"],
        )


class Trigger(Protocol):
    """Source of a metric."""

    async def target(self) -> float:
        """Returns the metric's target per replica."""

    async def value(self) -> float:
        """Returns the metric over all replicas. Raises ScalerError when there is none."""


@dataclass
class PrometheusTrigger:
    """KEDA's Prometheus scaler: one instant query."""

    metadata: Mapping[str, str]
    address: str
    """Takes the place of `serverAddress`, which is a name of the cluster."""

    async def target(self) -> float:
        return float(self.metadata["threshold"])

    async def value(self) -> float:
        url = f"{self.address}/api/v1/query?" + urllib.parse.urlencode({"query": self.metadata["query"]})

        def ask() -> Any:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
                return json.load(response)["data"]["result"]

        try:
            result = await asyncio.to_thread(ask)
        except (OSError, urllib.error.URLError) as error:
            raise ScalerError(f"Prometheus does not answer: {error}") from None
        if len(result) > 1:
            raise ScalerError("the query returned multiple elements")
        if not result:
            if self.metadata.get("ignoreNullValues", "true") == "true":
                return 0.0
            raise ScalerError("the query returned nothing")
        value = float(result[0]["value"][1])
        if not math.isfinite(value):
            raise ScalerError(f"the query returned {value}")
        return value


@dataclass
class ExternalTrigger:
    """KEDA's external scaler: a gRPC client of the service at `scalerAddress`."""

    metadata: Mapping[str, str]
    channel: grpc.aio.Channel
    """Of the orchestrator, in place of `scalerAddress`, which is a name of the cluster."""

    @property
    def _reference(self) -> external.ScaledObjectRef:
        return external.ScaledObjectRef(name="denoiser", namespace="klein", scalerMetadata=self.metadata)

    async def target(self) -> float:
        return (await self._spec()).targetSizeFloat

    async def value(self) -> float:
        scaler = ExternalScalerStub(self.channel)
        try:
            request = external.GetMetricsRequest(
                scaledObjectRef=self._reference, metricName=(await self._spec()).metricName
            )
            (metric,) = (await scaler.GetMetrics(request, timeout=_TIMEOUT_SECONDS)).metricValues
            await scaler.IsActive(self._reference, timeout=_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise ScalerError(f"{error.code().name}: {error.details()}") from None
        return metric.metricValueFloat

    async def _spec(self) -> external.MetricSpec:
        answer = await ExternalScalerStub(self.channel).GetMetricSpec(
            self._reference, timeout=_TIMEOUT_SECONDS
        )
        (spec,) = answer.metricSpecs
        return spec


@dataclass
class Autoscaler:
    """The HPA that KEDA makes of a ScaledObject; `sync` is one round of it."""

    scaled_object: ScaledObject
    target: float
    speed: float = 1.0
    failures: int = 0
    """Rounds without a value in a row."""
    _recommendations: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, current: int, value: float | None) -> int:
        """Returns the number of replicas that there should be.

        Args:
            now: seconds on a monotonic clock.
            current: replicas that there should have been until now.
            value: the metric over all replicas; `None` without one.
        """
        self.failures = 0 if value is not None else self.failures + 1
        wanted = self._recommendation(current, value)
        if wanted is None:
            return current
        wanted = min(max(wanted, self.scaled_object.minimum), self.scaled_object.maximum)
        desired = self._limited(now, current, self._stabilized(now, current, wanted))
        if desired != current:
            self._changes.append((now, desired - current))
        return desired

    def _recommendation(self, current: int, value: float | None) -> int | None:
        """Returns the replicas that the metric asks for, or the fallback; `None` leaves everything as it is."""
        if value is not None:
            is_within_tolerance = abs(value / (self.target * current) - 1) <= TOLERANCE
            return current if is_within_tolerance else math.ceil(value / self.target)
        if self.failures < self.scaled_object.failure_threshold:
            return None
        replicas = self.scaled_object.fallback_replicas
        match self.scaled_object.fallback_behavior:
            case "static":
                return replicas
            case "currentReplicas":
                return current
            case "currentReplicasIfHigher":
                return max(current, replicas)
            case "currentReplicasIfLower":
                return min(current, replicas)
        raise ValueError(f"the model does not know {self.scaled_object.fallback_behavior}")

    def _stabilized(self, now: float, current: int, wanted: int) -> int:
        """Returns the smallest recommendation of the window up and the largest of the window down."""
        self._recommendations.append((now, wanted))
        up = self.scaled_object.up.stabilization_seconds / self.speed
        down = self.scaled_object.down.stabilization_seconds / self.speed
        while self._recommendations[0][0] < now - max(up, down):
            self._recommendations.popleft()
        lowest = min(each for at, each in self._recommendations if at >= now - up)
        highest = max(each for at, each in self._recommendations if at >= now - down)
        return min(max(current, lowest), highest)

    def _limited(self, now: float, current: int, desired: int) -> int:
        """Returns `desired` within the policies."""
        if desired == current:
            return current
        is_up = desired > current
        direction = self.scaled_object.up if is_up else self.scaled_object.down
        limits = [self._limit(policy, now, current, is_up) for policy in direction.policies]
        if is_up:
            return min(desired, max(limits) if direction.takes_largest else min(limits))
        return max(desired, min(limits) if direction.takes_largest else max(limits))

    def _limit(self, policy: Policy, now: float, current: int, is_up: bool) -> int:
        since = now - policy.period_seconds / self.speed
        sign = 1 if is_up else -1
        changed = sum(change for at, change in self._changes if at > since and change * sign > 0)
        base = current - changed
        if policy.is_percent:
            limit = base * (1 + sign * policy.value / 100)
            return math.ceil(limit) if is_up else math.floor(limit)
        return base + sign * int(policy.value)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns a percentile by the nearest rank; NaN of no values."""
    if not values:
        return math.nan
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]

"""Load of a suite's processes, computed from two scrapes of their metrics pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from klein_services.runtime.scrape import Change, Scrape, quantile

ORCHESTRATOR = "orchestrator"
DENOISER = "denoiser"
PROCESS_ORDER = ("text-encoder", DENOISER, "vae-decoder", ORCHESTRATOR)
"""Processes in the order in which they are shown."""
_PUBLIC_SERVICE = "klein_api.v1.ImageService"
_PUBLIC_METHODS = ("GenerateImage", "StreamGenerateImage")


@dataclass(frozen=True)
class ProcessLoad:
    """One process, as `klein top --json` prints it. A number that is not known is `None`."""

    target: str
    stage: str | None = None
    problem: str = ""
    """Why there is no metrics page; empty when there is one."""
    serving: bool = False
    model: str | None = None
    device: str | None = None
    queued: float | None = None
    running: float | None = None
    """Requests on the device; of an orchestrator, requests in progress."""
    queue_wait_seconds: float | None = None
    """Mean wait of the requests that started within the interval."""
    busy_ratio: float | None = None
    """Share of the interval in which the device computed."""
    requests_per_second: float | None = None
    """Requests that the device finished; of an orchestrator, requests that were answered."""
    step_seconds: float | None = None
    """Mean time of a denoiser's step."""
    step_occupancy_ratio: float | None = None
    """Tokens of the last step divided by the token budget."""
    refused_per_second: float | None = None
    memory_bytes: float | None = None
    """Device memory that torch holds."""


@dataclass(frozen=True)
class SuiteLoad:
    """All processes and the totals of the public API."""

    interval_seconds: float | None
    """Time between the two scrapes that rates are from; `None` after the first."""
    images_per_second: float | None
    megapixels_per_second: float | None
    in_progress: float | None
    median_seconds: float | None
    p95_seconds: float | None
    refused_per_second: dict[str, float] = field(default_factory=dict)
    """Reason → refusals of all processes."""
    cache_hit_ratio: float | None = None
    processes: list[ProcessLoad] = field(default_factory=list)


def process_load(change: Change) -> ProcessLoad:
    """Returns the load of one process."""
    page = change.after
    known = next((found["stage"] for found, _ in change.before.series("klein_serving")), None)
    if page.problem:
        return ProcessLoad(page.target, known, problem=page.problem)
    labels, serving = next(page.series("klein_serving"))
    stage = labels["stage"]
    info = next((found for found, _ in page.series("klein_stage_info")), {})
    if stage == ORCHESTRATOR:
        running = _in_progress(page)
        finished = _known_sum([change.rate("klein_request_duration_seconds_count")])
    else:
        running = page.value("klein_running_requests", stage=stage)
        finished = change.rate("klein_stage_duration_seconds_count", stage=stage)
    # A request of many steps counts only when it ends; its steps count as they are made.
    busy = "klein_denoise_step_seconds_sum" if stage == DENOISER else "klein_stage_duration_seconds_sum"
    return ProcessLoad(
        target=page.target,
        stage=stage,
        serving=bool(serving),
        model=info.get("model"),
        device=" ".join(filter(None, (info.get("device"), info.get("dtype")))) or None,
        queued=page.value("klein_queue_depth", stage=stage),
        running=running,
        queue_wait_seconds=change.mean("klein_queue_wait_seconds", stage=stage),
        busy_ratio=None if stage == ORCHESTRATOR else change.rate(busy, stage=stage),
        requests_per_second=finished,
        step_seconds=change.mean("klein_denoise_step_seconds"),
        step_occupancy_ratio=page.value("klein_denoise_step_occupancy_ratio"),
        refused_per_second=change.rate("klein_request_rejected_total", stage=stage),
        memory_bytes=page.value("klein_device_memory_bytes", stage=stage, kind="reserved"),
    )


def suite_load(changes: Sequence[Change]) -> SuiteLoad:
    """Returns the load of all processes, the stages in the order of a request's life."""
    processes = sorted(
        map(process_load, changes),
        key=lambda each: (
            PROCESS_ORDER.index(each.stage) if each.stage in PROCESS_ORDER else len(PROCESS_ORDER)
        ),
    )
    reasons = {
        found["reason"]
        for change in changes
        for found, _ in change.after.series("klein_request_rejected_total")
    }
    refused = {
        reason: _known_sum([change.rate("klein_request_rejected_total", reason=reason) for change in changes])
        for reason in sorted(reasons)
    }
    hits, looked_up = (
        _known_sum([change.increase("klein_cache_requests_total", **labels) for change in changes])
        for labels in ({"outcome": "hit"}, {})
    )
    pixels = _known_sum([change.rate("klein_pixels_total") for change in changes])
    return SuiteLoad(
        interval_seconds=max((change.seconds for change in changes), default=0.0) or None,
        images_per_second=_known_sum(
            [change.rate("klein_images_total", outcome="succeeded") for change in changes]
        ),
        megapixels_per_second=None if pixels is None else pixels / 1e6,
        in_progress=_known_sum([_in_progress(change.after) for change in changes]),
        median_seconds=quantile(changes, 0.5, "klein_request_duration_seconds", outcome="succeeded"),
        p95_seconds=quantile(changes, 0.95, "klein_request_duration_seconds", outcome="succeeded"),
        refused_per_second={reason: rate for reason, rate in refused.items() if rate},
        cache_hit_ratio=hits / looked_up if looked_up and hits is not None else None,
        processes=processes,
    )


def _in_progress(page: Scrape) -> float | None:
    """Returns the public requests that have begun and not ended; `None` where there is no public API."""
    differences = []
    for method in _PUBLIC_METHODS:
        labels = {"grpc_service": _PUBLIC_SERVICE, "grpc_method": method}
        started = page.value("grpc_server_started_total", **labels)
        handled = page.value("grpc_server_handled_total", **labels)
        if started is not None:
            differences.append(max(0.0, started - (handled or 0.0)))
    return sum(differences) if differences else None


def _known_sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None

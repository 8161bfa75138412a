"""The table of alerts: condition, wait, severity and text of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.observability.parameters import DAY, HOUR, MINUTE, Parameters
from deploy.observability.slos import FAST, REQUESTS, SLOW, slos

CRITICAL, WARNING = "critical", "warning"
"""A critical alert is a page; a warning waits until the morning."""
STAGES = ("text-encoder", "denoiser", "vae-decoder", "orchestrator")
EXTERNAL_METRICS = {
    "keda_scaler_detail_errors_total": "KEDA's operator",
    "kube_deployment_spec_replicas": "kube-state-metrics",
    "kube_horizontalpodautoscaler_status_condition": "kube-state-metrics",
}
"""Metrics that other programs export. Rules over them are quiet where those do not run."""
_SCALED = ".*(text-encoder|denoiser|vae-decoder).*"
_NO_CAPACITY = "queue_full|deadline_unreachable|adapter_memory_full"
_GENERATIONS = 'grpc_service="klein_api.v1.ImageService", grpc_method=~"GenerateImage|StreamGenerateImage"'


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One alerting rule. Its name is its section in the runbook."""

    name: str
    severity: str
    condition: str
    """PromQL; each series of the result is one alert."""
    wait: str
    """How long the condition must hold."""
    summary: str
    """One line, for the pager."""
    description: str
    labels: tuple[tuple[str, str], ...] = ()
    """Labels that the condition's series do not have."""

    def rule(self, runbook_base: str) -> dict[str, object]:
        """Returns the rule as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.condition,
            "for": self.wait,
            "labels": {"severity": self.severity, **dict(self.labels)},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook_base}#{self.name.lower()}",
            },
        }


def alerts(parameters: Parameters) -> list[Alert]:
    """Returns every alert, those that users notice first."""
    return [
        *_objectives(parameters),
        *_missing(parameters),
        *_requests(parameters),
        *_work(parameters),
        *_devices(parameters),
        *_certificates(parameters),
        *_scaling(parameters),
    ]


def _objectives(parameters: Parameters) -> Iterator[Alert]:
    availability, latency = slos(parameters)
    late = f"requests take longer than {parameters.latency_seconds:g} s"
    for slo, name, what in ((availability, "Availability", "requests fail"), (latency, "Latency", late)):
        for suffix, windows, severity, wait in (
            ("BurnsFast", FAST, CRITICAL, 2 * MINUTE),
            ("BurnsSlowly", SLOW, WARNING, HOUR),
        ):
            yield Alert(
                name=f"Klein{name}{suffix}",
                severity=severity,
                condition=slo.condition(windows, parameters),
                wait=parameters.wait(wait),
                summary=f"{{{{ $labels.model }}}}: too many {what}",
                description=f"{{{{ $value | humanizePercentage }}}} of {what}; the objective allows "
                f"{100 * (1 - slo.objective):g} % over 30 days.",
                labels=(("slo", slo.name),),
            )


def _missing(parameters: Parameters) -> Iterator[Alert]:
    for stage in STAGES:
        yield Alert(
            name="KleinStageMissing",
            severity=CRITICAL,
            condition=f'group {parameters.by()} (klein_serving{{stage!="{stage}"}})\n'
            f'unless\ngroup {parameters.by()} (klein_serving{{stage="{stage}"}} == 1)',
            wait=parameters.wait(2 * MINUTE),
            summary=f"no {stage} serves",
            description=f"Other stages are scraped, but no {stage} is, or none of them takes work. Requests fail after "
            "KLEIN_STAGE_WAIT_SECONDS.",
            labels=(("stage", stage),),
        )
    yield Alert(
        name="KleinSuiteMissing",
        severity=CRITICAL,
        condition="absent(klein_serving)",
        wait=parameters.wait(5 * MINUTE),
        summary="no process of the suite is scraped",
        description="Prometheus has no sample of klein_serving: nothing runs, or the scrape configuration is wrong, "
        "and no other alert of the suite can fire.",
    )
    yield Alert(
        name="KleinModelNotLoaded",
        severity=WARNING,
        condition='klein_serving{stage!="orchestrator"} == 0',
        wait=parameters.wait(parameters.load_seconds),
        summary="a replica of {{ $labels.stage }} does not get ready",
        description="{{ $labels.stage }} on {{ $labels.instance }} runs without taking work: it still loads its "
        "model, or it drains and does not end.",
    )


def _requests(parameters: Parameters) -> Iterator[Alert]:
    window = parameters.window(10 * MINUTE)
    expired = f'sum {parameters.by("model")} (rate({REQUESTS}_count{{outcome="expired"}}[{window}]))'
    ended = f'sum {parameters.by("model")} (rate({REQUESTS}_count{{outcome=~"succeeded|failed|expired"}}[{window}]))'
    yield Alert(
        name="KleinDeadlineMisses",
        severity=CRITICAL,
        condition=f"{expired} / {ended} > 0.05\nand\n"
        f"{expired} * {parameters.seconds(10 * MINUTE):g} >= {parameters.minimum_count}",
        wait=parameters.wait(5 * MINUTE),
        summary="{{ $labels.model }}: requests miss their deadlines",
        description="{{ $value | humanizePercentage }} of requests end because their deadline passes.",
    )
    rejected = f'klein_request_rejected_total{{stage="orchestrator", reason=~"{_NO_CAPACITY}"}}'
    rejections = f"sum {parameters.by()} (rate({rejected}[{window}]))"
    started = f"sum {parameters.by()} (rate(grpc_server_started_total{{{_GENERATIONS}}}[{window}]))"
    yield Alert(
        name="KleinLoadRefused",
        severity=CRITICAL,
        condition=f"{rejections} / {started} > 0.05\nand\n"
        f"{rejections} * {parameters.seconds(10 * MINUTE):g} >= {parameters.minimum_count}",
        wait=parameters.wait(5 * MINUTE),
        summary="requests are refused for lack of capacity",
        description="{{ $value | humanizePercentage }} of requests are refused because queues are full or longer than "
        "the deadlines.",
    )
    depth = f"sum {parameters.by('stage')} (klein_queue_depth)"
    serving = f"count {parameters.by('stage')} (klein_serving == 1)"
    yield Alert(
        name="KleinQueueGrows",
        severity=WARNING,
        condition=f"{depth} > 8 * {serving}\nand\n"
        f"sum {parameters.by('stage')} (deriv(klein_queue_depth[{window}])) > 0",
        wait=parameters.wait(10 * MINUTE),
        summary="the queue of {{ $labels.stage }} grows",
        description="{{ $value | humanize }} requests wait for {{ $labels.stage }}, more than eight for each replica, "
        "and the number rises.",
    )


def _work(parameters: Parameters) -> Iterator[Alert]:
    window = parameters.window(15 * MINUTE)
    yield Alert(
        name="KleinAbandonedWork",
        severity=WARNING,
        condition=f"sum {parameters.by('stage')} (rate(klein_abandoned_work_seconds_total[{window}]))\n"
        f"/\ncount {parameters.by('stage')} (klein_serving == 1) > 0.1",
        wait=parameters.wait(15 * MINUTE),
        summary="{{ $labels.stage }} computes what no client waits for",
        description="{{ $value | humanizePercentage }} of the time of the replicas of {{ $labels.stage }} goes into "
        "requests that are cancelled or expire before their answer.",
    )
    short, long = parameters.window(30 * MINUTE), parameters.window(DAY)

    def hit_ratio(range_: str) -> str:
        hits = f'sum {parameters.by("kind")} (rate(klein_cache_requests_total{{outcome="hit"}}[{range_}]))'
        return f"{hits} / sum {parameters.by('kind')} (rate(klein_cache_requests_total[{range_}]))"

    lookups = f"sum {parameters.by('kind')} (rate(klein_cache_requests_total[{short}]))"
    yield Alert(
        name="KleinCacheCollapse",
        severity=WARNING,
        condition=f"{hit_ratio(short)} < 0.5 * ({hit_ratio(long)})\nand\n{hit_ratio(long)} > 0.2\nand\n"
        f"{lookups} * {parameters.seconds(30 * MINUTE):g} >= 50",
        wait=parameters.wait(15 * MINUTE),
        summary="the cache {{ $labels.kind }} stopped helping",
        description="{{ $value | humanizePercentage }} of look-ups in the cache {{ $labels.kind }} are hits, less than "
        "half of the last day's share.",
    )


def _devices(parameters: Parameters) -> Iterator[Alert]:
    window = parameters.window(15 * MINUTE)
    yield Alert(
        name="KleinDeviceMemory",
        severity=WARNING,
        condition="klein_denoise_step_token_budget < 0.5 * "
        f"max_over_time(klein_denoise_step_token_budget[{parameters.window(DAY)}])\nor\n"
        f'increase(klein_request_rejected_total{{stage!="orchestrator", reason="out_of_memory"}}[{window}]) > 0',
        wait=parameters.wait(MINUTE),
        summary="{{ $labels.stage }} runs out of device memory",
        description="The device of {{ $labels.stage }} on {{ $labels.instance }} has no memory left for requests of "
        "this size: they are refused, or packed into smaller steps.",
    )


def _certificates(parameters: Parameters) -> Iterator[Alert]:
    left = f"min {parameters.by('stage', 'kind')} (klein_certificate_expiry_timestamp_seconds) - time()"
    for name, severity, limit_seconds, summary in (
        ("KleinCertificateExpires", WARNING, 14 * DAY, "expires within two weeks"),
        ("KleinCertificateExpired", CRITICAL, DAY, "expires within a day or has expired"),
    ):
        yield Alert(
            name=name,
            severity=severity,
            condition=f"{left} < {limit_seconds:g}",
            wait=parameters.wait(10 * MINUTE),
            summary=f"the {{{{ $labels.kind }}}} certificate of {{{{ $labels.stage }}}} {summary}",
            description="{{ $value | humanizeDuration }} are left for the certificate that {{ $labels.stage }} uses "
            "now. "
            "Processes read renewed files by themselves: this one was not renewed, or is not the one that is mounted.",
        )


def _scaling(parameters: Parameters) -> Iterator[Alert]:
    errors = f'keda_scaler_detail_errors_total{{scaledObject=~"{_SCALED}"}}'
    condition = f'horizontalpodautoscaler=~"{_SCALED}", condition="ScalingActive", status="false"'
    yield Alert(
        name="KleinScalerBlind",
        severity=CRITICAL,
        condition=f"sum by (namespace, exported_namespace, scaledObject) (increase({errors}"
        f"[{parameters.window(5 * MINUTE)}])) > 0\nor\n"
        f"kube_horizontalpodautoscaler_status_condition{{{condition}}} == 1",
        wait=parameters.wait(5 * MINUTE),
        summary="the autoscaler gets no metric",
        description="{{ $labels.scaledObject }}{{ $labels.horizontalpodautoscaler }} cannot read what it scales on: "
        "the number of replicas stays as it is, whatever the load.",
    )
    replicas, hour = f'kube_deployment_spec_replicas{{deployment=~"{_SCALED}"}}', parameters.window(HOUR)
    above_mean = f"{replicas} > bool avg_over_time({replicas}[{hour}])"
    yield Alert(
        name="KleinScalingThrash",
        severity=WARNING,
        # A tour of the day, however high, crosses its own mean twice.
        condition=f"changes(({above_mean})[{hour}:{parameters.window(MINUTE)}]) >= 6",
        wait=parameters.wait(0),
        summary="{{ $labels.deployment }} is scaled up and down again and again",
        description="Within an hour the number of replicas of {{ $labels.deployment }} crossed its mean "
        "{{ $value | humanize }} times: each new replica loads a model and is gone before it pays off.",
    )

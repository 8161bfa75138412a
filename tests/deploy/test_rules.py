"""Rules of the table: current files, a firing and a quiet case for each alert run by promtool, and their runbook."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deploy.observability.alerts import CRITICAL, EXTERNAL_METRICS, STAGES, WARNING, Alert, alerts
from deploy.observability.generate import PROMETHEUS_RULE, ROOT, RULES, main, rule_files, rule_groups, stale
from deploy.observability.parameters import DAY, HOUR, Parameters
from klein_services.runtime import metrics
from tests.contract.test_documents import registered_metrics
from tests.deploy.tools import tool

TABLE = alerts(Parameters())
NAMES = sorted({alert.name for alert in TABLE})
RUNBOOK = ROOT / "docs" / "runbook.md"
METRIC = re.compile(r"(?<![\w\"/])(?:klein_|klein:|grpc_server_|keda_|kube_)[\w:]+")
REQUESTS = 'klein_request_duration_seconds_count{namespace="klein", model="pico", flow="edit", outcome="%s"}'
IN_TIME = (REQUESTS % "succeeded").replace("_count", "_bucket").replace("}", ', le="5.0"}')
REJECTED = 'klein_request_rejected_total{namespace="klein", stage="%s", reason="%s"}'
STARTED = (
    'grpc_server_started_total{namespace="klein", grpc_service="klein_api.v1.ImageService", '
    'grpc_method="GenerateImage"}'
)
CACHE = 'klein_cache_requests_total{namespace="klein", kind="prompt_embedding", outcome="%s"}'
BUDGET = 'klein_denoise_step_token_budget{namespace="klein", stage="denoiser", instance="a:9465"}'
KEDA = (
    'keda_scaler_detail_errors_total{namespace="keda", exported_namespace="klein", scaledObject="denoiser"}'
)
HPA = (
    'kube_horizontalpodautoscaler_status_condition{namespace="klein", horizontalpodautoscaler="keda-hpa-denoiser", '
    'condition="ScalingActive", status="false"}'
)
REPLICAS = 'kube_deployment_spec_replicas{namespace="klein", deployment="denoiser"}'
ABANDONED = 'klein_abandoned_work_seconds_total{namespace="klein", stage="denoiser"}'
EXPIRY = 'klein_certificate_expiry_timestamp_seconds{namespace="klein", stage="denoiser", kind="server"}'
DEPTH = 'klein_queue_depth{namespace="klein", stage="denoiser"}'


def serving(stage: str) -> str:
    return f'klein_serving{{namespace="klein", stage="{stage}", instance="a:9465"}}'


HEALTHY = {serving(stage): "1x1000" for stage in STAGES}
"""Part of every case unless it replaces them, so that only the alert in question can fire."""


@dataclass(frozen=True)
class Case:
    """Series, in promtool's notation, and the alerts of one name that they raise at a time."""

    alert: str
    series: dict[str, str]
    at: str
    fires: tuple[dict[str, str], ...] = ()
    """Labels of the alerts; empty for a quiet case."""
    value: str = ""
    """Rendered `$value`."""
    interval: str = "1m"
    without: tuple[str, ...] = ()
    """Stages that are not scraped."""
    also: tuple[str, ...] = ()
    """Another alert that fires, which Alertmanager inhibits."""


PICO = {"namespace": "klein", "model": "pico"}
DENOISER = {"namespace": "klein", "stage": "denoiser"}
FIRING = [
    Case(
        "KleinAvailabilityBurnsFast",
        {REQUESTS % "failed": "0+2x120", REQUESTS % "succeeded": "0+20x120", IN_TIME: "0+20x120"},
        "45m",
        ({**PICO, "slo": "availability"},),
        "9.091%",
    ),
    Case(
        "KleinAvailabilityBurnsSlowly",
        {REQUESTS % "failed": "0+1x60", REQUESTS % "succeeded": "0+199x60", IN_TIME: "0+199x60"},
        "26h",
        ({**PICO, "slo": "availability"},),
        "0.5%",
        "30m",
    ),
    Case(
        "KleinLatencyBurnsFast",
        {REQUESTS % "failed": "0x120", REQUESTS % "succeeded": "0+20x120", IN_TIME: "0+10x120"},
        "45m",
        ({**PICO, "slo": "latency"},),
        "50%",
    ),
    Case(
        "KleinLatencyBurnsSlowly",
        {REQUESTS % "failed": "0x60", REQUESTS % "succeeded": "0+100x60", IN_TIME: "0+96x60"},
        "26h",
        ({**PICO, "slo": "latency"},),
        "4%",
        "30m",
    ),
    *(
        Case("KleinStageMissing", {}, "5m", ({"namespace": "klein", "stage": stage},), without=(stage,))
        for stage in STAGES
    ),
    Case("KleinStageMissing", {serving("denoiser"): "1x3 0x9"}, "10m", (DENOISER,)),
    Case("KleinSuiteMissing", {'up{job="denoiser"}': "0x20"}, "10m", ({},), without=STAGES),
    Case(
        "KleinModelNotLoaded",
        {'klein_serving{namespace="klein", stage="denoiser", instance="b:9465"}': "0x40"},
        "20m",
        ({**DENOISER, "instance": "b:9465"},),
    ),
    Case(
        "KleinDeadlineMisses",
        {REQUESTS % "expired": "0+1x40", REQUESTS % "succeeded": "0+9x40", IN_TIME: "0+9x40"},
        "20m",
        (PICO,),
        "10%",
    ),
    Case(
        "KleinLoadRefused",
        {REJECTED % ("orchestrator", "queue_full"): "0+2x40", STARTED: "0+20x40"},
        "20m",
        ({"namespace": "klein"},),
        "10%",
    ),
    Case("KleinQueueGrows", {DEPTH: "0+2x60"}, "40m", (DENOISER,), "80"),
    Case("KleinAbandonedWork", {ABANDONED: "0+15x60"}, "40m", (DENOISER,), "25%"),
    Case(
        "KleinCacheCollapse",
        {CACHE % "hit": "0+50x144 7200x20", CACHE % "miss": "0+50x144 7250+100x20"},
        "25h",
        ({"namespace": "klein", "kind": "prompt_embedding"},),
        "0%",
        "10m",
    ),
    Case("KleinDeviceMemory", {BUDGET: "8192x30 2048x30"}, "40m", ({**DENOISER, "instance": "a:9465"},)),
    Case(
        "KleinDeviceMemory",
        {REJECTED % ("denoiser", "out_of_memory"): "0x30 1x30"},
        "40m",
        ({**DENOISER, "reason": "out_of_memory"},),
    ),
    # promtool's time begins at 0.
    Case(
        "KleinCertificateExpires",
        {EXPIRY: f"{13 * 86400}x40"},
        "20m",
        ({**DENOISER, "kind": "server"},),
        "12d 23h 40m 0s",
    ),
    Case(
        "KleinCertificateExpired",
        {EXPIRY: f"{86400 - 3600}x40"},
        "20m",
        ({**DENOISER, "kind": "server"},),
        "22h 40m 0s",
        also=("KleinCertificateExpires",),
    ),
    Case(
        "KleinScalerBlind",
        {KEDA: "0+1x40"},
        "20m",
        ({"namespace": "keda", "exported_namespace": "klein", "scaledObject": "denoiser"},),
    ),
    Case(
        "KleinScalerBlind",
        {HPA: "1x40"},
        "20m",
        (
            {
                "namespace": "klein",
                "horizontalpodautoscaler": "keda-hpa-denoiser",
                "condition": "ScalingActive",
                "status": "false",
            },
        ),
    ),
    Case(
        "KleinScalingThrash",
        {REPLICAS: "1 3 1 3 1 3 1 3 1 3"},
        "45m",
        ({"namespace": "klein", "deployment": "denoiser"},),
        "9",
        "5m",
    ),
]
QUIET = [
    # One failure where little happens: the ratio is above the limit in both windows, and that is no page.
    Case(
        "KleinAvailabilityBurnsFast",
        {REQUESTS % "failed": "0x50 1x60", REQUESTS % "succeeded": "0+1x60", IN_TIME: "0+1x60"},
        "53m",
    ),
    Case(
        "KleinAvailabilityBurnsSlowly",
        {REQUESTS % "failed": "0+1x60", REQUESTS % "succeeded": "0+2000x60", IN_TIME: "0+2000x60"},
        "26h",
        interval="30m",
    ),
    Case(
        "KleinLatencyBurnsFast",
        {REQUESTS % "failed": "0x120", REQUESTS % "succeeded": "0+20x120", IN_TIME: "0+19x120"},
        "45m",
    ),
    Case(
        "KleinLatencyBurnsSlowly",
        {REQUESTS % "failed": "0x60", REQUESTS % "succeeded": "0+1000x60", IN_TIME: "0+999x60"},
        "26h",
        interval="30m",
    ),
    # A second replica that is gone, and a restart of a minute.
    Case(
        "KleinStageMissing",
        {
            'klein_serving{namespace="klein", stage="denoiser", instance="b:9465"}': "1x3 stale",
            serving("vae-decoder"): "1x3 0 1x20",
        },
        "10m",
    ),
    Case("KleinSuiteMissing", {}, "10m"),
    Case(
        "KleinModelNotLoaded",
        {'klein_serving{namespace="klein", stage="denoiser", instance="b:9465"}': "0x10 1x30"},
        "20m",
    ),
    Case(
        "KleinDeadlineMisses",
        {REQUESTS % "expired": "0+1x40", REQUESTS % "succeeded": "0+99x40", IN_TIME: "0+99x40"},
        "20m",
    ),
    # Mistakes of clients are refusals, too.
    Case(
        "KleinLoadRefused",
        {
            REJECTED % ("orchestrator", "invalid_argument"): "0+9x40",
            REJECTED % ("orchestrator", "queue_full"): "0x10 1x40",
            STARTED: "0+20x40",
        },
        "20m",
    ),
    Case("KleinQueueGrows", {DEPTH: "0+2x20 40-2x30"}, "30m"),
    Case("KleinAbandonedWork", {ABANDONED: "0+3x60"}, "40m"),
    Case(
        "KleinCacheCollapse",
        {CACHE % "hit": "0+50x170", CACHE % "miss": "0+50x144 7250+100x20"},
        "25h",
        interval="10m",
    ),
    Case(
        "KleinDeviceMemory",
        {BUDGET: "8192x30 6144x30", REJECTED % ("denoiser", "out_of_memory"): "1x60"},
        "40m",
    ),
    Case("KleinCertificateExpires", {EXPIRY: f"{15 * 86400}x40"}, "20m"),
    Case("KleinCertificateExpired", {EXPIRY: f"{15 * 86400}x40"}, "20m"),
    Case("KleinScalerBlind", {KEDA: "0 3x40", HPA: "0 1x2 0x40"}, "20m"),
    Case("KleinScalingThrash", {REPLICAS: "1 2 3 4 5 6 5 4 3 2"}, "45m", interval="5m"),
]


def unit_test(case: Case, table: list[Alert]) -> dict[str, object]:
    """Returns a case as promtool reads it: the alerts of its name, no others, and data for every metric it reads."""
    named = [alert for alert in table if alert.name == case.alert]
    healthy = {
        name: values
        for name, values in HEALTHY.items()
        if not any(f'stage="{stage}"' in name for stage in case.without)
    }
    expected = [
        {
            "exp_labels": {**labels, "severity": rule.severity},
            "exp_annotations": rendered(rule, labels, case.value),
        }
        for labels in case.fires
        for rule in named
        if dict(rule.labels).items() <= labels.items()
    ]
    assert len(expected) == len(case.fires), case
    read = sorted({name for alert in named for name in METRIC.findall(alert.condition)})
    counts = {case.alert: len(case.fires)} | dict.fromkeys(case.also, 1)
    firing = [
        {"labels": f'{{alertname="{name}"}}', "value": count} for name, count in counts.items() if count
    ]
    present = [
        {
            "expr": f"count({name}) > bool 0",
            "eval_time": case.at,
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for name in read
        if not case.fires
    ]
    only = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": case.at,
        "exp_samples": firing,
    }
    series = {**healthy, **case.series}
    return {
        "interval": case.interval,
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
        "promql_expr_test": [only, *present],
    }


def rendered(alert: Alert, labels: dict[str, str], value: str) -> dict[str, str]:
    """Returns the annotations with the templates replaced."""
    annotations = alert.rule(Parameters().runbook_base)["annotations"]
    assert isinstance(annotations, dict)
    found = {}
    for name, text in annotations.items():
        text = re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels.get(match[1], ""), text)
        found[name] = re.sub(r"{{ \$value \| humanize\w* }}", lambda _: value, text)
        assert "{{" not in found[name]
    return found


def promtool_test(
    folder: Path, cases: list[Case], rules: str | None = None
) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(rules or rule_files(Parameters())[RULES])
    for index, case in enumerate(cases):
        content = {
            "rule_files": ["rules.yaml"],
            "evaluation_interval": case.interval,
            # In another order, alerts see the recorded rates of one interval ago.
            "group_eval_order": [group["name"] for group in rule_groups(Parameters())],
            "tests": [unit_test(case, TABLE)],
        }
        (folder / f"case{index}.yaml").write_text(yaml.safe_dump(content))
    paths = [str(folder / f"case{index}.yaml") for index in range(len(cases))]
    command = [tool("promtool"), "test", "rules", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_each_alert_fires_and_stays_quiet(tmp_path: Path) -> None:
    result = promtool_test(tmp_path, FIRING + QUIET)
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_has_a_firing_and_a_quiet_case() -> None:
    assert sorted({case.alert for case in FIRING}) == NAMES
    assert sorted({case.alert for case in QUIET}) == NAMES
    assert all(case.fires for case in FIRING)
    assert not any(case.fires for case in QUIET)


def test_a_quiet_case_without_data_fails(tmp_path: Path) -> None:
    empty = Case("KleinAbandonedWork", {}, "40m")
    result = promtool_test(tmp_path, [empty])
    assert result.returncode != 0
    assert "klein_abandoned_work_seconds_total" in result.stdout + result.stderr


@pytest.mark.parametrize("fixed", ["vector(1)", "vector(1) > 2"])
def test_the_cases_notice_conditions_that_always_or_never_hold(tmp_path: Path, fixed: str) -> None:
    content = yaml.safe_load(rule_files(Parameters())[RULES])
    for group in content["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = fixed
    cases = QUIET if fixed == "vector(1)" else FIRING
    result = promtool_test(tmp_path, cases, yaml.safe_dump(content))
    assert result.returncode != 0
    assert sorted(set(re.findall(r"alertname: (\w+), time", result.stdout + result.stderr))) == NAMES


def test_the_files_are_current_and_valid() -> None:
    assert stale(rule_files(Parameters())) == []
    command = [tool("promtool"), "check", "rules", "--lint-fatal", str(ROOT / RULES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    resource = yaml.safe_load((ROOT / PROMETHEUS_RULE).read_text())
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == yaml.safe_load((ROOT / RULES).read_text())


def test_check_names_what_is_not_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert str(RULES) in capsys.readouterr().err
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path), "--latency-seconds", "8"]) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--latency-seconds", "4"], "bucket edge"), (["--availability-objective", "1"], "between 0 and 1")],
)
def test_values_that_make_no_sense_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--check", *arguments])
    assert named in capsys.readouterr().err


def test_every_metric_of_a_rule_is_the_suites_or_a_named_other_programs() -> None:
    own = set(registered_metrics()) | {
        f"{name}{end}" for name in registered_metrics() for end in ("_count", "_bucket")
    }
    recorded = {
        rule["record"]
        for group in yaml.safe_load((ROOT / RULES).read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    used = {
        name
        for group in yaml.safe_load((ROOT / RULES).read_text())["groups"]
        for rule in group["rules"]
        for name in METRIC.findall(rule["expr"])
    }
    assert len(used) > 20
    assert used - recorded - own == set(EXTERNAL_METRICS)
    assert recorded <= used


def test_thresholds_are_bucket_edges() -> None:
    text = (ROOT / RULES).read_text()
    edges = {float(edge) for edge in re.findall(r'le="([\d.]+)"', text)}
    assert edges
    assert edges <= set(map(float, metrics.REQUEST_BUCKETS))


def test_every_alert_has_a_section_in_the_runbook() -> None:
    sections = dict(
        re.findall(r"^## (Klein\w+)\n(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL)
    )
    assert sorted(sections) == NAMES
    for name, text in sections.items():
        assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Meaning", "Look", "Act"], name


def test_every_alert_has_a_severity_a_summary_and_a_link() -> None:
    for alert in TABLE:
        rule = alert.rule("https://runbooks.example/klein")
        assert alert.severity in (CRITICAL, WARNING)
        assert alert.summary
        assert alert.description.endswith(".")
        assert f"https://runbooks.example/klein#{alert.name.lower()}" in str(rule)


def test_shortened_rules_are_valid_and_keep_their_order(tmp_path: Path) -> None:
    parameters = Parameters(time_scale=1 / 200, minimum_seconds=4, scope=())
    path = tmp_path / "rules.yaml"
    path.write_text(rule_files(parameters)[RULES])
    command = [tool("promtool"), "check", "rules", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (parameters.window(HOUR), parameters.window(DAY), parameters.wait(DAY)) == ("18s", "432s", "432s")
    assert "namespace" not in yaml.safe_dump(yaml.safe_load(path.read_text())["groups"][0])

"""Rules between the objects of each overlay, and faults that each rule must find."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.deploy.invariants import IMAGES, SETTINGS, STAGES, deployment, problems, process_of, servers
from tests.deploy.manifests import OVERLAYS, Object, named, objects, of_kind
from tests.deploy.tools import ROOT

Fault = Callable[[list[Object]], object]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay: str) -> None:
    assert problems(objects(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_every_process(overlay: str) -> None:
    assert {process_of(pod) for pod in servers(objects(overlay))} == set(SETTINGS)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("ports/0/containerPort", 8081, "has the ports"),
        ("readinessProbe/httpGet/path", "/healthz", "is probed at"),
        ("env/2/value", "dns:///orchestrator:50051", "calls dns:///orchestrator:50051"),
        ("env/3/name", "KLEIN_STATE", "are no settings"),
        ("env/1/value", "3000", "is killed before its drain"),
    ],
)
def test_a_fault_of_the_gateway_is_found(path: str, value: object, sentence: str) -> None:
    found = objects("overlays/tested/http-gateway")
    set_in("Deployment", "gateway", f"{CONTAINER}/{path}", value)(found)
    assert any(sentence in problem for problem in problems(found))


def remove(kind: str, name: str) -> Fault:
    return lambda found: found.remove(named(found, kind, name))


def set_in(kind: str, name: str, path: str, value: object) -> Fault:
    def change(found: list[Object]) -> None:
        inner = named(found, kind, name)
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            inner = inner[key]
        inner[last] = value

    return change


def set_variable(process: str, name: str, value: str) -> Fault:
    return lambda found: deployment(found, process).main["env"].append({"name": name, "value": value})


CONTAINER = "spec/template/spec/containers/0"
QUERY = "spec/triggers/0/metadata"
FAULTS: dict[str, tuple[Fault, str]] = {
    "no budget": (remove("PodDisruptionBudget", "denoiser"), "0 PodDisruptionBudgets"),
    "budget of other Pods": (
        set_in("PodDisruptionBudget", "denoiser", "spec/selector/matchLabels", {"app": "x"}),
        "0 PodDisruptionBudgets",
    ),
    "balanced by the cluster": (set_in("Service", "denoiser", "spec/clusterIP", ""), "1 headless"),
    "no account": (remove("ServiceAccount", "vae-decoder"), "ServiceAccount that is not there"),
    "killed early": (
        set_in("Deployment", "denoiser", "spec/template/spec/terminationGracePeriodSeconds", 120),
        "is killed after 120 s",
    ),
    "jobs longer than the drain": (
        set_variable("orchestrator", "KLEIN_MAXIMUM_REQUEST_SECONDS", "900"),
        "a request may take 900",
    ),
    "failed while it loads": (
        set_in("Deployment", "denoiser", "spec/progressDeadlineSeconds", 60),
        "before its model may have loaded",
    ),
    "another port": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/ports/0/containerPort", 50051),
        "its settings say",
    ),
    "another port by a variable": (set_variable("denoiser", "KLEIN_PORT", "50099"), "its settings say"),
    "probe of another port": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/livenessProbe/grpc/port", 9465),
        "livenessProbe asks port 9465",
    ),
    "Service of another port": (set_in("Service", "denoiser", "spec/ports/0/port", 50051), "has port 50051"),
    "target without a Service": (
        set_variable("orchestrator", "KLEIN_DENOISER_TARGET", "dns:///denoisr:50052"),
        "there is no such Service",
    ),
    "variable twice": (
        set_variable("denoiser", "KLEIN_GRACE_SECONDS", "300"),
        "sets KLEIN_GRACE_SECONDS twice",
    ),
    "no volume": (remove("PersistentVolumeClaim", "models"), "claim models, which is not there"),
    "no key": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/env/2/valueFrom/configMapKeyRef/key", "nme"),
        "ConfigMap without nme",
    ),
    "two autoscalers": (
        lambda found: found.append(
            named(objects("overlays/tested/hpa"), "HorizontalPodAutoscaler", "denoiser")
        ),
        "has 2 autoscalers",
    ),
    "replicas of two masters": (set_in("Deployment", "denoiser", "spec/replicas", 3), "sets replicas"),
    "autoscaler of nothing": (
        set_in("ScaledObject", "denoiser", "spec/scaleTargetRef/name", "denoisr"),
        "which is not there",
    ),
    "no data is 0": (
        set_in("ScaledObject", "denoiser", f"{QUERY}/ignoreNullValues", "true"),
        "no data for 0",
    ),
    "no data is 0 by default": (
        lambda found: named(found, "ScaledObject", "denoiser")["spec"]["triggers"][0]["metadata"].pop(
            "ignoreNullValues"
        ),
        "no data for 0",
    ),
    "no fallback": (
        lambda found: named(found, "ScaledObject", "denoiser")["spec"].pop("fallback"),
        "has no fallback",
    ),
    "query of another stage": (
        set_in("ScaledObject", "denoiser", f"{QUERY}/query", 'sum(x{job="vae-decoder"})'),
        'does not select job="denoiser"',
    ),
    "nothing is scraped": (remove("PodMonitor", "klein-suite"), "without a PodMonitor"),
    "scrape of another port": (
        set_in("PodMonitor", "klein-suite", "spec/podMetricsEndpoints/0/port", "metric"),
        "scrapes the port metric",
    ),
    "open by default": (remove("NetworkPolicy", "default-deny"), "no NetworkPolicy denies"),
    "policy of another port": (
        set_in("NetworkPolicy", "stages", "spec/ingress/0/ports/0/port", 50051),
        "opens {50051}",
    ),
    "way to a port where nothing listens": (
        set_in("NetworkPolicy", "orchestrator", "spec/egress/0/ports/0/port", 50054),
        "where nothing listens",
    ),
    "closed to Prometheus": (remove("NetworkPolicy", "metrics"), "no NetworkPolicy opens {9465}"),
    "no such image": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/image", "klein-stages:0.1.0"),
        "runs klein-stages",
    ),
    "image without torch": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/image", "klein-orchestrator:0.1.0"),
        "not klein-stage",
    ),
    "latest": (set_in("Deployment", "denoiser", f"{CONTAINER}/image", "klein-stage:latest"), "no version"),
    "root": (
        set_in("Deployment", "denoiser", "spec/template/spec/securityContext/runAsUser", 0),
        "may run as root",
    ),
    "writable root": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False),
        "security context",
    ),
    "Service links": (
        lambda found: deployment(found, "denoiser").spec.pop("enableServiceLinks"),
        "may look like settings",
    ),
    "CPU limit": (
        set_in("Deployment", "denoiser", f"{CONTAINER}/resources/limits/cpu", "4"),
        "no CPU limit",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    plant, sentence = FAULTS[name]
    found = objects("overlays/production")
    plant(found)
    sentences = problems(found)
    assert any(sentence in each for each in sentences), sentences


def test_a_scaler_of_another_namespace_is_found() -> None:
    found = objects("overlays/tested/external-scaler")
    metadata = named(found, "ScaledObject", "denoiser")["spec"]["triggers"][0]["metadata"]
    metadata["scalerAddress"] = "orchestrator.other.svc:50050"
    assert any("the orchestrator is" in sentence for sentence in problems(found))


def test_each_stage_is_scaled_by_its_own_backlog() -> None:
    for overlay in ("overlays/production", "overlays/tested/external-scaler"):
        scaled = {each["metadata"]["name"] for each in of_kind(objects(overlay), "ScaledObject")}
        assert set(STAGES) <= scaled


def test_the_images_are_targets_of_the_dockerfile() -> None:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    for image in IMAGES:
        assert re.search(rf"^FROM .+ AS {image.removeprefix('klein-')}$", text, re.MULTILINE)


def test_a_route_without_a_service_is_found() -> None:
    found = objects("overlays/tested/two-models")
    (table,) = of_kind(found, "ConfigMap")
    table["data"]["routing.toml"] = table["data"]["routing.toml"].replace("denoiser-base:", "denoiser-bass:")
    assert any("dns:///denoiser-bass:50052; there is no such Service" in each for each in problems(found))

"""Manifests against the real servers: probes, variables, Jobs, and the metrics that scalers ask for."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from klein_api.externalscaler import external_scaler_service_pb2 as scaler
from klein_api.externalscaler.external_scaler_service_pb2_grpc import ExternalScalerStub
from klein_services.cli.hub.catalog import choose
from tests.deploy.invariants import STAGES, process_of, servers
from tests.deploy.manifests import OVERLAYS, Object, arguments, named, objects, of_kind, pods
from tests.deploy.processes import Disk, Running, base_environment, health, klein, running, variables
from tests.deploy.tools import tool

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Running]]:
    with running(objects("overlays/pico"), tmp_path_factory.mktemp("pico")) as processes:
        yield processes


def smoke_test(processes: dict[str, Running], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command of the smoke-test Job, with a folder as /tmp."""
    found = objects("overlays/pico")
    (job,) = [pod for pod in pods(found, "Job") if pod.name == "smoke-test"]
    target = processes["orchestrator"].address(50050)
    words = [word.replace("dns:///orchestrator:50050", target) for word in arguments(job.main, found)]
    words = [word.replace("/tmp/", f"{folder}/") for word in words]
    return subprocess.run(
        klein(words), env=base_environment(), capture_output=True, text=True, check=False, timeout=300
    )


def test_the_smoke_test_makes_a_picture(pico: dict[str, Running], tmp_path: Path) -> None:
    done = smoke_test(pico, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "smoke-test.png").stat().st_size > 100


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_for_names_that_the_servers_register(overlay: str, pico: dict[str, Running]) -> None:
    for pod in servers(objects(overlay)):
        server = pico[process_of(pod)]
        address = server.address(server.pod.ports["grpc"])
        for kind in PROBES:
            service = pod.main[kind]["grpc"]["service"]
            assert health(address, service) == "SERVING", f"{pod.path}: {kind} asks for {service!r}"


@pytest.mark.parametrize("name", ["klein_api.v1.DenoiseService", "klein_api.v1.denoiserservice", "liveness"])
def test_a_misspelled_probe_is_found(name: str, pico: dict[str, Running]) -> None:
    assert health(pico["denoiser"].address(50052), name) == "NOT_FOUND"


def test_routes_of_the_gateway_are_services_of_the_orchestrator(pico: dict[str, Running]) -> None:
    route = named(objects("overlays/production"), "GRPCRoute", "orchestrator")
    server = pico["orchestrator"]
    for rule in route["spec"]["rules"]:
        for match in rule["matches"]:
            service = match["method"]["service"]
            method = "Check" if service == "grpc.health.v1.Health" else "ListModels"
            with grpc.insecure_channel(server.address(50050)) as channel:
                channel.unary_unary(f"/{service}/{method}")(b"", timeout=30)
        for backend in rule["backendRefs"]:
            assert server.pod.name == backend["name"]
            assert server.pod.ports["grpc"] == backend["port"]


def check_config(pod: Any, found: list[Object], disk: Disk) -> tuple[str, list[str]]:
    """Returns the problems that --check-config reports, and the variables that it does not read."""
    given = variables(pod, found, disk)
    words = [*klein(arguments(pod.main, found)), "--check-config"]
    done = subprocess.run(words, env=base_environment() | given, capture_output=True, text=True, check=False)
    read = {line.split()[0] for line in done.stdout.splitlines() if line}
    return done.stderr, sorted(name for name in given if name.startswith("KLEIN_") and name not in read)


def test_every_variable_is_a_setting_of_its_process(tmp_path: Path) -> None:
    seen = set()
    for overlay in OVERLAYS:
        found = objects(overlay)
        disk = Disk(tmp_path / overlay.replace("/", "-"), found)
        disk.folder.mkdir()
        for pod in servers(found):
            key = json.dumps([pod.main["args"], pod.main["env"]], sort_keys=True)
            if key not in seen:
                seen.add(key)
                assert check_config(pod, found, disk) == ("", []), f"{overlay}: {pod.path}"
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("KLEIN_GRACE_SECOND", "300", "KLEIN_GRACE_SECONDS is one"),
        ("KLEIN_TOKEN_BUDGETS", "1", "KLEIN_TOKEN_BUDGET is one"),
        ("KLEIN_QUEUE_LIMIT", "many", "KLEIN_QUEUE_LIMIT"),
        ("KLEIN_ADAPTERS_FOLDER", "/not/mounted", "KLEIN_ADAPTERS_FOLDER"),
    ],
)
def test_a_bad_variable_is_found(variable: str, value: str, problem: str, tmp_path: Path) -> None:
    found = objects("overlays/pico")
    (pod,) = [pod for pod in servers(found) if pod.name == "denoiser"]
    pod.main["env"].append({"name": variable, "value": value})
    stderr, _ = check_config(pod, found, Disk(tmp_path, found))
    assert problem in stderr


def test_an_unread_variable_is_found(tmp_path: Path) -> None:
    found = objects("overlays/pico")
    (pod,) = [pod for pod in servers(found) if pod.name == "orchestrator"]
    pod.main["env"].append({"name": "KLEIN_THREADS", "value": "2"})
    assert check_config(pod, found, Disk(tmp_path, found)) == ("", ["KLEIN_THREADS"])


def test_the_model_that_is_downloaded_is_a_published_one() -> None:
    found = objects("overlays/production")
    (job,) = [pod for pod in pods(found, "Job") if pod.name == "model-cache"]
    command, model = arguments(job.main, found)
    assert command == "pull"
    assert choose(model).name == model, "stages look for a folder of this name"


def test_stages_wait_until_the_model_is_complete(tmp_path: Path) -> None:
    found = objects("overlays/production")
    (pod,) = [pod for pod in servers(found) if pod.name == "denoiser"]
    (waiting,) = pod.spec["initContainers"]
    words = [word.replace("/models/", f"{tmp_path}/") for word in arguments(waiting, found)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"waiting for {tmp_path}/klein-4b\n"
        assert process.poll() is None
        (tmp_path / "klein-4b").mkdir()
        (tmp_path / "klein-4b" / "klein-pull.json").touch()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def prometheus(pico: dict[str, Running], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Runs Prometheus, which scrapes all processes with the labels that the PodMonitor gives; yields its address."""
    folder = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {
            "job_name": name,
            "static_configs": [
                {
                    "targets": [each.address(each.pod.ports["metrics"])],
                    "labels": {"namespace": "klein", "pod": f"{name}-0"},
                }
            ],
        }
        for name, each in pico.items()
    ]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        tool("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not _scraped(address, len(jobs)):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus did not scrape every process"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _scraped(address: str, count: int) -> bool:
    try:
        result = query(address, "sum(up)")
    except OSError:
        return False
    return bool(result) and float(result[0]["value"][1]) == count


def query(address: str, expression: str) -> list[Any]:
    """Returns the elements of an instant query's result."""
    path = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{path}", timeout=30) as answer:
        found = json.load(answer)
    assert found["data"]["resultType"] == "vector"
    return list(found["data"]["result"])


def queries() -> dict[str, str]:
    """Returns the query of each ScaledObject that asks Prometheus."""
    return {
        each["metadata"]["name"]: trigger["metadata"]["query"]
        for each in of_kind(objects("overlays/production"), "ScaledObject")
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "prometheus"
    }


@pytest.mark.parametrize("stage", STAGES)
def test_the_query_of_a_scaler_has_one_value(stage: str, prometheus: str) -> None:
    (element,) = query(prometheus, queries()[stage])
    assert float(element["value"][1]) >= 0
    assert element["metric"] == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_query_without_data_has_no_value_instead_of_0(stage: str, prometheus: str) -> None:
    expression = queries()[stage]
    for replaced, by in ((f'job="{stage}"', 'job="lost"'), ("klein_backlog_seconds", "klein_backlog_second")):
        assert replaced in expression
        assert query(prometheus, expression.replace(replaced, by)) == []


def test_metrics_of_horizontal_autoscalers_are_scraped(prometheus: str) -> None:
    for each in of_kind(objects("overlays/tested/hpa"), "HorizontalPodAutoscaler"):
        for metric in each["spec"]["metrics"]:
            if metric["type"] == "Pods":
                name = metric["pods"]["metric"]["name"]
                stage = metric["pods"]["metric"]["selector"]["matchLabels"]["stage"]
                assert query(prometheus, f'{name}{{stage="{stage}",job="{stage}"}}')


@pytest.mark.parametrize("stage", STAGES)
def test_the_orchestrator_answers_the_external_scalers(stage: str, pico: dict[str, Running]) -> None:
    scaled = named(objects("overlays/tested/external-scaler"), "ScaledObject", stage)
    (trigger,) = scaled["spec"]["triggers"]
    reference = scaler.ScaledObjectRef(name=stage, namespace="klein", scalerMetadata=trigger["metadata"])
    with grpc.insecure_channel(pico["orchestrator"].address(50050)) as channel:
        stub = ExternalScalerStub(channel)
        (spec,) = stub.GetMetricSpec(reference, timeout=30).metricSpecs
        assert spec.targetSizeFloat == float(trigger["metadata"]["backlogSeconds"])
        request = scaler.GetMetricsRequest(scaledObjectRef=reference, metricName=spec.metricName)
        (value,) = stub.GetMetrics(request, timeout=30).metricValues
    assert value.metricValueFloat >= 0


def test_tls_leaves_the_probes_and_closes_the_rest(tmp_path: Path) -> None:
    with running(objects("overlays/tested/tls"), tmp_path) as processes:
        for each in processes.values():
            service = each.pod.main["readinessProbe"]["grpc"]["service"]
            assert health(each.address(50059), service) == "SERVING"
            assert health(each.address(50059), "") == "SERVING"
            plain = health(each.address(each.pod.ports["grpc"]), "", timeout_seconds=3)
            assert plain in ("UNAVAILABLE", "DEADLINE_EXCEEDED")

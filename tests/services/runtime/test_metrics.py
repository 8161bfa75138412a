"""Metrics: label sets from the start, bounded reasons, and exemplars in OpenMetrics."""

import asyncio
import re
import urllib.request
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from klein_api.v1.image_service_pb2 import ImageSpec
from klein_services.orchestrator.request import flow_of
from klein_services.runtime import metrics, status, tracing
from klein_services.runtime.channels import open_channel
from klein_services.runtime.metrics_server import MetricsServer
from klein_services.runtime.server import running_server
from tests.services.fakes.runtime_toy import call

NO_REFUSALS = {"DEADLINE_PASSED", "RECEIVE_TIMEOUT", "INTERNAL_ERROR"}
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def scrape(accept: str) -> tuple[str, str]:
    server = MetricsServer("127.0.0.1", 0, lambda: True)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": accept}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.headers["Content-Type"], response.read().decode()
    finally:
        server.close()


def test_every_reason_of_a_refusal_has_a_label_from_the_start() -> None:
    source = Path(status.__file__).read_text(encoding="utf-8")
    made = set(re.findall(r'_info\(\s*"(\w+)"', source))
    made |= {getattr(status, name) for name in re.findall(r"_info\(([A-Z_]+)\b", source)}
    assert len(made) > 8
    assert {reason.lower() for reason in made - NO_REFUSALS} <= set(metrics.REASONS)


def test_a_reason_of_another_version_counts_as_other() -> None:
    metrics.count_rejection("labels", "made_by_a_newer_stage")
    samples = {
        sample.labels["reason"]: sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "klein_request_rejected_total" and sample.labels["stage"] == "labels"
    }
    assert samples == {metrics.OTHER_REASON: 1}


def test_a_routed_models_counters_exist_before_its_first_request() -> None:
    metrics.initialize_requests(["labels-model"])
    specs = (
        ImageSpec(),
        ImageSpec(references=[b"a"]),
        ImageSpec(references=[b"a"] * 3),
        ImageSpec(initial_image=b"a"),
    )
    for flow in map(flow_of, specs):
        for outcome in metrics.OUTCOMES:
            labels = {"model": "labels-model", "flow": flow, "outcome": outcome}
            assert REGISTRY.get_sample_value("klein_images_total", labels) == 0
            assert REGISTRY.get_sample_value("klein_request_duration_seconds_count", labels) == 0
    assert len({flow_of(spec) for spec in specs}) == len(metrics.FLOWS)


@pytest.fixture
def traced(monkeypatch):
    """Records spans without exporting them."""
    provider = TracerProvider()
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield
    provider.shutdown()


async def observed_trace_ids(toy) -> tuple[str, str]:
    """Makes a call that computes on the worker; returns its trace id and the page that is scraped afterwards."""

    async def behave(request, context):
        await toy.worker.run(lambda: None, operation="toy")
        yield tracing.trace_id().encode()

    toy.behavior = behave
    async with running_server(toy) as address, open_channel(address) as channel:
        trace_id = (await call(channel, "unary_stream")).decode()
        kind, page = await asyncio.to_thread(scrape, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    return trace_id, page


async def test_openmetrics_links_observations_of_event_loop_and_worker_to_their_trace(toy, traced) -> None:
    trace_id, page = await observed_trace_ids(toy)
    assert len(trace_id) == 32
    linked = {
        sample.name
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"trace_id": trace_id}
    }
    expected = {"klein_queue_wait_seconds", "klein_stage_duration_seconds", "grpc_server_handling_seconds"}
    assert linked == {f"{name}_bucket" for name in expected}
    assert trace_id not in scrape("text/plain")[1]


async def test_without_tracing_nothing_gets_an_exemplar(toy) -> None:
    trace_id, _ = await observed_trace_ids(toy)
    assert trace_id == ""
    assert metrics.exemplar() is None

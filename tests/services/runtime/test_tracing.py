"""Traces of calls: spans of client, server and own blocks, as an OTLP collector gets them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv.attributes import error_attributes, server_attributes

from klein_core.errors import InvalidInput, Violation
from klein_services.runtime import logs, tracing
from klein_services.runtime import semantic_conventions as names
from klein_services.runtime.channels import open_channel
from klein_services.runtime.errors import StageUnavailable
from klein_services.runtime.otlp_endpoint import EndpointError, wanted_endpoint
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.runtime_toy import call, failure, until
from tests.services.fakes.span_collector import export

ROOT = Path(__file__).resolve().parents[3]


def test_names_are_those_of_the_conventions():
    released = {
        value
        for module in (gen_ai_attributes, rpc_attributes, error_attributes, server_attributes)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {
        value
        for name, value in vars(names).items()
        if name.startswith(("GEN_AI_", "RPC_", "ERROR_", "SERVER_")) and isinstance(value, str)
    }
    assert len(ours) == 16
    assert ours <= released
    assert gen_ai_attributes.GenAiOperationNameValues.GENERATE_CONTENT.value == names.GENERATE_CONTENT
    assert gen_ai_attributes.GenAiOutputTypeValues.IMAGE.value == names.OUTPUT_IMAGE
    assert rpc_attributes.RpcSystemNameValues.GRPC.value == names.GRPC
    own = {value for name, value in vars(names).items() if name.startswith("KLEIN_")}
    assert own == {
        "klein.request_id",
        "klein.caller",
        "klein.flow",
        "klein.image.width",
        "klein.image.height",
        "klein.steps",
        "klein.guidance_scale",
        "klein.reference_count",
        "klein.step.first",
        "klein.step.last",
        "klein.step.requests",
        "klein.step.tokens",
        "klein.hop.source",
        "klein.hop.destination",
        "klein.hop.bytes",
        "klein.cache.kind",
        "klein.cache.outcome",
    }


async def test_a_calls_spans_are_one_trace_with_parents(span_collector, toy):
    async def behave(request, context):
        with tracing.span("computing", {"steps": 4}):
            yield tracing.trace_id().encode()

    toy.behavior = behave
    async with running_server(toy) as address, open_channel(address) as channel:
        opened = tracing.client_span("/toy.Toy/unary_stream", f"dns:///{address}")
        metadata = (*opened.headers(), (logs.REQUEST_ID_KEY, "mine"))
        trace_id = (await call(channel, "unary_stream", metadata=metadata)).decode()
        tracing.end_client_span(opened, grpc.StatusCode.OK)
    await export()
    assert {span.trace for span in span_collector.spans} == {trace_id}
    by_kind = {span.kind: span for span in span_collector.spans}
    computing, server, client = (by_kind[kind] for kind in ("INTERNAL", "SERVER", "CLIENT"))
    assert len(span_collector.spans) == 3
    assert computing.name == "computing"
    assert computing.parent == server.id
    assert server.parent == client.id
    assert client.parent == b""
    assert server.name == client.name == "toy.Toy/unary_stream"
    assert server.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "toy.Toy/unary_stream",
        "rpc.response.status_code": "OK",
        "klein.request_id": "mine",
        "klein.caller": "127.0.0.1",
    }
    host, port = address.split(":")
    assert client.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "toy.Toy/unary_stream",
        "rpc.response.status_code": "OK",
        "server.address": host,
        "server.port": int(port),
    }
    assert computing.attributes == {"steps": 4}


@pytest.mark.parametrize(
    ("error", "code", "is_error"),
    [
        (ValueError("a bug"), "INTERNAL", True),
        (StageUnavailable("loading"), "UNAVAILABLE", True),
        (InvalidInput([Violation("prompt", "is bad")]), "INVALID_ARGUMENT", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_servers_span_has_the_code_and_an_error_only_for_faults_of_servers(
    span_collector, toy, error, code, is_error
):
    async def behave(request, context):
        raise error
        yield b""

    toy.behavior = behave
    async with running_server(toy) as address, open_channel(address) as channel:
        await failure(call(channel, "unary_unary"))
    await export()
    (span,) = span_collector.spans
    assert span.attributes["rpc.response.status_code"] == code
    assert span.is_error is is_error
    assert span.attributes.get("error.type") == (code if is_error else None)
    # Messages and tracebacks may repeat what a client sent.
    assert span.events == []
    assert "a bug" not in str(span.raw)


async def test_the_span_of_a_cancelled_stream_ends_as_cancelled(span_collector, toy):
    async def behave(request, context):
        yield b"first"
        await asyncio.sleep(600)

    toy.behavior = behave
    async with running_server(toy) as address, open_channel(address) as channel:
        started = channel.stream_stream("/toy.Toy/stream_stream")()
        assert await started.read() == b"first"
        started.cancel()
        await until(lambda: toy.ended == ["ended"])
    await export()
    (span,) = span_collector.spans
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert not span.is_error


async def test_probes_have_no_spans(span_collector, toy_channel):
    await toy_channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    await export()
    assert span_collector.spans == []


async def test_hostile_trace_headers_begin_a_trace_of_their_own(span_collector, toy_channel):
    for header in ("", "rubbish", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff" * 4000):
        await call(toy_channel, "unary_unary", metadata=(("traceparent", header),))
    await export()
    assert len({span.trace for span in span_collector.spans}) == 4
    assert all(span.parent == b"" for span in span_collector.spans)


async def test_a_trace_that_is_not_sampled_is_not_exported_and_has_no_exemplar(
    span_collector, monkeypatch, toy_channel
):
    tracing.stop()
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing.start(span_collector.endpoint, "sampled", "1", {})
    with tracing.span("dropped"):
        assert tracing.trace_id() != ""
        assert tracing.sampled_trace_id() == ""
    parent = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    await call(toy_channel, "unary_unary", metadata=(("traceparent", parent),))
    await export()
    assert [(span.name, span.trace) for span in span_collector.spans] == [("toy.Toy/unary_unary", "1" * 32)]


async def test_standard_variables_add_headers_and_attributes(span_collector, monkeypatch):
    tracing.stop()
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "renamed")
    tracing.start("", "toy", "1.2", {"OTEL_EXPORTER_OTLP_ENDPOINT": span_collector.endpoint, **_otel()})
    with tracing.span("one"):
        pass
    await export()
    (resource,) = [each.resource for request in span_collector.requests for each in request.resource_spans]
    attributes = {item.key: item.value.string_value for item in resource.attributes}
    assert attributes["deployment.environment.name"] == "test"
    assert attributes["service.name"] == "renamed"
    assert attributes["service.version"] == "1.2"


def _otel() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}


@pytest.mark.parametrize(
    ("setting", "environment", "endpoint"),
    [
        ("", {}, ""),
        ("http://a:1", {}, "http://a:1"),
        ("http://a:1", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1"}, "http://a:1"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1"}, "http://b:1"),
        (
            "",
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c:1",
            },
            "https://c:1",
        ),
        ("http://a:1", {"OTEL_SDK_DISABLED": "true"}, ""),
        ("http://a:1", {"OTEL_TRACES_EXPORTER": "none"}, ""),
        (
            "",
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "",
        ),
    ],
)
def test_the_endpoint_is_the_settings_or_the_standard_variables(setting, environment, endpoint):
    assert wanted_endpoint(setting, environment) == endpoint


@pytest.mark.parametrize("endpoint", ["collector:4317", "4317", "ftp://a:1", "http://", "http://a:port"])
def test_an_endpoint_that_is_no_url_is_refused_by_name(endpoint):
    (problem,) = ServerSettings(otlp_endpoint=endpoint).problems()
    assert problem.startswith(f"KLEIN_OTLP_ENDPOINT is {endpoint!r}")
    with pytest.raises(EndpointError, match=re.escape(problem)):
        tracing.start(endpoint, "toy", "1", {})
    assert not tracing.enabled()


async def test_a_collector_that_does_not_answer_costs_requests_nothing_and_the_end_a_bounded_time(
    toy, free_port, monkeypatch
):
    monkeypatch.setattr(tracing, "EXPORT_SECONDS", 0.2)
    tracing.start(f"http://127.0.0.1:{free_port}", "toy", "1", {})
    async with running_server(toy) as address, open_channel(address) as channel:
        assert await call(channel, "unary_unary") == b"x"
    # Without its bound the exporter retries for longer than a Pod's last seconds.
    async with asyncio.timeout(30):
        await export()
    assert not tracing.enabled()


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.ConsoleFormatter()])
async def test_log_lines_have_the_ids_of_request_trace_and_span(span_collector, formatter):
    record = logging.makeLogRecord({"msg": "hello", "levelname": "INFO", "name": "klein"})
    token = logs.request_id.set("r1")
    try:
        with tracing.span("block"):
            line = formatter.format(record)
            trace, span = tracing.identifiers()
    finally:
        logs.request_id.reset(token)
    await export()
    (recorded,) = span_collector.spans
    assert (recorded.trace, recorded.id.hex()) == (trace, span)
    if isinstance(formatter, logs.JsonFormatter):
        found = json.loads(line)
        assert (found["request_id"], found["trace_id"], found["span_id"]) == ("r1", trace, span)
    else:
        assert f"request_id=r1 trace_id={trace} span_id={span}" in line
    assert "trace_id" not in formatter.format(record), "none outside of a span, and none while tracing is off"


OFF = """
import asyncio, sys
from tests.services.fakes.orchestrator_suite import FakeSuite, generate
from klein_services.runtime import tracing

async def main():
    tracing.start("", "x", "1", {})
    async with FakeSuite().running() as suite:
        await generate(suite, prompt="fox", seed=1)
        assert not any(key == "traceparent" for key in suite.denoiser.metadata[0])

asyncio.run(main())
sys.exit(any(name.startswith("opentelemetry") for name in sys.modules))
"""


def test_while_tracing_is_off_a_request_makes_no_span_and_imports_nothing():
    result = subprocess.run([sys.executable, "-c", OFF], cwd=ROOT, env=_environment(), check=False)
    assert result.returncode == 0


def test_the_runtime_does_not_import_torch():
    modules = "server channels frames worker stage admission status"
    imports = ", ".join(f"klein_services.runtime.{module}" for module in modules.split())
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def _environment() -> dict[str, str]:
    paths = [str(ROOT / folder) for folder in ("", "protos", "services")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

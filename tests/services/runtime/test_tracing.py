"""Traces: client, server and own spans of one request, as an OTLP collector gets them."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from klein_services.runtime import tracing
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from tests.services.fakes.runtime_toy import call, failure, until


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans = []

    async def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector():
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tracing.start(f"http://127.0.0.1:{port}", "toy", "1")
    yield collector
    tracing.stop()
    await server.stop(None)


async def test_a_calls_spans_are_one_trace_with_parents(collector, toy):
    async def behave(request, context):
        if request == b"bad":
            raise ValueError("a bug")
        with tracing.span("computing", steps=4):
            yield tracing.trace_id().encode()

    toy.behavior = behave
    async with running_server(toy) as address, open_channel(address) as channel:
        trace_id = (await call(channel, "unary_stream")).decode()
        await failure(call(channel, "unary_unary", b"bad"))
    await asyncio.to_thread(tracing.stop)
    spans = {span.name: span for span in collector.spans if span.trace_id.hex() == trace_id}
    server_span = next(span for span in spans.values() if span.kind == span.SPAN_KIND_SERVER)
    client_span = next(
        span
        for span in collector.spans
        if span.kind == span.SPAN_KIND_CLIENT and span.trace_id.hex() == trace_id
    )
    assert server_span.parent_span_id == client_span.span_id
    assert spans["computing"].parent_span_id == server_span.span_id
    attributes = {item.key: item.value for item in server_span.attributes}
    assert attributes["rpc.method"].string_value == "unary_stream"
    assert attributes["rpc.grpc.status_code"].int_value == 0
    codes = [
        item.value.int_value
        for span in collector.spans
        for item in span.attributes
        if span.kind == span.SPAN_KIND_SERVER and item.key == "rpc.grpc.status_code"
    ]
    assert grpc.StatusCode.INTERNAL.value[0] in codes


async def test_a_call_that_writes_its_requests_is_traced_too(collector, toy):
    async with running_server(toy) as address, open_channel(address) as channel:
        started = channel.stream_stream("/toy.Toy/stream_stream")()
        await started.write(b"one")
        await started.write(b"two")
        await started.done_writing()
        assert [part async for part in started] == [b"one", b"two"]
        assert await started.code() is grpc.StatusCode.OK
        cancelled = channel.stream_stream("/toy.Toy/stream_stream")()
        await cancelled.write(b"one")
        cancelled.cancel()
        await until(lambda: toy.ended == ["ended", "ended"])
    await asyncio.to_thread(tracing.stop)
    kinds = [span.kind for span in collector.spans if span.name.endswith("stream_stream")]
    assert kinds.count(2) >= 2, "both calls have the server's span"
    assert kinds.count(3) >= 1, "a call that ends has the client's span"


def test_tracing_that_is_off_imports_nothing():
    script = (
        "import sys, klein_services.runtime.server as s; s.tracing.start('', 'x', '1'); "
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


def test_the_runtime_does_not_import_torch():
    modules = "server channels frames worker stage admission status"
    imports = ", ".join(f"klein_services.runtime.{module}" for module in modules.split())
    script = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0

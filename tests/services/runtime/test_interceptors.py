"""Contexts around every call: request ids, metrics, access log, cancellation, load reports, and their order."""

import asyncio
import json
import logging
import re
import struct
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc
from klein_services.runtime.channels import open_channel
from klein_services.runtime.interceptors import CallInterceptor
from klein_services.runtime.logs import ConsoleFormatter, JsonFormatter, request_id
from klein_services.runtime.orca import LoadReport
from tests.services.fakes.runtime_toy import SHAPES, Toy, call, failure, until

KINDS = dict(zip(SHAPES, ("unary", "server_stream", "client_stream", "bidi_stream"), strict=True))


def handled(shape, code):
    labels = {
        "grpc_type": KINDS[shape],
        "grpc_service": "toy.Toy",
        "grpc_method": shape,
        "grpc_code": code,
    }
    return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0


def access_records(caplog):
    return [record for record in caplog.records if record.name == "klein.access"]


@pytest.mark.parametrize("shape", SHAPES)
async def test_answers_pass_unchanged_and_are_counted(toy_channel, shape):
    before = handled(shape, "OK")
    assert await call(toy_channel, shape, b"hello") == b"hello"
    await until(lambda: handled(shape, "OK") == before + 1)


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_callers_request_id_is_kept_and_answered(toy, toy_channel, shape):
    seen = []

    async def behave(request, context):
        seen.append(request_id.get())
        yield b"x"

    toy.behavior = behave
    multicallable = getattr(toy_channel, shape)(f"/toy.Toy/{shape}")
    argument = iter([b"x"]) if shape.startswith("stream") else b"x"
    started = multicallable(argument, metadata=(("x-request-id", "mine"),))
    if shape.endswith("stream"):
        assert [part async for part in started] == [b"x"]
    trailing = await started.trailing_metadata()
    assert seen == ["mine"]
    assert trailing["x-request-id"] == "mine"


async def test_a_failed_call_tells_its_request_id_too(toy, toy_channel):
    async def behave(request, context):
        raise ValueError
        yield b""

    toy.behavior = behave
    error = await failure(call(toy_channel, "unary_unary", metadata=(("x-request-id", "mine"),)))
    assert error.trailing_metadata()["x-request-id"] == "mine"


@pytest.mark.parametrize("given", [(), (("x-request-id", ""),), (("x-request-id", "x" * 129),)])
async def test_a_request_without_a_decent_id_gets_one(toy_channel, given):
    started = toy_channel.unary_unary("/toy.Toy/unary_unary")(b"x", metadata=given)
    first = (await started.trailing_metadata())["x-request-id"]
    again = toy_channel.unary_unary("/toy.Toy/unary_unary")(b"x", metadata=given)
    assert len(first) == 32
    assert (await again.trailing_metadata())["x-request-id"] != first


@pytest.mark.parametrize("shape", ["unary_unary", "unary_stream", "stream_stream"])
async def test_a_client_that_goes_cancels_the_handler_and_is_counted_apart(toy, toy_channel, shape):
    begun = asyncio.Event()

    async def behave(request, context):
        begun.set()
        await asyncio.sleep(60)
        yield b""

    toy.behavior = behave
    before = handled(shape, "CANCELLED")
    running = asyncio.create_task(call(toy_channel, shape))
    await begun.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await until(lambda: handled(shape, "CANCELLED") == before + 1)
    assert toy.ended == ["ended"]


async def test_a_client_that_goes_while_it_is_sent_to_cancels_the_handler_at_once(toy, toy_channel):
    async def behave(request, context):
        while True:
            yield b"x" * 100_000

    toy.behavior = behave
    before = handled("unary_stream", "CANCELLED")
    started = toy_channel.unary_stream("/toy.Toy/unary_stream")(b"x")
    await started.read()
    started.cancel()
    await until(lambda: toy.ended == ["ended"])
    await until(lambda: handled("unary_stream", "CANCELLED") == before + 1)


async def test_clients_that_go_while_they_are_sent_to_are_no_faults_of_ours(toy, toy_address, caplog):
    async def behave(request, context):
        while True:
            yield b"x" * 1_000_000

    toy.behavior = behave
    before = handled("unary_stream", "CANCELLED")
    for index in range(20):
        async with open_channel(toy_address) as channel:
            started = channel.unary_stream("/toy.Toy/unary_stream")(b"x")
            await started.read()
            await asyncio.sleep(0.003 * (index % 5))
    await until(lambda: handled("unary_stream", "CANCELLED") == before + 20)
    assert "internal error" not in caplog.text


async def test_a_call_whose_deadline_passes_is_counted_as_that(toy, toy_channel):
    async def behave(request, context):
        await asyncio.sleep(60)
        yield b""

    toy.behavior = behave
    before = handled("unary_unary", "DEADLINE_EXCEEDED")
    error = await failure(call(toy_channel, "unary_unary", timeout=0.1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: handled("unary_unary", "DEADLINE_EXCEEDED") == before + 1)


async def test_each_call_is_one_line_of_the_access_log_and_probes_are_none(toy_channel, caplog):
    caplog.set_level(logging.INFO)
    await call(toy_channel, "unary_stream")
    await health_pb2_grpc.HealthStub(toy_channel).Check(health_pb2.HealthCheckRequest())
    stage = stage_service_pb2_grpc.StageServiceStub(toy_channel)
    await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())
    await until(lambda: access_records(caplog))
    (record,) = access_records(caplog)
    assert (record.method, record.code) == ("toy.Toy/unary_stream", "OK")
    assert record.seconds < 5
    assert "127.0.0.1" in record.peer


async def test_contexts_are_entered_in_order_and_left_in_reverse():
    events = []

    def recording(name):
        @asynccontextmanager
        async def record(call):
            events.append(f"enter {name} {call.method.name}")
            try:
                yield
            finally:
                events.append(f"leave {name}")

        return record

    toy = Toy()
    server = grpc.aio.server(interceptors=[CallInterceptor([recording("outer"), recording("inner")])])
    toy.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            for shape in SHAPES * 2:
                events.clear()
                assert await call(channel, shape, b"hello") == b"hello"
                await until(lambda: len(events) == 4)
                entered = [f"enter outer {shape}", f"enter inner {shape}"]
                assert events == [*entered, "leave inner", "leave outer"]
    finally:
        await server.stop(0)
        await toy.close()


async def test_an_unknown_method_is_unimplemented(toy_channel):
    error = await failure(toy_channel.unary_unary("/toy.Toy/Nothing")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_json_lines_hold_the_message_the_request_and_the_extra_fields():
    token = request_id.set("r1")
    record = logging.LogRecord("klein.x", logging.INFO, "", 1, "said %s", ("é",), None)
    record.port = 5
    line = JsonFormatter().format(record)
    readable = ConsoleFormatter().format(record)
    request_id.reset(token)
    parsed = json.loads(line)
    assert "\n" not in line
    expected = {"level": "info", "logger": "klein.x", "message": "said é", "request_id": "r1", "port": 5}
    assert expected.items() <= parsed.items()
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO ", readable)
    assert readable.endswith("said é request_id=r1 port=5")


def test_a_console_line_outside_of_requests_has_no_request_id():
    record = logging.LogRecord("klein.x", logging.INFO, "", 1, "said", (), None)
    assert ConsoleFormatter().format(record).endswith("said")


def test_a_load_report_is_the_orca_message():
    key, payload = LoadReport(lambda: 0.75).trailer()
    assert key == "endpoint-load-metrics-bin"
    assert payload[0] == (6 << 3 | 1)
    assert payload[9] == (9 << 3 | 1)
    assert struct.unpack("<d", payload[10:18]) == (0.75,)


def test_an_idle_server_still_reports_some_load_and_calls_raise_its_rate():
    report = LoadReport(lambda: 0.0)
    idle = report.trailer()[1]
    for _ in range(10):
        report.count()
    busy = report.trailer()[1]
    assert struct.unpack("<d", idle[10:18])[0] > 0
    assert struct.unpack("<d", busy[1:9])[0] > struct.unpack("<d", idle[1:9])[0]

"""A server's life inside this process: loading, serving, draining, standard services."""

import asyncio
import hashlib
import threading
import time

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc
from klein_core.errors import CheckpointError
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import Server, running_server, serve
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.status import explain
from tests.services.fakes.runtime_toy import ENCODE_PROMPT, TEXT_ENCODER, Toy, call, failure, until

Status = health_pb2.HealthCheckResponse


async def health(channel, service):
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def is_not_serving(channel):
    return await health(channel, TEXT_ENCODER) == Status.NOT_SERVING


async def describe(channel):
    stub = stage_service_pb2_grpc.StageServiceStub(channel)
    return await stub.DescribeStage(stage_service_pb2.DescribeStageRequest())


async def encode(channel):
    return [part async for part in channel.unary_stream(ENCODE_PROMPT)(b"")]


@pytest.fixture
async def server(toy):
    settings = ServerSettings(host="127.0.0.1", metrics_port=0, drain_delay_seconds=0.3, grace_seconds=5)
    made = Server(settings, toy)
    yield made
    await made.abandon()
    await toy.close()


@pytest.fixture
async def channel(server):
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


async def test_a_loading_server_is_alive_not_ready_and_describes_itself(server, toy, channel):
    toy.may_load.clear()
    loading = asyncio.create_task(server.load())
    await asyncio.sleep(0)
    assert await health(channel, "") == Status.SERVING
    assert await health(channel, TEXT_ENCODER) == Status.NOT_SERVING
    description = await describe(channel)
    assert (description.stage, description.model, description.serving) == ("text-encoder", "toy", False)
    assert not description.WhichOneof("facts")
    assert description.load.queue_limit == 2
    details = explain(await failure(encode(channel)))
    assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE")
    assert "loading" in details.message
    toy.may_load.set()
    await loading
    assert await health(channel, TEXT_ENCODER) == Status.SERVING
    assert len(await encode(channel)) == 1
    description = await describe(channel)
    assert description.serving
    assert description.text_encoder.sequence_length == 7


async def test_an_unknown_health_name_is_not_found(toy_channel):
    error = await failure(health(toy_channel, "klein_api.v1.Nothing"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_health_answers_while_the_worker_computes(toy, toy_channel):
    block, may_end = bytes(1 << 20), threading.Event()

    def compute():
        end = time.monotonic() + 30.0
        while not may_end.is_set() and time.monotonic() < end:
            hashlib.sha256(block)

    async def behave(request, context):
        await toy.worker.run(compute)
        yield b"x"

    toy.behavior = behave
    running = asyncio.create_task(call(toy_channel, "unary_unary"))
    await until(lambda: toy.worker.running_count == 1)
    # The work ends only after the answers; on the event loop it would keep them from coming until the timeout.
    try:
        async with asyncio.timeout(20):
            for _ in range(4):
                assert await health(toy_channel, "") == Status.SERVING
        assert not running.done()
    finally:
        may_end.set()
    assert await running == b"x"


async def test_a_drain_serves_until_callers_know_then_finishes_what_runs(server, toy, channel):
    await server.load()
    may_end = asyncio.Event()

    async def slow(request, context):
        await may_end.wait()
        yield b"late"

    toy.behavior = slow
    running = asyncio.create_task(call(channel, "unary_unary"))
    await until(lambda: toy.calls)
    draining = asyncio.create_task(server.drain())
    await until(lambda: is_not_serving(channel))
    assert not (await describe(channel)).serving
    during_delay = asyncio.create_task(call(channel, "unary_stream"))
    await asyncio.sleep(0.5)
    late = await failure(call(channel, "unary_unary"))
    assert late.code() is grpc.StatusCode.UNAVAILABLE
    may_end.set()
    assert await running == b"late"
    assert await during_delay == b"late"
    await draining


async def test_an_ipv6_host_needs_no_brackets(toy):
    server = Server(ServerSettings(host="::1", metrics_port=0), toy)
    try:
        await server.start()
        async with open_channel(f"[::1]:{server.port}") as channel:
            assert await health(channel, "") == Status.SERVING
    finally:
        await server.abandon()
        await toy.close()


async def test_calls_that_outlive_the_grace_are_cancelled(toy):
    async def endless(request, context):
        await asyncio.sleep(60)
        yield b""

    toy.behavior = endless
    settings = ServerSettings(host="127.0.0.1", drain_delay_seconds=0, grace_seconds=0.2, metrics_port=0)
    async with running_server(toy, settings) as address, open_channel(address) as channel:
        running = asyncio.create_task(call(channel, "unary_unary"))
        await until(lambda: toy.calls)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await running
    assert toy.ended == ["ended"]


async def test_an_old_connection_takes_no_new_calls_and_lets_running_ones_end(toy):
    may_end = asyncio.Event()

    async def tell_connection(request, context):
        if request == b"slow":
            await may_end.wait()
        yield context.peer().encode()

    toy.behavior = tell_connection
    settings = ServerSettings(drain_delay_seconds=0, metrics_port=0, max_connection_age_seconds=0.5)
    async with running_server(toy, settings) as address, open_channel(address) as channel:
        running = asyncio.create_task(call(channel, "unary_unary", b"slow"))
        await until(lambda: toy.calls == 1)
        first = await call(channel, "unary_unary")

        async def is_on_another():
            return await call(channel, "unary_unary") != first

        await until(is_on_another)
        may_end.set()
        assert await running == first


async def test_reflection_lists_every_service(toy_channel):
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    started = reflection_pb2_grpc.ServerReflectionStub(toy_channel).ServerReflectionInfo(iter([request]))
    response = await started.read()
    started.cancel()
    names = {service.name for service in response.list_services_response.service}
    assert {TEXT_ENCODER, "klein_api.v1.StageService", "grpc.health.v1.Health"} <= names


async def test_reflection_knows_the_types_of_status_details(toy_channel):
    for name in ("BadRequest", "ErrorInfo", "RetryInfo"):
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"google.rpc.{name}")
        started = reflection_pb2_grpc.ServerReflectionStub(toy_channel).ServerReflectionInfo(iter([request]))
        response = await started.read()
        started.cancel()
        files = map(FileDescriptorProto.FromString, response.file_descriptor_response.file_descriptor_proto)
        assert name in {message.name for file in files for message in file.message_type}


async def test_channelz_answers(toy_channel):
    stub = channelz_pb2_grpc.ChannelzStub(toy_channel)
    assert (await stub.GetServers(channelz_pb2.GetServersRequest())).server


async def test_counters_exist_before_the_first_call(toy_channel):
    labels = {
        "grpc_type": "server_stream",
        "grpc_service": TEXT_ENCODER,
        "grpc_method": "EncodePrompt",
        "grpc_code": "RESOURCE_EXHAUSTED",
    }
    # Other tests' servers share the registry, so a count may already be above 0.
    assert REGISTRY.get_sample_value("grpc_server_handled_total", labels) is not None
    for name in ("klein_abandoned_work_seconds_total", "klein_queue_depth", "klein_deadline_missed_total"):
        assert REGISTRY.get_sample_value(name, {"stage": "text-encoder"}) is not None
    labels = {"stage": "text-encoder", "operation": "toy"}
    assert REGISTRY.get_sample_value("klein_stage_duration_seconds_count", labels) is not None


async def test_a_load_that_fails_says_why_and_ends_with_1(free_port, caplog):
    toy = Toy()
    toy.load_error = CheckpointError("the folder /models has no text_encoder")
    settings = ServerSettings(host="127.0.0.1", port=free_port, metrics_port=0)
    assert await serve(settings, toy) == 1
    assert "the folder /models has no text_encoder" in caplog.messages


async def test_a_fault_while_loading_ends_with_1_and_its_traceback_is_logged(free_port, caplog):
    toy = Toy()
    toy.load_error = ZeroDivisionError("a bug")
    assert await serve(ServerSettings(host="127.0.0.1", port=free_port, metrics_port=0), toy) == 1
    assert "ZeroDivisionError: a bug" in caplog.text


async def test_nothing_is_left_running(toy):
    before = asyncio.all_tasks()
    async with running_server(toy) as address, open_channel(address) as channel:
        await call(channel, "stream_stream")
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == before

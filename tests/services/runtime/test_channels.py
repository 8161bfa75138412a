"""Channels: what is retried, how calls spread over replicas, and which replicas get none."""

import json
from collections import Counter
from contextlib import AsyncExitStack

import grpc
import pytest
from google.protobuf import descriptor_pool

from klein_api.v1 import (  # noqa: F401
    content_policy_service_pb2,
    denoiser_service_pb2,
    image_service_pb2,
    vae_decoder_service_pb2,
)
from klein_core.errors import InvalidInput
from klein_services.runtime.channels import open_channel, service_config
from klein_services.runtime.errors import StageUnavailable
from klein_services.runtime.server import Server, running_server
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.runtime_toy import ENCODE_PROMPT, TEXT_ENCODER, Toy, call, failure


def failing_first(toy, count, error):
    async def behave(request, context):
        if toy.calls <= count:
            raise error
        yield b"x"

    return behave


async def encode(channel):
    return [part async for part in channel.unary_stream(ENCODE_PROMPT)(b"")]


def test_the_service_config_names_real_services_and_retries_only_unavailable():
    config = json.loads(service_config())
    for method in config["methodConfig"]:
        assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
        for name in method["name"]:
            descriptor_pool.Default().FindServiceByName(name["service"])
    assert "healthCheckConfig" not in config
    assert json.loads(service_config(TEXT_ENCODER))["healthCheckConfig"] == {"serviceName": TEXT_ENCODER}


async def test_unavailable_is_retried(toy, toy_channel):
    toy.behavior = failing_first(toy, 2, StageUnavailable("for a moment"))
    assert len(await encode(toy_channel)) == 1
    assert toy.calls == 3


@pytest.mark.parametrize("error", [InvalidInput.of("prompt", "is bad"), ValueError("a fault")])
async def test_nothing_else_is_retried(toy, toy_channel, error):
    toy.behavior = failing_first(toy, 2, error)
    await failure(encode(toy_channel))
    assert toy.calls == 1


async def test_a_call_that_has_answered_is_never_run_again(toy, toy_channel):
    async def behave(request, context):
        yield b"x"
        raise StageUnavailable("in the middle")

    toy.behavior = behave
    error = await failure(encode(toy_channel))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert toy.calls == 1


async def test_calls_spread_over_replicas():
    toys = [Toy(), Toy()]
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(running_server(toy)) for toy in toys]
        channel = await stack.enter_async_context(open_channel(f"ipv4:{','.join(addresses)}"))
        for _ in range(40):
            await encode(channel)
    calls = Counter({index: toy.calls for index, toy in enumerate(toys)})
    assert calls.total() == 40
    assert min(calls.values()) >= 10


async def test_a_replica_that_is_not_ready_gets_no_calls():
    loading, serving = Toy(), Toy()
    server = Server(ServerSettings(host="127.0.0.1", metrics_port=0), loading)
    async with AsyncExitStack() as stack:
        await server.start()
        stack.push_async_callback(server.abandon)
        stack.push_async_callback(loading.close)
        address = await stack.enter_async_context(running_server(serving))
        target = f"ipv4:127.0.0.1:{server.port},{address}"
        channel = await stack.enter_async_context(open_channel(target, health_service=TEXT_ENCODER))
        for _ in range(10):
            await encode(channel)
    assert (loading.calls, serving.calls) == (0, 10)


async def test_a_message_over_the_limit_is_refused(toy, toy_address):
    async with open_channel(toy_address, message_bytes=1000) as channel:
        error = await failure(channel.unary_unary("/toy.Toy/unary_unary")(b"x" * 2000))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert toy.calls == 0


async def test_a_proxy_for_other_programs_is_not_used(toy_address, monkeypatch):
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with open_channel(toy_address) as channel:
        assert await call(channel, "unary_unary", timeout=10) == b"x"

"""Requests whose bytes are no message: one documented status, counted, one log line a minute."""

import asyncio
import logging

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2_grpc
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2 import GenerateImageRequest, ImageSpec
from klein_core.errors import Violation
from klein_services.runtime import interceptors, logs
from klein_services.runtime.channels import open_channel
from klein_services.runtime.status import explain
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import ENCODE_PROMPT, failure, until

IMAGES = "klein_api.v1.ImageService"
BROKEN = {
    "cut off": b"\x0a\x7f",
    "no field": b"\xff\xff\xff",
    "text that is not UTF-8": GenerateImageRequest(spec=ImageSpec(prompt="abcd"))
    .SerializeToString()
    .replace(b"abcd", b"\xff\xfe\xfd\xfc"),
    "groups without end": b"\x0b" * 200,
}


def rejected(stage):
    labels = {"stage": stage, "reason": "undecodable_message"}
    return REGISTRY.get_sample_value("klein_request_rejected_total", labels) or 0.0


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


@pytest.fixture
def fresh_warning(monkeypatch):
    warning = logs.RareWarning(logging.getLogger("klein.access"), "refused")
    monkeypatch.setattr(interceptors, "_undecodable", warning)


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("method", ["GenerateImage", "StreamGenerateImage", "ListModels"])
async def test_a_request_that_is_no_message_is_refused_as_documented(suite, method, raw):
    before = rejected("orchestrator")
    path = f"/{IMAGES}/{method}"
    if method == "StreamGenerateImage":
        error = await failure(anext(aiter(suite.channel.unary_stream(path)(raw))))
    elif method == "ListModels" and raw == BROKEN["text that is not UTF-8"]:
        # It has no field of text, so these bytes are an unknown field to it.
        await suite.channel.unary_unary(path)(raw)
        return
    else:
        error = await failure(suite.channel.unary_unary(path)(raw))
    details = explain(error)
    name = f"klein_api.v1.{method}Request"
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.reason == "UNDECODABLE_MESSAGE"
    assert details.violations == (
        Violation("request", f"cannot be decoded as {name}: broken protobuf or text, or another type"),
    )
    assert rejected("orchestrator") == before + 1


async def test_a_stream_of_requests_is_refused_at_its_first_broken_message(suite):
    before = rejected("denoiser")
    async with open_channel(suite.targets["denoiser"]) as channel:
        call = channel.stream_stream("/klein_api.v1.DenoiserService/DenoiseLatents")
        error = await failure(anext(aiter(call(iter([b"\xff\xff\xff"])))))
    assert explain(error).reason == "UNDECODABLE_MESSAGE"
    assert rejected("denoiser") == before + 1


async def test_reflection_answers_broken_bytes_without_an_internal_error(suite, caplog):
    stub = reflection_pb2_grpc.ServerReflectionStub(suite.channel)
    path = stub.ServerReflectionInfo._method.decode()
    error = await failure(anext(aiter(suite.channel.stream_stream(path)(iter([b"\xff\xff\xff"])))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "internal error" not in caplog.text


async def test_a_flood_of_them_is_one_line_of_the_log(toy_channel, caplog, fresh_warning):
    caplog.set_level(logging.INFO)
    await asyncio.gather(
        *(failure(toy_channel.unary_stream(ENCODE_PROMPT)(b"\xff").read()) for _ in range(50))
    )
    await until(lambda: any(record.name == "klein.access" for record in caplog.records))
    lines = [record for record in caplog.records if record.name == "klein.access"]
    assert [(record.levelname, record.method) for record in lines] == [
        ("WARNING", "klein_api.v1.TextEncoderService/EncodePrompt")
    ]
    assert "127.0.0.1" in lines[0].peer
    assert not [record for record in caplog.records if record.exc_info]


def test_a_rare_warning_counts_what_it_did_not_log(caplog, monkeypatch):
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    warning = logs.RareWarning(logging.getLogger("klein.test"), "refused")
    for _ in range(5):
        warning.occurred(peer="a")
    now += logs.RARE_WARNING_SECONDS
    warning.occurred(peer="b")
    assert [(record.getMessage(), record.count, record.peer) for record in caplog.records] == [
        ("refused", 1, "a"),
        ("refused", 5, "b"),
    ]

"""What happens to requests whose stages are slow and whose callers are slow or go away."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_core.errors import InvalidInput
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import (
    FakeSuite,
    drained,
    generate,
    nothing_left_running,
    parts_running,
    refusal,
)
from tests.services.fakes.runtime_toy import failure, until

REFERENCES = (reference_file(64, 64, "a"), reference_file(64, 64, "b"))
BIG_TOKENS = 98304
"""Tokens of a prompt embedding of three frames."""


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


def counted_images(outcome, flow="multi-reference") -> float:
    labels = {"model": "fake", "flow": flow, "outcome": outcome}
    return REGISTRY.get_sample_value("klein_images_total", labels) or 0.0


async def test_the_denoiser_receives_frames_while_the_encoder_still_sends(suite):
    suite.text_encoder.tokens = BIG_TOKENS
    suite.text_encoder.last_frame_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    async with asyncio.timeout(5):
        await suite.denoiser.first_frame.wait()
    assert suite.text_encoder.finished == 0
    suite.text_encoder.last_frame_gate.set()
    assert (await request).images[0].data == suite.expected_image("fox", 1)


async def test_the_denoiser_is_called_before_anything_is_encoded(suite):
    suite.text_encoder.delay_seconds = 0.3
    request = asyncio.create_task(generate(suite, seed=1))
    async with asyncio.timeout(5):
        await suite.denoiser.started.wait()
    assert suite.text_encoder.frames_sent == 0
    await request


async def test_a_stage_that_never_ends_its_tensor_is_cut_off(suite):
    suite.text_encoder.endless = True
    details = await refusal(suite, prompt="fox")
    assert details.code is grpc.StatusCode.INTERNAL
    await until(lambda: suite.text_encoder.cancelled == 1)
    assert suite.orchestrator.generation.cache.size_bytes == 0


async def test_what_the_denoiser_refuses_is_not_kept(suite):
    suite.denoiser.error = InvalidInput.of("prompt_embedding", "holds NaN or infinity")
    details = await refusal(suite, prompt="fox", seed=1)
    assert details.code is grpc.StatusCode.INTERNAL
    assert details.reason == "INTERNAL_ERROR"
    assert "NaN" not in details.message
    suite.denoiser.error = None
    await generate(suite, prompt="fox", seed=1)
    assert suite.text_encoder.prompts == ["fox", "fox"]


PARTS_RUNNING = {
    "encoding": {"Generation", "Conditioning"},
    "denoising": {"Generation"},
    "decoding": {"Generation", "Flow"},
}


@pytest.mark.parametrize("where", PARTS_RUNNING)
async def test_a_caller_that_goes_away_ends_the_work_of_every_stage(suite, where):
    before, failed = counted_images("cancelled"), counted_images("failed")
    if where == "encoding":
        suite.text_encoder.delay_seconds = suite.vae_decoder.delay_seconds = 30
    elif where == "denoising":
        suite.denoiser.step_gate = asyncio.Event()
    else:
        suite.vae_decoder.decode_gate = asyncio.Event()
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(references=REFERENCES, width_px=64, height_px=64))
    )
    stages = {
        "encoding": (suite.text_encoder, suite.vae_decoder, suite.denoiser),
        "denoising": (suite.denoiser,),
        "decoding": (suite.vae_decoder,),
    }[where]
    reader = asyncio.create_task(drained(call))
    if where == "decoding":
        await until(lambda: suite.vae_decoder.decode_specs)
    elif where == "denoising":
        await until(lambda: suite.vae_decoder.finished == 2 and suite.denoiser.first_frame.is_set())
    else:
        await until(lambda: all(stage.started.is_set() for stage in stages))
    # Or that nothing is left would say nothing.
    assert parts_running() >= PARTS_RUNNING[where]
    call.cancel()
    await asyncio.wait([reader])
    await until(lambda: all(stage.cancelled for stage in stages))
    await nothing_left_running()
    # The handler counts when its tasks have ended.
    await until(lambda: counted_images("cancelled") == before + 1)
    assert counted_images("failed") == failed


async def test_a_deadline_ends_the_work_of_every_stage(suite):
    suite.denoiser.step_gate = asyncio.Event()
    details = await refusal(suite, within_seconds=0.4)
    assert details.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: suite.denoiser.cancelled == 1)
    await nothing_left_running()


async def test_a_request_whose_deadline_passes_is_counted_as_such(suite):
    def counted():
        missed = REGISTRY.get_sample_value("klein_deadline_missed_total", {"stage": "orchestrator"})
        outcomes = ("expired", "cancelled", "failed")
        return missed, *(counted_images(outcome, "text-to-image") for outcome in outcomes)

    missed, expired, cancelled, failed = counted()
    suite.denoiser.step_gate = asyncio.Event()
    for _ in range(5):
        await refusal(suite, within_seconds=0.3)
    await nothing_left_running()
    assert counted() == (missed + 5, expired + 5, cancelled, failed)


async def test_a_caller_that_does_not_read_keeps_its_place_for_so_long_only(monkeypatch):
    monkeypatch.setattr("tests.services.fakes.fake_stages.encoded_image", lambda *_: bytes(1 << 20))
    settings = {"maximum_request_seconds": 1.0, "queue_limit": 1}
    async with FakeSuite(settings=settings).running() as suite:
        spec = ImageSpec(image_count=8)
        call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=spec))
        slots = suite.orchestrator.generation.slots
        await until(lambda: slots.in_use == 1)
        await until(lambda: slots.in_use == 0)
        await nothing_left_running()
        assert len((await generate(suite)).images) == 1
        assert (await failure(drained(call))).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_request_without_deadline_gets_the_longest_that_is_allowed():
    async with FakeSuite(settings={"maximum_request_seconds": 1.0}).running() as suite:
        suite.denoiser.step_gate = asyncio.Event()
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_requests_beyond_the_limit_are_refused_at_once_and_places_come_back():
    async with FakeSuite(settings={"queue_limit": 1}).running() as suite:
        suite.denoiser.step_gate = asyncio.Event()
        unary = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        await until(lambda: suite.denoiser.calls == 1)
        details = await refusal(suite)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details.retry_after_seconds
        suite.denoiser.step_gate.set()
        assert (await unary).images[0].data == suite.expected_image("fox", 1)
        suite.denoiser.step_gate.clear()
        streamed = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec()))
        await until(lambda: suite.denoiser.calls == 2)
        assert (await refusal(suite)).reason == "QUEUE_FULL"
        streamed.cancel()
        await nothing_left_running()
        suite.denoiser.step_gate.set()
        assert (await generate(suite, seed=1)).images[0].data == suite.expected_image("", 1)


async def test_a_message_larger_than_any_good_request_is_not_taken():
    async with FakeSuite(settings={"maximum_reference_bytes": 1024}).running() as suite:
        details = await refusal(suite, references=[bytes(2 << 20)])
        assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details.message

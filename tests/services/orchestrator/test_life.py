"""What happens to requests whose stages are slow and whose callers are slow or go away."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_core.errors import InvalidInput
from klein_services.runtime.errors import QueueFull, StageUnavailable, UnknownAdapter, UnusableAdapter
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


def counted_images(outcome, flow="multi-reference", model="fake") -> float:
    labels = {"model": model, "flow": flow, "outcome": outcome}
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


async def test_a_stage_that_never_ends_its_tensor_is_cut_off(suite):
    suite.text_encoder.endless = True
    details = await refusal(suite, prompt="fox")
    assert details.code is grpc.StatusCode.INTERNAL
    await until(lambda: suite.text_encoder.cancelled == suite.text_encoder.calls)
    assert suite.orchestrator.generator.cache.size_bytes == 0


async def test_what_the_denoiser_refuses_is_not_kept(suite):
    suite.denoiser.input_error = InvalidInput.of("prompt_embedding", "holds NaN or infinity")
    details = await refusal(suite, prompt="fox", seed=1)
    assert details.code is grpc.StatusCode.INTERNAL
    assert details.reason == "INTERNAL_ERROR"
    assert "NaN" not in details.message
    assert suite.text_encoder.prompts == ["fox"] * suite.denoiser.calls
    suite.denoiser.input_error = None
    await generate(suite, prompt="fox", seed=1)
    assert suite.text_encoder.prompts == ["fox"] * suite.denoiser.calls


PARTS_RUNNING = {
    "encoding": {"Generation.run", "InputEncoder."},
    "denoising": {"Generation.run"},
    "decoding": {"Generation.run", "ImageDelivery."},
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


def counted_outcomes(model="fake", flow="text-to-image") -> dict[str, float]:
    outcomes = ("succeeded", "rejected", "refused", "failed", "cancelled", "expired")
    return {outcome: counted_images(outcome, flow, model) for outcome in outcomes}


def changed(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {outcome: after[outcome] - count for outcome, count in before.items() if after[outcome] != count}


def counted_deadlines() -> float:
    return REGISTRY.get_sample_value("klein_deadline_missed_total", {"stage": "orchestrator"}) or 0.0


@pytest.mark.parametrize("where", ["denoising", "describing"])
async def test_a_request_whose_deadline_passes_is_counted_as_such_before_and_after_its_checks(suite, where):
    def handled():
        labels = {
            "grpc_type": "unary",
            "grpc_service": "klein_api.v1.ImageService",
            "grpc_method": "GenerateImage",
        }
        return REGISTRY.get_sample_value("grpc_server_started_total", labels) or 0.0

    if where == "describing":
        suite.denoiser.describe_gate = asyncio.Event()
    suite.denoiser.step_gate = asyncio.Event()
    before, missed, begun = counted_outcomes(), counted_deadlines(), handled()
    for attempt in range(20):
        # On a busy machine a deadline may pass before the server sees the call, or the client may hang up so early
        # that the request counts as cancelled: the next one has more time.
        within_seconds = min(0.3 * 1.5**attempt, 10.0)
        details = await refusal(suite, within_seconds=within_seconds)
        assert details.code is grpc.StatusCode.DEADLINE_EXCEEDED
        if counted_deadlines() > missed:
            break
    # The handler counts after its client has gone.
    await until(lambda: sum(changed(before, counted_outcomes()).values()) == handled() - begun)
    outcomes = changed(before, counted_outcomes())
    assert outcomes["expired"] == counted_deadlines() - missed >= 1
    assert outcomes.keys() <= {"expired", "cancelled"}


@pytest.mark.parametrize(
    ("spec", "error", "model", "outcome", "reason", "count"),
    [
        ({"width_px": 65}, None, "fake", "rejected", "invalid_argument", 1),
        ({"image_count": 2**31 - 1}, None, "fake", "rejected", "invalid_argument", 8),
        ({"model": "klein-9000"}, None, "unknown", "rejected", "unknown_model", 1),
        ({}, UnknownAdapter("adapters[0].name", "ink", ()), "fake", "rejected", "unknown_adapter", 1),
        (
            {},
            UnusableAdapter("adapters[0].name", "ink", "of no use"),
            "fake",
            "rejected",
            "unusable_adapter",
            1,
        ),
        ({}, QueueFull(4), "fake", "refused", "queue_full", 1),
        ({}, StageUnavailable("drains"), "fake", "failed", "stage_unavailable", 1),
    ],
)
async def test_a_refusal_is_counted_by_reason_and_as_the_clients_mistake_or_a_failure(
    suite, spec, error, model, outcome, reason, count
):
    def refused():
        labels = {"stage": "orchestrator", "reason": reason}
        return REGISTRY.get_sample_value("klein_request_rejected_total", labels) or 0.0

    suite.denoiser.error = error
    before, refused_before = counted_outcomes(model), refused()
    await refusal(suite, **spec)
    assert changed(before, counted_outcomes(model)) == {outcome: count}
    assert refused() == refused_before + 1


async def test_a_fault_is_counted_as_a_failure_and_not_as_a_refusal(suite):
    suite.denoiser.error = ValueError("secret")
    before = counted_outcomes()
    assert (await refusal(suite)).code is grpc.StatusCode.INTERNAL
    assert changed(before, counted_outcomes()) == {"failed": 1}


async def test_a_caller_that_does_not_read_keeps_its_place_for_so_long_only(monkeypatch):
    monkeypatch.setattr("tests.services.fakes.fake_stages.encoded_image", lambda *_: bytes(1 << 20))
    settings = {"maximum_request_seconds": 1.0, "queue_limit": 1}
    async with FakeSuite(settings=settings).running() as suite:
        spec = ImageSpec(image_count=8)
        call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=spec))
        slots = suite.orchestrator.generator.slots
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
        before = counted_outcomes()
        details = await refusal(suite)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details.retry_after_seconds
        assert changed(before, counted_outcomes()) == {"refused": 1}
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

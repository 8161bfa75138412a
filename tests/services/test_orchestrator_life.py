"""What happens to requests whose stages are slow, fail or lie, and whose callers go away."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    ImageSpec,
    ListModelsRequest,
    StreamGenerateImageRequest,
)
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import REGISTRY

from klein_core.errors import DeviceFault, InvalidInput
from services.runtime.errors import DeadlineUnreachable, QueueFull, StageUnavailable
from services.runtime.server import running_server
from services.runtime.settings import ServerSettings
from services.runtime.status import explain
from tests.services.orchestrator_stages import (
    FakeDenoiser,
    FakeSuite,
    FakeTextEncoder,
    FakeVaeDecoder,
    reference_file,
    until,
)

REFERENCES = (reference_file(64, 64, "a"), reference_file(64, 64, "b"))
BIG_TOKENS = 98304
"""Tokens of a prompt embedding of three frames."""


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


async def generate(suite, *, within_seconds=None, **spec):
    request = GenerateImageRequest(spec=ImageSpec(**spec))
    return await suite.images.GenerateImage(request, timeout=within_seconds)


async def refusal(suite, **spec):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(suite, **spec)
    return explain(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def counted_images(outcome) -> float:
    labels = {"model": "fake", "flow": "multi-reference", "outcome": outcome}
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


async def test_a_slow_denoiser_slows_the_encoder_down_instead_of_filling_memory():
    # 32 MiB of embedding against what the flow-control windows of two hops hold, 7 to 15 MiB.
    suite = FakeSuite(FakeTextEncoder(tokens=32 * 32768), settings={"cache_bytes": 0})
    suite.denoiser.reading_gate = asyncio.Event()
    async with suite.running():
        request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        await until(lambda: suite.text_encoder.frames_sent > 0)
        await asyncio.sleep(0.5)
        assert suite.text_encoder.frames_sent <= 20
        suite.denoiser.reading_gate.set()
        assert (await request).images[0].data == suite.expected_image("fox", 1)


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


@pytest.mark.parametrize("where", ["encoding", "denoising", "decoding"])
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
    reader = asyncio.create_task(_drained(call))
    if where == "decoding":
        await until(lambda: suite.vae_decoder.decode_specs)
    elif where == "denoising":
        await until(lambda: suite.vae_decoder.finished == 2 and suite.denoiser.first_frame.is_set())
    else:
        await until(lambda: all(stage.started.is_set() for stage in stages))
    call.cancel()
    await asyncio.wait([reader])
    await until(lambda: all(stage.cancelled for stage in stages))
    await _nothing_left_running()
    assert counted_images("cancelled") == before + 1
    assert counted_images("failed") == failed


async def _drained(call, events=None) -> None:
    async for event in call:
        if events is not None:
            events.append(event)


async def _nothing_left_running() -> None:
    names = ("Generation.", "Flow.", "Conditioning.")

    def running() -> bool:
        return any(name in repr(task) for task in asyncio.all_tasks() for name in names)

    await until(lambda: not running())


async def test_a_deadline_ends_the_work_of_every_stage(suite):
    suite.denoiser.step_gate = asyncio.Event()
    details = await refusal(suite, within_seconds=0.4)
    assert details.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: suite.denoiser.cancelled == 1)
    await _nothing_left_running()


async def test_a_request_without_deadline_gets_the_longest_that_is_allowed():
    async with FakeSuite(settings={"maximum_request_seconds": 1.0}).running() as suite:
        suite.denoiser.step_gate = asyncio.Event()
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.DEADLINE_EXCEEDED


QUEUE_FULL = QueueFull(4, 2.5)


@pytest.mark.parametrize("stage", ["text-encoder", "denoiser", "vae-decoder"])
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (DeadlineUnreachable(1, 2), grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE"),
        (StageUnavailable("the stage drains"), grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE"),
        (DeviceFault("lost"), grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE"),
        (ValueError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL_ERROR"),
    ],
)
async def test_a_stage_that_fails_gives_the_caller_its_status(suite, stage, error, code, reason):
    failing = next(candidate for candidate in suite.stages if candidate.stage == stage)
    others = [candidate for candidate in suite.stages if candidate is not failing]
    failing.error = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(suite, references=REFERENCES)
    details = explain(caught.value)
    assert (details.code, details.reason) == (code, reason)
    assert stage in details.message
    assert "secret" not in details.message
    if isinstance(error, QueueFull):
        assert details.retry_after_seconds == 2.5
    if reason == "STAGE_UNAVAILABLE":
        assert suite.targets[stage] in details.message
    if reason == "INTERNAL_ERROR":
        info = error_details_pb2.ErrorInfo()
        rpc_status.from_call(caught.value).details[0].Unpack(info)
        assert info.metadata["error_id"] in details.message
    await until(lambda: all(other.calls == other.finished + other.cancelled for other in others))
    await _nothing_left_running()


async def test_one_stages_failure_cancels_the_others_at_once(suite):
    suite.vae_decoder.error = QUEUE_FULL
    suite.text_encoder.delay_seconds = 30
    details = await refusal(suite, references=REFERENCES, width_px=64, height_px=64)
    assert details.reason == "QUEUE_FULL"
    await until(lambda: suite.text_encoder.cancelled == 1 and suite.denoiser.cancelled == 1)


async def test_every_bad_reference_is_named(suite):
    references = [b"nonsense", REFERENCES[0], b"rubbish"]
    details = await refusal(suite, references=references)
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {violation.field for violation in details.violations} == {"references[0]", "references[2]"}


async def test_a_stage_that_comes_back_within_the_retries_is_not_noticed(suite):
    suite.text_encoder.error = StageUnavailable("restarting")
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(lambda: suite.text_encoder.calls == 1)
    suite.text_encoder.error = None
    assert (await request).images[0].data == suite.expected_image("fox", 1)


async def test_traced_calls_fail_and_end_like_others(monkeypatch):
    def interceptors():
        return aio_client_interceptors(tracer_provider=TracerProvider())

    monkeypatch.setattr("services.runtime.channels.client_interceptors", interceptors)
    async with FakeSuite().running() as suite:
        response = await generate(suite, seed=1, references=REFERENCES)
        assert response.images[0].data == suite.expected_image("", 1, references=REFERENCES)
        assert "traceparent" in suite.denoiser.metadata[0]
        suite.denoiser.error = QUEUE_FULL
        assert (await refusal(suite, references=REFERENCES)).reason == "QUEUE_FULL"
        suite.denoiser.error, suite.denoiser.step_gate = None, asyncio.Event()
        assert (await refusal(suite, within_seconds=0.4)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: suite.denoiser.cancelled == 1)
        await _nothing_left_running()


async def test_a_stage_that_is_lost_under_way_costs_a_unary_request_nothing_but_time(suite):
    suite.denoiser.lost_calls = 1
    response = await generate(suite, prompt="fox", seed=1)
    assert response.images[0].data == suite.expected_image("fox", 1)
    assert suite.denoiser.calls == 2
    # The second attempt had the embedding from the cache.
    assert suite.text_encoder.calls == 1
    suite.denoiser.lost_calls = 2
    assert (await refusal(suite, prompt="fox")).code is grpc.StatusCode.UNAVAILABLE


async def test_a_caller_that_was_told_something_is_not_told_it_again(suite):
    suite.denoiser.lost_calls = 1
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec(seed=1)))
    events = []
    with pytest.raises(grpc.aio.AioRpcError, match="denoiser"):
        await _drained(call, events)
    assert [event.step.step for event in events].count(1) == 1


async def test_a_stage_that_is_down_is_named():
    port = free_port()
    async with FakeSuite(settings={"denoiser_target": f"127.0.0.1:{port}"}).running() as suite:
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.UNAVAILABLE
        assert f"denoiser at 127.0.0.1:{port}" in details.message
        assert suite.text_encoder.calls == 0


async def test_a_stage_that_starts_late_is_found_soon():
    port = free_port()
    async with FakeSuite(settings={"denoiser_target": f"127.0.0.1:{port}"}).running() as suite:
        assert (await refusal(suite)).code is grpc.StatusCode.UNAVAILABLE
        settings = ServerSettings(port=port, metrics_port=0, drain_delay_seconds=0)
        async with running_server(suite.denoiser, settings):
            async with asyncio.timeout(5):
                while not (await suite.images.ListModels(ListModelsRequest())).models[0].serving:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert (await generate(suite, seed=1)).images[0].data == suite.expected_image("", 1)


async def test_a_stage_that_loads_is_unavailable(suite):
    suite.denoiser.serving = False
    details = await refusal(suite)
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert "denoiser" in details.message
    assert "loading" in details.message
    suite.denoiser.serving = True
    await generate(suite)


async def test_a_stage_with_another_model_than_the_table_says_is_unavailable():
    async with FakeSuite(denoiser=FakeDenoiser(model="klein-9b")).running() as suite:
        details = await refusal(suite)
    assert details.code is grpc.StatusCode.UNAVAILABLE
    for part in ("denoiser", suite.targets["denoiser"], "'klein-9b'", "'fake'"):
        assert part in details.message


async def test_a_model_that_is_replaced_under_way_is_unavailable(suite):
    await generate(suite, prompt="a")
    suite.text_encoder.model = "klein-9b"
    details = await refusal(suite, prompt="b")
    assert details.code is grpc.StatusCode.UNAVAILABLE
    for part in ("text-encoder", "klein-9b", "'fake'"):
        assert part in details.message


async def test_stages_that_do_not_fit_each_other_are_unavailable():
    async with FakeSuite(FakeTextEncoder(channels=12)).running() as suite:
        details = await refusal(suite)
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert "12 channels" in details.message
    assert "takes 8" in details.message


async def test_stages_of_different_element_types_are_unavailable_where_it_matters():
    async with FakeSuite(FakeTextEncoder(dtype="bf16")).running() as suite:
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.UNAVAILABLE
        assert "sends bf16 tensors" in details.message
    async with FakeSuite(vae_decoder=FakeVaeDecoder(dtype="bf16")).running() as suite:
        await generate(suite)
        details = await refusal(suite, references=REFERENCES)
        assert details.code is grpc.StatusCode.UNAVAILABLE
        assert "vae-decoder" in details.message


async def test_a_stage_is_asked_what_it_is_only_now_and_then(suite):
    for _ in range(3):
        await generate(suite)
    assert [stage.descriptions for stage in suite.stages] == [1, 1, 1]


async def test_a_denoiser_that_makes_too_few_images_is_a_fault_of_ours(suite):
    suite.denoiser.images_made = 1
    details = await refusal(suite, image_count=2)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")


async def test_a_decoder_that_sends_less_than_it_announced_is_a_fault_of_ours(suite):
    suite.vae_decoder.announced_extra_bytes = 1
    details = await refusal(suite)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")


async def test_a_caller_that_does_not_read_does_not_fill_memory(suite):
    steps_done = suite.denoiser.steps_done
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(step_count=1000), preview_interval_steps=0)
    )
    await until(lambda: suite.denoiser.steps_done > steps_done)
    call.cancel()
    await until(lambda: suite.denoiser.cancelled + suite.denoiser.finished == 1)
    await _nothing_left_running()

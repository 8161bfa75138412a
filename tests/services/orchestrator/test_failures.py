"""Statuses that clients get when stages fail, are lost, are absent, or contradict the routing table."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2 import (
    ListModelsRequest,
)
from klein_core.errors import DeviceFault
from klein_services.runtime.errors import (
    DeadlineUnreachable,
    QueueFull,
    ReceiveTimeout,
    StageUnavailable,
    UnknownPeer,
)
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.status import explain
from tests.services.fakes.fake_denoiser import FakeDenoiser
from tests.services.fakes.fake_stages import FakeTextEncoder, FakeVaeDecoder
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import (
    FakeSuite,
    generate,
    nothing_left_running,
    refusal,
)
from tests.services.fakes.runtime_toy import until

REFERENCES = (reference_file(64, 64, "a"), reference_file(64, 64, "b"))


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


def counted_rejections(reason) -> float:
    labels = {"stage": "orchestrator", "reason": reason.lower()}
    return REGISTRY.get_sample_value("klein_request_rejected_total", labels) or 0.0


QUEUE_FULL = QueueFull(4, 2.5)


@pytest.mark.parametrize("stage", ["text-encoder", "denoiser", "vae-decoder"])
@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (DeadlineUnreachable(1, 2), grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE"),
        (StageUnavailable("the stage drains"), grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE"),
        (DeviceFault("lost"), grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE"),
        (UnknownPeer(["orchestrator"]), grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE"),
        (ValueError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL_ERROR"),
    ],
)
async def test_a_stage_that_fails_gives_the_caller_its_status(suite, stage, error, code, reason):
    failing = next(candidate for candidate in suite.stages if candidate.stage == stage)
    others = [candidate for candidate in suite.stages if candidate is not failing]
    failing.error, rejected = error, counted_rejections(reason)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(suite, references=REFERENCES)
    details = explain(caught.value)
    assert caught.value.trailing_metadata()["x-request-id"]
    assert (details.code, details.reason) == (code, reason)
    assert stage in details.message
    assert "secret" not in details.message
    if isinstance(error, QueueFull):
        assert details.retry_after_seconds == 2.5
    if reason == "STAGE_UNAVAILABLE":
        assert suite.targets[stage] in details.message
    if reason != "INTERNAL_ERROR":
        assert counted_rejections(reason) == rejected + 1
    else:
        info = error_details_pb2.ErrorInfo()
        rpc_status.from_call(caught.value).details[0].Unpack(info)
        assert info.metadata["error_id"] in details.message
    await until(lambda: all(other.calls == other.finished + other.cancelled for other in others))
    await nothing_left_running()


async def test_a_stage_that_waited_too_long_for_another_is_not_the_callers_deadline(suite):
    suite.denoiser.error = ReceiveTimeout(300)
    details = await refusal(suite, prompt="fox")
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert "denoiser" in details.message


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


async def test_traced_calls_fail_and_end_like_others(span_collector):
    async with FakeSuite().running() as suite:
        response = await generate(suite, seed=1, references=REFERENCES)
        assert response.images[0].data == suite.expected_image("", 1, references=REFERENCES)
        assert "traceparent" in suite.denoiser.metadata[0]
        suite.denoiser.error = QUEUE_FULL
        assert (await refusal(suite, references=REFERENCES)).reason == "QUEUE_FULL"
        suite.denoiser.error, suite.denoiser.step_gate = None, asyncio.Event()
        assert (await refusal(suite, within_seconds=0.4)).code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: suite.denoiser.cancelled == 1)
        await nothing_left_running()


async def test_a_stage_that_is_lost_under_way_costs_a_unary_request_nothing_but_time(suite):
    suite.denoiser.lost_calls = 1
    response = await generate(suite, prompt="fox", seed=1)
    assert response.images[0].data == suite.expected_image("fox", 1)
    assert suite.denoiser.calls == 2
    # The second attempt had the embedding from the cache.
    assert suite.text_encoder.calls == 1
    suite.denoiser.lost_calls = 2
    assert (await refusal(suite, prompt="fox")).code is grpc.StatusCode.UNAVAILABLE


async def test_a_stage_that_is_down_is_named(free_port):
    async with FakeSuite(settings={"denoiser_target": f"127.0.0.1:{free_port}"}).running() as suite:
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.UNAVAILABLE
        assert f"denoiser at 127.0.0.1:{free_port}" in details.message
        assert suite.text_encoder.calls == 0


async def test_a_stage_that_starts_late_is_found_soon(free_port):
    async with FakeSuite(settings={"denoiser_target": f"127.0.0.1:{free_port}"}).running() as suite:
        assert (await refusal(suite)).code is grpc.StatusCode.UNAVAILABLE
        settings = ServerSettings(port=free_port, metrics_port=0, drain_delay_seconds=0)
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


async def test_stages_whose_addresses_are_mixed_up_are_named_with_what_they_are():
    async with running_server(FakeVaeDecoder()) as decoder, running_server(FakeDenoiser()) as denoiser:
        settings = {"denoiser_target": decoder, "vae_decoder_target": denoiser}
        async with FakeSuite(settings=settings).running() as suite:
            details = await refusal(suite)
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert f"denoiser at {decoder} is a vae-decoder, not a denoiser" in details.message
    assert f"vae-decoder at {denoiser} is a denoiser, not a vae-decoder" in details.message


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


async def test_a_decoder_of_other_latents_than_the_denoiser_makes_is_unavailable():
    async with FakeSuite(vae_decoder=FakeVaeDecoder(latent_channels=8)).running() as suite:
        details = await refusal(suite)
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert f"denoiser at {suite.targets['denoiser']}" in details.message
    assert "makes latents of 4 channels" in details.message
    assert f"vae-decoder at {suite.targets['vae-decoder']} ('fake') takes 8" in details.message


async def test_stages_of_different_element_types_work_together_and_the_cache_keeps_their_tensors_apart():
    encoder, decoder = FakeTextEncoder(dtype="bf16"), FakeVaeDecoder(dtype="f32")
    async with FakeSuite(
        encoder, vae_decoder=decoder, settings={"describe_ttl_seconds": 0.0}
    ).running() as suite:
        for _ in range(2):
            await generate(suite, references=REFERENCES)
        before = (encoder.calls, len(decoder.references))
        encoder.dtype, decoder.dtype = "f32", "f16"
        await generate(suite, references=REFERENCES)
        assert (encoder.calls, len(decoder.references)) == (before[0] + 1, before[1] + len(REFERENCES))


async def test_a_stage_is_asked_what_it_is_only_now_and_then(suite):
    for _ in range(3):
        await generate(suite)
    assert [stage.descriptions for stage in suite.stages] == [1, 1, 1]


async def test_a_stage_that_is_forgotten_while_others_are_still_asked_does_not_matter(suite):
    suite.denoiser.describe_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(lambda: all(stage.descriptions == 1 for stage in suite.stages))
    await asyncio.sleep(0.1)
    generator = suite.orchestrator.generator
    generator.directory.forget(generator.table.route(""))
    suite.denoiser.describe_gate.set()
    assert (await request).images[0].data == suite.expected_image("fox", 1)


async def test_two_pools_that_give_their_models_one_name_share_no_tensors(suite):
    generator = suite.orchestrator.generator
    route = generator.table.route("")
    async with running_server(FakeTextEncoder()) as target:
        other = replace(route, text_encoder=replace(route.text_encoder, target=target))
        versions = [await generator.directory.describe_route(each, 5) for each in (route, other, route)]
    assert versions[0].text_encoder_version == versions[2].text_encoder_version
    assert versions[0].text_encoder_version != versions[1].text_encoder_version
    assert versions[0].vae_decoder_version == versions[1].vae_decoder_version


async def test_a_denoiser_that_makes_too_few_images_is_a_fault_of_ours(suite):
    suite.denoiser.images_made = 0
    details = await refusal(suite, image_count=2)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")


async def test_a_decoder_that_sends_less_than_it_announced_is_a_fault_of_ours(suite):
    suite.vae_decoder.announced_extra_bytes = 1
    details = await refusal(suite)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")


async def test_a_decoder_that_announces_far_too_much_is_cut_off_before_it_sends_it(suite):
    suite.vae_decoder.announced_extra_bytes = 65 << 20
    suite.vae_decoder.chunk_gate = asyncio.Event()
    details = await refusal(suite, within_seconds=10)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
    await until(lambda: suite.vae_decoder.cancelled == suite.vae_decoder.calls)

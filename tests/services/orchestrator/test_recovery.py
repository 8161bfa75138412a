"""What the orchestrator does about stages that load, are lost or change, and how often it asks them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import grpc
import pytest

from klein_api.v1.image_service_pb2 import GenerateImageRequest, ImageSpec
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_core.errors import DeviceFault, InvalidInput
from klein_services.orchestrator import attempt, stage_channels, stage_directory
from klein_services.orchestrator.routing import StageAddress
from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.stage_channels import Channels
from klein_services.runtime.channels import open_channel
from klein_services.runtime.errors import QueueFull, StageUnavailable
from klein_services.runtime.server import Server, running_server
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.status import explain
from tests.services.fakes.fake_denoiser import FakeDenoiser
from tests.services.fakes.fake_stages import MODEL, FakeVaeDecoder
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, refusal
from tests.services.fakes.runtime_toy import failure, until

LOADING = ServerSettings(host="127.0.0.1", drain_delay_seconds=0, grace_seconds=1, metrics_port=0)
ATTEMPTS = 4 * 2
"""Of gRPC's retry policy, each of the orchestrator's two."""


class LoadingDenoiser(FakeDenoiser):
    """Never gets to the end of its loading."""

    async def load(self) -> None:
        await asyncio.Event().wait()


async def test_a_pool_that_grows_serves_all_the_time():
    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(FakeSuite().running())
        targets = [suite.targets["denoiser"].removeprefix("localhost:")]
        for _ in range(4):
            server = Server(LOADING, LoadingDenoiser(serving=False))
            await server.start()
            stack.push_async_callback(server.abandon)
            targets.append(f"127.0.0.1:{server.port}")
        settings = OrchestratorSettings(
            model_name=MODEL,
            text_encoder_target=suite.targets["text-encoder"],
            denoiser_target="ipv4:" + ",".join(targets),
            vae_decoder_target=suite.targets["vae-decoder"],
            default_size_px=64,
            describe_ttl_seconds=0.0,
            port=0,
            metrics_port=0,
            drain_delay_seconds=0.0,
        )
        address = await stack.enter_async_context(
            running_server(Orchestrator(settings, settings.table()), settings)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        suite.images = ImageServiceStub(channel)
        for seed in range(12):
            assert (await generate(suite, seed=seed)).images[0].data == suite.expected_image("", seed)


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


async def test_a_request_that_breaks_devices_breaks_two_at_most(suite):
    suite.denoiser.error = DeviceFault("an illegal address was accessed")
    async with open_channel(suite.address) as channel:
        request = GenerateImageRequest(spec=ImageSpec(prompt="fox"))
        details = explain(await failure(ImageServiceStub(channel).GenerateImage(request)))
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert suite.denoiser.calls == 2


async def test_a_callers_retries_do_not_multiply_the_orchestrators(suite):
    suite.denoiser.error = StageUnavailable("restarting")
    async with open_channel(suite.address) as channel:
        request = GenerateImageRequest(spec=ImageSpec(prompt="fox"))
        details = explain(await failure(ImageServiceStub(channel).GenerateImage(request)))
    assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE")
    assert 1 < suite.denoiser.calls <= ATTEMPTS


async def lost_after_its_steps(suite: FakeSuite) -> asyncio.Task:
    """Begins a request whose denoiser will be lost once the step gate opens."""
    suite.denoiser.lost_calls = 1
    suite.denoiser.step_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(suite.denoiser.first_frame.is_set)
    await until(lambda: suite.text_encoder.finished == 1)
    return request


async def test_the_second_attempt_takes_nothing_that_other_weights_made(suite):
    request = await lost_after_its_steps(suite)
    suite.text_encoder.weights_digest = "second"
    suite.denoiser.step_gate.set()
    assert (await request).images[0].data == suite.expected_image("fox", 1)
    assert suite.text_encoder.prompts == ["fox", "fox"]


async def test_no_second_attempt_is_made_with_a_model_of_another_kind(suite):
    request = await lost_after_its_steps(suite)
    suite.denoiser.distilled = False
    suite.denoiser.step_gate.set()
    details = explain(await failure(request))
    assert details.code is grpc.StatusCode.UNAVAILABLE
    assert "another model took the place" in details.message
    assert suite.denoiser.calls == 1
    # Whoever asks again gets the new model's defaults.
    suite.denoiser.lost_calls = 0
    await generate(suite, prompt="fox", seed=1)
    assert suite.denoiser.specs[-1].step_count == 50


@pytest.mark.parametrize("which", ["text_encoder", "denoiser", "vae_decoder"])
async def test_a_stage_that_keeps_silent_is_named_soon(suite, monkeypatch, which):
    monkeypatch.setattr(stage_directory, "_DESCRIBE_TIMEOUT_SECONDS", 0.3)
    stage = getattr(suite, which)
    stage.describe_gate = asyncio.Event()
    details = await refusal(suite, within_seconds=30)
    assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE")
    assert f"{stage.stage} at {suite.targets[stage.stage]} does not answer" in details.message


@pytest.mark.parametrize("which", ["text_encoder", "denoiser", "vae_decoder"])
async def test_a_stage_that_loads_is_named(suite, which):
    stage = getattr(suite, which)
    stage.serving = False
    details = await refusal(suite)
    assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE")
    assert f"{stage.stage} at {suite.targets[stage.stage]} is loading or draining" in details.message


class TestWaitingForAStage:
    """A request waits for a stage without a serving replica, within its deadline and the setting's bound."""

    @pytest.fixture
    async def suite(self):
        async with FakeSuite(settings={"stage_wait_seconds": 30.0}).running() as running:
            yield running

    @pytest.mark.parametrize("which", ["text_encoder", "denoiser", "vae_decoder"])
    async def test_it_goes_on_when_the_stage_serves(self, suite, which):
        stage = getattr(suite, which)
        stage.serving = False
        requests = [asyncio.create_task(generate(suite, prompt="fox", seed=seed)) for seed in range(12)]
        await until(lambda: stage.descriptions >= 4)
        stage.serving = True
        for seed, request in enumerate(requests):
            assert (await request).images[0].data == suite.expected_image("fox", seed)

    async def test_requests_that_wait_share_their_questions(self, suite):
        suite.denoiser.serving = False
        requests = [asyncio.create_task(generate(suite, seed=seed)) for seed in range(40)]
        await until(lambda: suite.orchestrator.generator.slots.in_use == 40)
        before = suite.denoiser.descriptions
        await until(lambda: suite.denoiser.descriptions >= before + 20)
        # Forty requests that asked for themselves would ask the text encoder 40 times.
        assert suite.text_encoder.descriptions <= 4
        suite.denoiser.serving = True
        await asyncio.gather(*requests)

    async def test_the_deadline_ends_it(self, suite):
        suite.denoiser.serving = False
        error = await failure(generate(suite, within_seconds=1.0))
        assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        await until(lambda: suite.orchestrator.generator.slots.in_use == 0)

    async def test_another_model_is_refused_at_once(self, suite):
        suite.denoiser.model = "another"
        details = await refusal(suite)
        assert details.code is grpc.StatusCode.UNAVAILABLE
        assert "serves the model 'another'" in details.message
        assert suite.denoiser.descriptions <= 2

    async def test_a_stage_that_is_gone_may_come_back_on_its_port(self):
        async with AsyncExitStack() as decoder, AsyncExitStack() as stack:
            target = await decoder.enter_async_context(running_server(FakeVaeDecoder(), LOADING))
            settings: dict[str, object] = {"stage_wait_seconds": 30.0, "vae_decoder_target": target}
            suite = await stack.enter_async_context(FakeSuite(settings=settings).running())
            assert (await generate(suite, seed=1)).images
            await decoder.aclose()
            request = asyncio.create_task(generate(suite, seed=2))
            await asyncio.sleep(0.5)
            assert not request.done()
            port = int(target.rpartition(":")[2])
            await stack.enter_async_context(running_server(FakeVaeDecoder(), replace(LOADING, port=port)))
            assert (await request).images[0].data == suite.expected_image("", 2)


class TestStagesWithoutRoom:
    """Another replica is asked at once; a request of which a part is computed waits for room."""

    async def test_a_request_that_was_denoised_waits_for_the_decoder(self):
        async with FakeSuite(settings={"stage_wait_seconds": 30.0}).running() as suite:
            suite.vae_decoder.error = QueueFull(1, 0.1)
            request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
            await until(lambda: suite.vae_decoder.calls >= 3)
            suite.vae_decoder.error = None
            assert (await request).images[0].data == suite.expected_image("fox", 1)
            assert suite.denoiser.calls == 1

    async def test_it_waits_for_a_bounded_time(self):
        async with FakeSuite(settings={"stage_wait_seconds": 0.5}).running() as suite:
            suite.vae_decoder.error = QueueFull(1, 0.1)
            assert (await refusal(suite, prompt="fox")).reason == "QUEUE_FULL"
            assert suite.vae_decoder.calls > 1

    async def test_the_only_replica_is_asked_once(self, suite):
        suite.denoiser.error = QueueFull(1, 2.5)
        assert (await refusal(suite, prompt="fox")).retry_after_seconds == 2.5
        assert suite.denoiser.calls == 1

    async def test_other_replicas_are_asked(self):
        async with AsyncExitStack() as stack:
            full, free = FakeDenoiser(), FakeDenoiser()
            full.error = QueueFull(1, 2.5)
            targets = [
                await stack.enter_async_context(running_server(each, LOADING)) for each in (full, free)
            ]
            settings: dict[str, object] = {"denoiser_target": "ipv4:" + ",".join(targets)}
            suite = await stack.enter_async_context(FakeSuite(settings=settings).running())
            for seed in range(6):
                assert (await generate(suite, seed=seed)).images[0].data == suite.expected_image("", seed)
            assert full.calls
            free.error = full.error
            assert (await refusal(suite)).reason == "QUEUE_FULL"


async def test_a_request_whose_tensor_was_damaged_goes_on():
    async with FakeSuite(settings={"stage_wait_seconds": 30.0}).running() as suite:
        suite.denoiser.input_error = InvalidInput.of("prompt_embedding", "does not match its xxh3 digest")
        before = suite.orchestrator.generator.channels.serving(address_of(suite))
        request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        await until(lambda: suite.denoiser.calls >= 2)
        suite.denoiser.input_error = None
        assert (await request).images[0].data == suite.expected_image("fox", 1)
        assert suite.orchestrator.generator.channels.serving(address_of(suite)) is not before


async def test_a_denoiser_that_answers_nothing_is_left(monkeypatch):
    monkeypatch.setattr(attempt, "_ADMISSION_SECONDS", 0.2)
    async with FakeSuite(settings={"stage_wait_seconds": 30.0}).running() as suite:
        suite.denoiser.admission_gate = asyncio.Event()
        request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        await until(lambda: suite.denoiser.calls >= 2)
        monkeypatch.setattr(attempt, "_ADMISSION_SECONDS", 30.0)
        suite.denoiser.admission_gate.set()
        assert (await request).images[0].data == suite.expected_image("fox", 1)


def address_of(suite: FakeSuite) -> StageAddress:
    return StageAddress("denoiser", suite.targets["denoiser"], MODEL)


async def test_a_damaged_connection_gets_no_more_calls_and_its_calls_get_an_end(monkeypatch):
    monkeypatch.setattr(stage_channels, "_DAMAGED_SECONDS", 0.1)
    peers: list[str] = []

    async def respond(request, context):
        peers.append(context.peer())
        if request == b"stay":
            await asyncio.Event().wait()
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(respond)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Peer", {"Ask": handler}),))
    address = StageAddress("denoiser", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", MODEL)
    await server.start()
    channels = Channels()

    async def ask(request: bytes = b"") -> None:
        await channels.any(address).unary_unary("/peer.Peer/Ask")(request)

    try:
        await ask()
        stuck = asyncio.create_task(ask(b"stay"))
        await until(lambda: len(peers) == 2)
        channels.reconnect(address)
        channels.reconnect(address)  # many requests notice the same damage
        await ask()
        await ask()
        assert peers[0] == peers[1] != peers[2] == peers[3]
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await stuck
    finally:
        await channels.close()
        await server.stop(0)

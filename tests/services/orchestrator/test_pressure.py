"""Back pressure: a receiver that does not read slows its sender down, all the way; nothing accumulates."""

from __future__ import annotations

import asyncio

from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest, StreamGenerateImageResponse
from klein_services.orchestrator.events import EventQueue
from tests.services.fakes.fake_stages import FakeTextEncoder
from tests.services.fakes.fake_tensors import encoded_image
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running, standstill
from tests.services.fakes.runtime_toy import until

MEBIBYTE = 1 << 20
WINDOWS_MEBIBYTES = 40
"""More than two hops hold: flow-control windows that grow to 16 MiB each, and a few frames on their way."""
TENSOR_MEBIBYTES = 64


async def test_a_slow_denoiser_slows_the_encoder_down_instead_of_filling_memory():
    suite = FakeSuite(FakeTextEncoder(tokens=TENSOR_MEBIBYTES * 32768), settings={"cache_bytes": 0})
    suite.denoiser.reading_gate = asyncio.Event()
    async with suite.running():
        request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        assert await standstill(lambda: suite.text_encoder.frames_sent) <= WINDOWS_MEBIBYTES
        suite.denoiser.reading_gate.set()
        assert (await request).images[0].data == suite.expected_image("fox", 1)


async def test_a_slow_decoder_slows_the_denoiser_down_instead_of_filling_memory():
    async with FakeSuite().running() as suite:
        suite.denoiser.large_latents = bytes(range(256)) * (TENSOR_MEBIBYTES * MEBIBYTE // 256)
        suite.vae_decoder.reading_gate = asyncio.Event()
        request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        assert await standstill(lambda: suite.denoiser.frames_sent) <= WINDOWS_MEBIBYTES
        suite.vae_decoder.reading_gate.set()
        [image] = (await request).images
        assert image.data == encoded_image(suite.denoiser.large_latents, image.format, None)
    assert suite.denoiser.frames_sent == TENSOR_MEBIBYTES


async def test_a_caller_that_does_not_read_stops_previews_and_steps():
    async with FakeSuite().running() as suite:
        # Large both ways, so that steps never outrun the images that fill the client's window.
        suite.denoiser.large_latents = bytes(MEBIBYTE)
        suite.vae_decoder.padding = bytes(4 * MEBIBYTE)
        call = suite.images.StreamGenerateImage(
            StreamGenerateImageRequest(spec=ImageSpec(step_count=400), preview_interval_steps=1)
        )
        steps = await standstill(lambda: suite.denoiser.steps_done, 1.0)
        assert steps < 400
        assert len(suite.vae_decoder.decode_specs) <= 8
        # It goes on with the caller.
        async for _ in call:
            if suite.denoiser.steps_done > steps:
                break
        call.cancel()
        await until(lambda: suite.denoiser.cancelled == 1)
        await nothing_left_running()


async def test_events_wait_for_room_and_come_in_order():
    queue, taken = EventQueue(), []
    events = [StreamGenerateImageResponse() for _ in range(100)]
    for number, event in enumerate(events):
        event.step.step = number

    async def send() -> None:
        for event in events:
            await queue.put(event)
            taken.append(event)
        queue.close()

    sender = asyncio.create_task(send())
    for _ in range(200):
        await asyncio.sleep(0)
    assert 1 <= len(taken) <= 8
    seen = []
    async for event in queue:
        seen.append(event)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(taken) - len(seen) <= 8
    await sender
    assert seen == events

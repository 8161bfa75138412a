"""Requests whose stages are lost under way: what is computed again, what the client sees, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from klein_api.v1.denoiser_service_pb2 import DenoiseLatentsRequest
from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_api.v1.tensor_pb2 import DATA_TYPE_F32
from klein_core.errors import DeviceFault
from klein_services.orchestrator.checkpoint_pace import CheckpointPace
from klein_services.orchestrator.generation import Losses
from klein_services.orchestrator.saved_latents import SavedLatents, latents_bytes
from klein_services.runtime.errors import StagesLost, StageUnavailable
from klein_services.runtime.frames import TensorSpec, split_frames
from klein_services.runtime.protowire import as_resume_latents, frame_field
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import (
    FakeSuite,
    drained,
    generate,
    nothing_left_running,
    refusal,
)
from tests.services.fakes.runtime_toy import until

STEPS = 6
DECODE_ATTEMPTS = 4
"""Of gRPC's retry policy, before the orchestrator notices."""


class EveryStep(CheckpointPace):
    """Asks for a checkpoint after every step: the fakes' steps take no time, so that any checkpoint is expensive."""

    def record(self, model: str, checkpoint_seconds: float, step_seconds: float) -> None: ...


@asynccontextmanager
async def resuming_suite(**settings: object) -> AsyncIterator[FakeSuite]:
    async with FakeSuite(settings={"stage_wait_seconds": 30.0, **settings}).running() as running:
        running.orchestrator.generator.pace = EveryStep()
        yield running


@pytest.fixture
async def suite():
    async with resuming_suite() as running:
        yield running


async def streamed(suite, **spec):
    """Returns a request's events."""
    events: list = []
    await drained(
        suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec(**spec))), events
    )
    return events


def steps_of(events) -> list[int]:
    return [event.step.step for event in events if event.HasField("step")]


def images_of(events) -> dict[int, bytes]:
    images = [event.image for event in events if event.HasField("image")]
    assert len({image.index for image in images}) == len(images), "an image was sent twice"
    return {image.index: image.data for image in images}


def recoveries(stage: str) -> float:
    return REGISTRY.get_sample_value("klein_request_recoveries_total", {"stage": stage}) or 0.0


async def test_a_lost_denoiser_costs_the_steps_since_the_last_checkpoint(suite):
    suite.denoiser.lost_after_steps = [2, 5]
    before = recoveries("denoiser")
    events = await streamed(suite, prompt="fox", seed=3, step_count=STEPS, image_count=2)
    assert [spec.resume_step for spec in suite.denoiser.specs] == [0, 2, 5]
    assert suite.denoiser.steps_done == STEPS
    assert steps_of(events) == list(range(1, STEPS + 1))
    assert images_of(events) == {index: suite.expected_image("fox", 3 + index) for index in range(2)}
    assert events[-1].summary.step_count == STEPS
    assert suite.text_encoder.prompts == ["fox"]
    assert recoveries("denoiser") == before + 2
    await nothing_left_running()


async def test_an_edit_and_a_masked_edit_resume_with_all_their_inputs(suite):
    reference, initial = reference_file(64, 64, "a"), reference_file(64, 64, "b")
    suite.denoiser.lost_after_steps = [1]
    edited = await generate(suite, prompt="fox", seed=1, step_count=STEPS, references=[reference])
    assert edited.images[0].data == suite.expected_image("fox", 1, references=(reference,))
    suite.denoiser.lost_after_steps = [3]
    masked = await generate(
        suite, prompt="fox", seed=1, step_count=STEPS, initial_image=initial, mask=b"mask:1", strength=1.0
    )
    assert masked.images[0].data
    assert [spec.resume_step for spec in suite.denoiser.specs] == [0, 1, 0, 3]


async def test_images_that_were_delivered_are_not_made_again(suite):
    # The second image waits, so that the first reaches the client before the denoiser is lost.
    suite.denoiser.image_gates = {1: asyncio.Event()}
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(prompt="fox", seed=8, image_count=3, step_count=STEPS))
    )
    events: list = []
    reading = asyncio.create_task(drained(call, events))
    await until(lambda: any(event.HasField("image") for event in events))
    suite.denoiser.lost_after_frames = suite.denoiser.frames_sent + 1
    suite.denoiser.image_gates.pop(1).set()
    await reading
    assert images_of(events) == {index: suite.expected_image("fox", 8 + index) for index in range(3)}
    assert steps_of(events) == list(range(1, STEPS + 1))
    assert len(suite.denoiser.specs) == 2
    # Image 1 had arrived whole; only image 2 is denoised, from the last checkpoint.
    assert list(suite.denoiser.specs[1].seeds) == [10]
    assert suite.denoiser.specs[1].resume_step == STEPS - 1


async def test_a_lost_decoder_does_not_bring_the_denoiser_back(suite):
    suite.vae_decoder.lost_decodes = DECODE_ATTEMPTS
    events = await streamed(suite, prompt="fox", seed=1)
    assert images_of(events) == {0: suite.expected_image("fox", 1)}
    assert len(suite.denoiser.specs) == 1


async def test_without_room_for_latents_a_request_starts_again():
    async with resuming_suite(resume_bytes=255) as suite:
        assert latents_bytes(1, 64, 64, 4) == 256
        suite.denoiser.lost_after_steps = [2]
        events = await streamed(suite, prompt="fox", seed=1, step_count=STEPS)
        assert [spec.checkpoint_interval_steps for spec in suite.denoiser.specs] == [0, 0]
        assert [spec.resume_step for spec in suite.denoiser.specs] == [0, 0]
        assert steps_of(events) == list(range(1, STEPS + 1))
        assert images_of(events) == {0: suite.expected_image("fox", 1)}


async def test_latents_of_other_weights_are_not_resumed(suite):
    suite.denoiser.step_gate = asyncio.Event()
    suite.denoiser.lost_after_steps = [2]
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1, step_count=STEPS))
    await until(lambda: suite.denoiser.first_frame.is_set())
    suite.denoiser.weights_digest = "second"
    suite.denoiser.step_gate.set()
    assert (await request).images[0].data == suite.expected_image("fox", 1)
    assert [spec.resume_step for spec in suite.denoiser.specs] == [0, 0]


async def test_images_of_two_sets_of_weights_are_not_mixed_in_one_response(suite):
    suite.denoiser.image_gates = {1: asyncio.Event()}
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(prompt="fox", seed=8, image_count=3))
    )
    events: list = []
    reading = asyncio.create_task(drained(call, events))
    await until(lambda: any(event.HasField("image") for event in events))
    suite.denoiser.weights_digest = "second"
    suite.denoiser.lost_after_frames = suite.denoiser.frames_sent + 1
    suite.denoiser.image_gates.pop(1).set()
    with pytest.raises(grpc.aio.AioRpcError, match="another model took the place"):
        await reading


async def test_a_request_that_breaks_every_device_ends_after_two(suite):
    suite.denoiser.error = DeviceFault("an illegal address was accessed")
    assert (await refusal(suite)).code is grpc.StatusCode.UNAVAILABLE
    assert suite.denoiser.calls == 2


async def test_previews_of_an_image_that_was_delivered_do_not_come_again(suite):
    suite.denoiser.image_gates = {1: asyncio.Event()}
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(
            spec=ImageSpec(seed=8, image_count=2, step_count=STEPS), preview_interval_steps=1
        )
    )
    events: list = []
    reading = asyncio.create_task(drained(call, events))
    await until(lambda: any(event.HasField("image") for event in events))
    suite.denoiser.lost_after_frames = suite.denoiser.frames_sent + 1
    previews = sum(event.HasField("preview") for event in events)
    suite.denoiser.image_gates.pop(1).set()
    await reading
    assert sum(event.HasField("preview") for event in events) == previews
    assert len(images_of(events)) == 2


@settings(max_examples=40)
@given(
    losses=st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted),
    image_count=st.integers(1, 3),
)
def test_any_losses_give_each_step_and_image_once(losses, image_count):
    async def run():
        async with resuming_suite() as suite:
            suite.denoiser.lost_after_steps = list(losses)
            events = await streamed(suite, prompt="fox", seed=3, step_count=STEPS, image_count=image_count)
            assert steps_of(events) == list(range(1, STEPS + 1))
            expected = {index: suite.expected_image("fox", 3 + index) for index in range(image_count)}
            assert images_of(events) == expected
            assert suite.denoiser.steps_done <= STEPS + len(losses)

    asyncio.run(run())


class TestLosses:
    """Attempts are bounded by fruitless time, and by what the request may have broken."""

    def test_progress_allows_any_number_of_losses(self):
        losses = Losses(wait_seconds=30)
        for _ in range(100):
            assert losses.may_retry(StagesLost("x", "denoiser"), made_progress=True, was_computing=True)

    def test_a_request_that_ends_denoisers_without_progress_ends_after_three(self):
        losses = Losses(wait_seconds=30)
        lost = StagesLost("x", "denoiser")
        answers = [losses.may_retry(lost, made_progress=False, was_computing=True) for _ in range(3)]
        assert answers == [True, True, False]

    def test_attempts_without_progress_are_bounded(self):
        losses = Losses(wait_seconds=3600)
        lost = StagesLost("x", "text-encoder")
        answers = [losses.may_retry(lost, made_progress=False, was_computing=False) for _ in range(8)]
        assert answers == [True] * 7 + [False]

    def test_without_time_there_is_one_second_attempt(self):
        losses = Losses(wait_seconds=0)
        lost = StagesLost("x", "vae-decoder")
        assert losses.may_retry(lost, made_progress=False, was_computing=False)
        assert not losses.may_retry(lost, made_progress=False, was_computing=False)


class TestCheckpointPace:
    """Checkpoints take a twentieth of the time of steps at most, on average."""

    @pytest.mark.parametrize(("checkpoint_seconds", "interval"), [(0.0, 1), (0.005, 1), (0.01, 2), (0.2, 20)])
    def test_their_cost_spaces_them(self, checkpoint_seconds, interval):
        pace = CheckpointPace()
        assert pace.interval_steps("klein-4b") == 1
        pace.record("klein-4b", checkpoint_seconds, step_seconds=0.1)
        assert pace.interval_steps("klein-4b") == interval
        assert pace.interval_steps("another") == 1

    def test_one_slow_measurement_does_not_decide(self):
        pace = CheckpointPace()
        for _ in range(20):
            pace.record("klein-4b", 0.001, step_seconds=0.1)
        pace.record("klein-4b", 1.0, step_seconds=0.1)
        assert pace.interval_steps("klein-4b") < 6


class TestSavedLatents:
    """A checkpoint is used when it is whole, and frames of two calls never mix."""

    @staticmethod
    def frames(fill: int, count: int = 2) -> list[bytes]:
        data = bytes([fill]) * (count << 20)
        made = split_frames(memoryview(data), TensorSpec(DATA_TYPE_F32, (count, 512, 512)))
        messages = [DenoiseLatentsRequest(prompt_embedding=frame).SerializeToString() for frame in made]
        assert len(messages) >= count
        return [frame for message in messages if (frame := frame_field(message)) is not None]

    def test_an_incomplete_checkpoint_leaves_the_one_before(self):
        saved = SavedLatents()
        first, second = self.frames(1), self.frames(2)
        assert not any(saved.add_checkpoint(0, frame, 3, [0]) for frame in first[:-1])
        assert saved.step == 0
        assert saved.add_checkpoint(0, first[-1], 3, [0])
        saved.add_checkpoint(0, second[0], 4, [0])
        saved.drop_incomplete()
        assert (saved.step, saved.checkpoint(0)) == (3, tuple(first))
        # The next call's frames do not continue those that were dropped.
        assert [saved.add_checkpoint(0, frame, 4, [0]) for frame in second] == [False] * (len(second) - 1) + [
            True
        ]
        assert saved.checkpoint(0) == tuple(second)

    def test_a_checkpoint_needs_every_image(self):
        saved, frames = SavedLatents(), self.frames(1)
        for frame in frames:
            assert not saved.add_checkpoint(0, frame, 1, [0, 2])
        assert saved.step == 0
        assert [saved.add_checkpoint(2, frame, 1, [0, 2]) for frame in frames][-1]
        assert saved.step == 1

    def test_final_latents_count_when_they_are_whole_and_go_with_their_image(self):
        saved, frames = SavedLatents(), self.frames(1)
        saved.add_final(1, frames[0])
        assert saved.final(1) is None
        saved.drop_incomplete()
        for frame in frames:
            saved.add_final(1, frame)
        assert saved.final(1) == tuple(frames)
        saved.delivered(1)
        assert saved.final(1) is None

    def test_a_resumed_tensor_is_protobufs_own_message(self):
        (frame, *_) = self.frames(7)
        for index in (0, 1, 300):
            message = DenoiseLatentsRequest.FromString(as_resume_latents(index, frame))
            assert message.WhichOneof("part") == "resume_latents"
            assert message.resume_latents.index == index
            assert len(message.resume_latents.frame.data) > 0


async def test_a_stage_that_never_serves_again_ends_the_request_in_bounded_time():
    async with resuming_suite(stage_wait_seconds=1.0) as suite:
        suite.denoiser.error = StageUnavailable("restarting")
        details = await refusal(suite)
        assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_UNAVAILABLE")
        assert suite.denoiser.calls <= 8 * 4

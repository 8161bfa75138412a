"""A denoiser that computes nothing, obeys tests, and answers with bytes of all that it was sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from klein_api.v1 import denoiser_service_pb2 as denoiser_pb2
from klein_api.v1 import denoiser_service_pb2_grpc
from klein_core.errors import InvalidInput
from klein_services.runtime.errors import StageUnavailable
from klein_services.runtime.frames import FrameReader
from tests.services.fakes.fake_stages import FakeStage, spec_of
from tests.services.fakes.fake_tensors import LATENT_CHANNELS, TEXT_CHANNELS, frames, image_latents


@dataclass
class FakeDenoiser(FakeStage, denoiser_service_pb2_grpc.DenoiserServiceServicer):
    stage: str = "denoiser"
    service_names: tuple[str, ...] = ("klein_api.v1.DenoiserService",)
    distilled: bool = True
    channels: int = TEXT_CHANNELS
    latent_channels: int = LATENT_CHANNELS
    default_size_px: int = 0
    pixel_count: int = 0
    description: str = ""
    subject_words: tuple[str, ...] = ()
    step_seconds: float = 0.0
    specs: list[denoiser_pb2.DenoiseSpec] = field(default_factory=list)
    first_frame: asyncio.Event = field(default_factory=asyncio.Event)
    admission_gate: asyncio.Event | None = None
    """Holds back the answer to the spec until it is set."""
    reading_gate: asyncio.Event | None = None
    """Holds back the reading of everything after the spec until it is set."""
    step_gate: asyncio.Event | None = None
    """Holds back every step until it is set."""
    images_made: int | None = None
    """Sends the latents of so many images only."""
    input_error: BaseException | None = None
    """Raised by the next calls when all of their tensors are there."""
    large_latents: bytes = b""
    """Sent instead of every image's latents; a whole number of 256 vectors."""
    frames_sent: int = 0
    """Of latents."""
    image_gates: dict[int, asyncio.Event] = field(default_factory=dict)
    steps_done: int = 0
    lost_calls: int = 0
    """So many calls end with UNAVAILABLE after their steps."""
    lost_after_steps: list[int] = field(default_factory=list)
    """Steps of the schedule after which the next calls end with UNAVAILABLE, and with the checkpoint of that step."""
    lost_after_frames: int = 0
    """So many frames of final latents are sent before the next call ends with UNAVAILABLE."""

    def add_service(self, server) -> None:
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    def describe_facts(self, description) -> None:
        facts = description.denoiser
        facts.distilled = self.distilled
        facts.default_step_count = 4 if self.distilled else 50
        facts.default_guidance_scale = 1.0 if self.distilled else 4.0
        facts.embedding_channels = self.channels
        facts.latent_channels = self.latent_channels
        facts.default_size_px = self.default_size_px
        facts.pixel_count = self.pixel_count
        facts.description = self.description
        facts.subject_words.extend(self.subject_words)

    async def DenoiseLatents(self, requests, context):
        messages = requests.__aiter__()
        spec = await spec_of(messages)
        self.specs.append(spec)
        async with self.handling(context, spec.model):
            if self.admission_gate is not None:
                await self.admission_gate.wait()
            queued = denoiser_pb2.DenoiseQueued(position=2)
            queued.estimated_wait.FromMilliseconds(1500)
            yield denoiser_pb2.DenoiseLatentsResponse(queued=queued)
            tensors = await self._received(spec, messages)
            if self.input_error is not None:
                raise self.input_error
            yield denoiser_pb2.DenoiseLatentsResponse(started=denoiser_pb2.DenoiseStarted())
            async for step in self._steps(spec, tensors):
                yield step
            if self.lost_calls:
                self.lost_calls -= 1
                raise StageUnavailable("lost")
            for index in range(len(spec.seeds) if self.images_made is None else self.images_made):
                if index in self.image_gates:
                    await self.image_gates[index].wait()
                for message in self._latents(spec, index, tensors, "latents"):
                    yield message
                    self.frames_sent += 1
                    if self.frames_sent == self.lost_after_frames:
                        raise StageUnavailable("lost")
            summary = denoiser_pb2.DenoiseSummary(step_count=spec.step_count)
            summary.compute_duration.FromMilliseconds(7)
            yield denoiser_pb2.DenoiseLatentsResponse(summary=summary)

    async def _received(self, spec, messages) -> dict[str, bytes]:
        if self.reading_gate is not None:
            await self.reading_gate.wait()
        readers: dict[str, FrameReader] = {}
        async for message in messages:
            self.first_frame.set()
            part = message.WhichOneof("part")
            value = getattr(message, part)
            name, frame = (
                (f"{part}[{value.index}]", value.frame)
                if part in ("reference_latents", "resume_latents")
                else (part, value)
            )
            reader = readers.setdefault(name, FrameReader(name, limit_bytes=64 << 20))
            reader.add(frame)
        expected = {"prompt_embedding", *(f"reference_latents[{i}]" for i in range(spec.reference_count))}
        if not self.distilled and spec.guidance_scale > 1:
            expected.add("negative_prompt_embedding")
        if spec.HasField("strength"):
            expected |= {"initial_latents", "mask"}
        if spec.resume_step:
            expected |= {f"resume_latents[{i}]" for i in range(len(spec.seeds))}
        if expected != readers.keys():
            raise InvalidInput.of("spec", f"expected {expected}, got {readers.keys()}")
        for reader in readers.values():
            reader.require_finished()
        tensors = {name: bytes(reader.data) for name, reader in readers.items()}
        for index, seed in enumerate(spec.seeds if spec.resume_step else ()):
            if tensors[f"resume_latents[{index}]"] != checkpoint_latents(spec, seed, spec.resume_step):
                raise InvalidInput.of("resume_latents", f"are not those of seed {seed}")
        return tensors

    async def _steps(self, spec, tensors) -> AsyncIterator[denoiser_pb2.DenoiseLatentsResponse]:
        for step in range(spec.resume_step + 1, spec.step_count + 1):
            if self.step_gate is not None:
                await self.step_gate.wait()
            await asyncio.sleep(self.step_seconds)
            self.steps_done += 1
            yield denoiser_pb2.DenoiseLatentsResponse(
                step=denoiser_pb2.DenoiseStep(step=step, step_count=spec.step_count)
            )
            if spec.preview_interval_steps and step % spec.preview_interval_steps == 0:
                for index in range(len(spec.seeds)):
                    for message in self._latents(spec, index, tensors, "preview"):
                        yield message
            if (
                spec.checkpoint_interval_steps
                and step % spec.checkpoint_interval_steps == 0 < spec.step_count - step
            ):
                for index, seed in enumerate(spec.seeds):
                    shape = (spec.height_px // 16, spec.width_px // 16, LATENT_CHANNELS)
                    for frame in frames(checkpoint_latents(spec, seed, step), *shape):
                        part = denoiser_pb2.IndexedTensorFrame(index=index, frame=frame)
                        yield denoiser_pb2.DenoiseLatentsResponse(checkpoint=part)
            if self.lost_after_steps and self.lost_after_steps[0] == step:
                self.lost_after_steps.pop(0)
                raise StageUnavailable("lost")

    def _latents(self, spec, index, tensors, arm) -> list[denoiser_pb2.DenoiseLatentsResponse]:
        references = [tensors[f"reference_latents[{i}]"] for i in range(spec.reference_count)]
        if spec.HasField("strength"):
            references = [
                tensors["initial_latents"],
                tensors["mask"],
                repr(spec.strength).encode(),
                *references,
            ]
        data = self.large_latents or image_latents(
            spec.width_px,
            spec.height_px,
            spec.seeds[index],
            tensors["prompt_embedding"],
            tensors.get("negative_prompt_embedding", b""),
            references,
        )
        shape = (spec.height_px // 16, spec.width_px // 16, LATENT_CHANNELS)
        if self.large_latents:
            shape = (len(data) // (256 * LATENT_CHANNELS * 4), 256, LATENT_CHANNELS)
        return [
            denoiser_pb2.DenoiseLatentsResponse(
                **{arm: denoiser_pb2.IndexedTensorFrame(index=index, frame=frame)}
            )
            for frame in frames(data, *shape)
        ]


def checkpoint_latents(spec, seed, step) -> bytes:
    """Latents that only this seed and this step have."""
    return image_latents(spec.width_px, spec.height_px, seed, f"step {step}".encode(), b"", [])

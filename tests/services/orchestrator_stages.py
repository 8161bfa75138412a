"""Stages that compute nothing, obey tests, and answer with bytes that depend on everything they were sent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
from klein_api.v1 import denoiser_service_pb2 as denoiser_pb2
from klein_api.v1 import (
    denoiser_service_pb2_grpc,
    text_encoder_service_pb2_grpc,
    vae_decoder_service_pb2_grpc,
)
from klein_api.v1 import stage_service_pb2 as stage_pb2
from klein_api.v1 import text_encoder_service_pb2 as text_pb2
from klein_api.v1 import vae_decoder_service_pb2 as vae_pb2
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_api.v1.stage_service_pb2_grpc import StageServiceServicer, add_StageServiceServicer_to_server
from klein_api.v1.tensor_pb2 import DATA_TYPE_F32, TensorFrame

from klein_core.errors import InvalidInput
from services.orchestrator.application import Orchestrator
from services.orchestrator.settings import OrchestratorSettings
from services.runtime.application import Application
from services.runtime.errors import StageUnavailable, UnknownModel
from services.runtime.frames import FrameReader, TensorSpec, split_frames
from services.runtime.server import running_server

TEXT_CHANNELS = 8
LATENT_CHANNELS = 4
MODEL = "fake"


def tensor_bytes(seed: bytes, byte_count: int) -> bytes:
    digest = hashlib.sha256(seed).digest()
    return (digest * (byte_count // len(digest) + 1))[:byte_count]


def prompt_embedding(prompt: str, tokens: int) -> bytes:
    return tensor_bytes(b"prompt:" + prompt.encode(), tokens * TEXT_CHANNELS * 4)


def reference_latents(data: bytes) -> bytes:
    width_px, height_px = reference_size_px(data)
    return tensor_bytes(b"reference:" + data, width_px // 16 * (height_px // 16) * LATENT_CHANNELS * 4)


def reference_file(width_px: int, height_px: int, content: str = "") -> bytes:
    return f"image:{width_px}x{height_px}:{content}".encode()


def reference_size_px(data: bytes) -> tuple[int, int]:
    width_px, height_px = data.split(b":")[1].split(b"x")
    return int(width_px), int(height_px)


def image_latents(
    width_px: int, height_px: int, seed: int, prompt: bytes, negative: bytes, references: list[bytes]
) -> bytes:
    everything = b"|".join([str(seed).encode(), prompt, negative, *references])
    return tensor_bytes(everything, width_px // 16 * (height_px // 16) * LATENT_CHANNELS * 4)


def encoded_image(latents: bytes, image_format: int, quality: int | None) -> bytes:
    return b"IMAGE" + hashlib.sha256(latents).digest() + f"{image_format} {quality}".encode()


def frames(data: bytes, *shape: int) -> list[TensorFrame]:
    return list(split_frames(memoryview(data), TensorSpec(DATA_TYPE_F32, shape)))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until something that no event tells of has happened."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class FakeStage(Application, StageServiceServicer):
    """What all three have in common. Tests set the fields at any time."""

    stage: str = ""
    model: str = MODEL
    dtype: str = "f32"
    serving: bool = True
    error: BaseException | None = None
    """Raised by the next calls instead of an answer."""
    delay_seconds: float = 0.0
    calls: int = 0
    descriptions: int = 0
    cancelled: int = 0
    finished: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    remaining_seconds: list[float | None] = field(default_factory=list)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.stage

    service_names: tuple[str, ...] = ()

    async def load(self) -> None: ...

    async def drain(self) -> None: ...

    def register(self, server) -> None:
        add_StageServiceServicer_to_server(self, server)
        self.add_service(server)

    def add_service(self, server) -> None:
        raise NotImplementedError

    def describe_facts(self, description) -> None:
        raise NotImplementedError

    async def DescribeStage(self, request, context):
        self.descriptions += 1
        description = stage_pb2.DescribeStageResponse(
            stage=self.stage, model=self.model, serving=self.serving, version="1", dtype=self.dtype
        )
        if self.serving:
            self.describe_facts(description)
        return description

    @asynccontextmanager
    async def handling(self, context, model: str) -> AsyncIterator[None]:
        if model != self.model:
            raise UnknownModel("model", model, (self.model,))
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_seconds.append(context.time_remaining())
        self.started.set()
        try:
            await asyncio.sleep(self.delay_seconds)
            if self.error is not None:
                raise self.error
            yield
            self.finished += 1
        except BaseException as error:
            # A cancelled call's requests may just seem to end early, and count as cancelled too.
            self.cancelled += error is not self.error
            raise


@dataclass
class FakeTextEncoder(FakeStage, text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    stage: str = "text-encoder"
    service_names: tuple[str, ...] = ("klein_api.v1.TextEncoderService",)
    tokens: int = 6
    channels: int = TEXT_CHANNELS
    truncated: bool = False
    prompts: list[str] = field(default_factory=list)
    last_frame_gate: asyncio.Event | None = None
    """Holds the last frame back until it is set."""
    endless: bool = False
    frames_sent: int = 0

    def add_service(self, server) -> None:
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)

    def describe_facts(self, description) -> None:
        description.text_encoder.sequence_length = self.tokens
        description.text_encoder.embedding_channels = self.channels

    async def EncodePrompt(self, request, context):
        async with self.handling(context, request.model):
            self.prompts.append(request.prompt)
            summary = text_pb2.PromptSummary(token_count=len(request.prompt), truncated=self.truncated)
            summary.queue_duration.FromMilliseconds(3)
            summary.compute_duration.FromMilliseconds(5)
            yield text_pb2.EncodePromptResponse(summary=summary)
            parts = frames(prompt_embedding(request.prompt, self.tokens), self.tokens, TEXT_CHANNELS)
            for index, frame in enumerate(parts):
                if self.last_frame_gate is not None and index == len(parts) - 1:
                    await self.last_frame_gate.wait()
                yield text_pb2.EncodePromptResponse(prompt_embedding=frame)
                self.frames_sent += 1
            while self.endless:
                yield text_pb2.EncodePromptResponse(prompt_embedding=TensorFrame(data=bytes(1 << 20)))
                self.frames_sent += 1


@dataclass
class FakeDenoiser(FakeStage, denoiser_service_pb2_grpc.DenoiserServiceServicer):
    stage: str = "denoiser"
    service_names: tuple[str, ...] = ("klein_api.v1.DenoiserService",)
    distilled: bool = True
    channels: int = TEXT_CHANNELS
    latent_channels: int = LATENT_CHANNELS
    step_seconds: float = 0.0
    specs: list[denoiser_pb2.DenoiseSpec] = field(default_factory=list)
    first_frame: asyncio.Event = field(default_factory=asyncio.Event)
    reading_gate: asyncio.Event | None = None
    """Holds back the reading of everything after the spec until it is set."""
    step_gate: asyncio.Event | None = None
    """Holds back every step until it is set."""
    images_made: int | None = None
    """Sends the latents of so many images only."""
    image_gates: dict[int, asyncio.Event] = field(default_factory=dict)
    steps_done: int = 0
    lost_calls: int = 0
    """So many calls end with UNAVAILABLE after their steps."""

    def add_service(self, server) -> None:
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    def describe_facts(self, description) -> None:
        facts = description.denoiser
        facts.distilled = self.distilled
        facts.default_step_count = 4 if self.distilled else 50
        facts.default_guidance_scale = 1.0 if self.distilled else 4.0
        facts.embedding_channels = self.channels
        facts.latent_channels = self.latent_channels

    async def DenoiseLatents(self, requests, context):
        messages = requests.__aiter__()
        spec = (await anext(messages)).spec
        self.specs.append(spec)
        async with self.handling(context, spec.model):
            tensors = await self._received(spec, messages)
            queued = denoiser_pb2.DenoiseQueued(position=2)
            queued.estimated_wait.FromMilliseconds(1500)
            yield denoiser_pb2.DenoiseLatentsResponse(queued=queued)
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
                (part, value) if part.endswith("embedding") else (f"{part}[{value.index}]", value.frame)
            )
            reader = readers.setdefault(name, FrameReader(name, limit_bytes=64 << 20))
            reader.add(frame)
        expected = {"prompt_embedding", *(f"reference_latents[{i}]" for i in range(spec.reference_count))}
        if not self.distilled and spec.guidance_scale > 1:
            expected.add("negative_prompt_embedding")
        if expected != readers.keys():
            raise InvalidInput.of("spec", f"expected {expected}, got {readers.keys()}")
        for reader in readers.values():
            reader.require_finished()
        return {name: bytes(reader.data) for name, reader in readers.items()}

    async def _steps(self, spec, tensors) -> AsyncIterator[denoiser_pb2.DenoiseLatentsResponse]:
        for step in range(1, spec.step_count + 1):
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

    def _latents(self, spec, index, tensors, arm) -> list[denoiser_pb2.DenoiseLatentsResponse]:
        references = [tensors[f"reference_latents[{i}]"] for i in range(spec.reference_count)]
        data = image_latents(
            spec.width_px,
            spec.height_px,
            spec.seeds[index],
            tensors["prompt_embedding"],
            tensors.get("negative_prompt_embedding", b""),
            references,
        )
        shape = (spec.height_px // 16, spec.width_px // 16, LATENT_CHANNELS)
        return [
            denoiser_pb2.DenoiseLatentsResponse(
                **{arm: denoiser_pb2.IndexedTensorFrame(index=index, frame=frame)}
            )
            for frame in frames(data, *shape)
        ]


@dataclass
class FakeVaeDecoder(FakeStage, vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    stage: str = "vae-decoder"
    service_names: tuple[str, ...] = ("klein_api.v1.VaeDecoderService",)
    latent_channels: int = LATENT_CHANNELS
    encode_error: BaseException | None = None
    decode_error: BaseException | None = None
    decode_gate: asyncio.Event | None = None
    references: list[bytes] = field(default_factory=list)
    decode_specs: list[vae_pb2.DecodeSpec] = field(default_factory=list)
    announced_extra_bytes: int = 0

    def add_service(self, server) -> None:
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(self, server)

    def describe_facts(self, description) -> None:
        description.vae_decoder.latent_channels = self.latent_channels

    async def EncodeReference(self, requests, context):
        messages = requests.__aiter__()
        spec = (await anext(messages)).spec
        async with self.handling(context, spec.model):
            data = b"".join([message.image_chunk async for message in messages])
            self.references.append(data)
            if self.encode_error is not None:
                raise self.encode_error
            if not data.startswith(b"image:"):
                raise InvalidInput.of(spec.field_name, "is not an image")
            width_px, height_px = reference_size_px(data)
            summary = vae_pb2.ReferenceSummary(width_px=width_px, height_px=height_px)
            yield vae_pb2.EncodeReferenceResponse(summary=summary)
            for frame in frames(reference_latents(data), height_px // 16, width_px // 16, LATENT_CHANNELS):
                yield vae_pb2.EncodeReferenceResponse(reference_latents=frame)

    async def DecodeLatents(self, requests, context):
        messages = requests.__aiter__()
        spec = (await anext(messages)).spec
        self.decode_specs.append(spec)
        async with self.handling(context, spec.model):
            reader = FrameReader("latents", limit_bytes=64 << 20)
            async for message in messages:
                reader.add(message.latents)
            reader.require_finished()
            if self.decode_gate is not None:
                await self.decode_gate.wait()
            if self.decode_error is not None:
                raise self.decode_error
            quality = spec.quality if spec.HasField("quality") else None
            image = encoded_image(bytes(reader.data), spec.format, quality)
            rows, columns, _ = reader.spec.shape
            yield vae_pb2.DecodeLatentsResponse(
                summary=vae_pb2.DecodeSummary(
                    width_px=columns * 16,
                    height_px=rows * 16,
                    format=spec.format,
                    size_bytes=len(image) + self.announced_extra_bytes,
                )
            )
            yield vae_pb2.DecodeLatentsResponse(image_chunk=image[:7])
            yield vae_pb2.DecodeLatentsResponse(image_chunk=image[7:])


@dataclass
class FakeSuite:
    """Three fake stages and a real orchestrator, each on a port of its own."""

    text_encoder: FakeTextEncoder = field(default_factory=FakeTextEncoder)
    denoiser: FakeDenoiser = field(default_factory=FakeDenoiser)
    vae_decoder: FakeVaeDecoder = field(default_factory=FakeVaeDecoder)
    settings: dict[str, object] = field(default_factory=dict)
    orchestrator: Orchestrator = field(init=False)
    images: ImageServiceStub = field(init=False)
    targets: dict[str, str] = field(init=False)
    channel: grpc.aio.Channel = field(init=False)

    @property
    def stages(self) -> tuple[FakeTextEncoder, FakeDenoiser, FakeVaeDecoder]:
        return self.text_encoder, self.denoiser, self.vae_decoder

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeSuite]:
        async with AsyncExitStack() as stack:
            self.targets = {
                stage.stage: await stack.enter_async_context(running_server(stage)) for stage in self.stages
            }
            defaults: dict[str, object] = {
                "model_name": MODEL,
                "text_encoder_target": self.targets["text-encoder"],
                "denoiser_target": self.targets["denoiser"],
                "vae_decoder_target": self.targets["vae-decoder"],
                "default_size_px": 64,
                "metrics_port": 0,
                "port": 0,
                "drain_delay_seconds": 0.0,
            }
            settings = OrchestratorSettings(**(defaults | self.settings))  # type: ignore[arg-type]
            self.orchestrator = Orchestrator(settings, settings.table())
            address = await stack.enter_async_context(running_server(self.orchestrator, settings))
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            self.channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options))
            self.images = ImageServiceStub(self.channel)
            yield self

    def expected_image(
        self,
        prompt: str,
        seed: int,
        size_px: tuple[int, int] = (64, 64),
        references: tuple[bytes, ...] = (),
        negative: str | None = None,
        image_format: int = 1,
        quality: int | None = None,
    ) -> bytes:
        """What a request must give, worked out without any server."""
        tokens = self.text_encoder.tokens
        negative_embedding = b"" if negative is None else prompt_embedding(negative, tokens)
        latents = image_latents(
            *size_px,
            seed,
            prompt_embedding(prompt, tokens),
            negative_embedding,
            [reference_latents(data) for data in references],
        )
        return encoded_image(latents, image_format, quality)

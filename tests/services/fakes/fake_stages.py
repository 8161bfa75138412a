"""Encoders and a decoder that compute nothing, obey tests, and answer with bytes of all that they were sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from klein_api.v1 import stage_service_pb2 as stage_pb2
from klein_api.v1 import text_encoder_service_pb2 as text_pb2
from klein_api.v1 import text_encoder_service_pb2_grpc, vae_decoder_service_pb2_grpc
from klein_api.v1 import vae_decoder_service_pb2 as vae_pb2
from klein_api.v1.stage_service_pb2_grpc import StageServiceServicer, add_StageServiceServicer_to_server
from klein_api.v1.tensor_pb2 import TensorFrame
from klein_core.errors import InvalidInput
from klein_services.runtime.errors import StageUnavailable, UnknownModel
from klein_services.runtime.frames import MAX_FRAME_BYTES, FrameReader
from klein_services.runtime.stage import Service
from tests.services.fakes.fake_tensors import (
    LATENT_CHANNELS,
    TEXT_CHANNELS,
    encoded_image,
    frames,
    initial_latents,
    overlaid,
    prompt_embedding,
    reference_latents,
    reference_size_px,
    token_mask,
    without_png_header,
)

MODEL = "fake"


async def spec_of(messages):
    """Returns the spec of a call's first message; a client that is cancelled in time sends none."""
    async for message in messages:
        return message.spec
    raise InvalidInput.of("spec", "is missing")


@dataclass
class FakeStage(Service, StageServiceServicer):
    """What all three have in common. Tests set the fields at any time."""

    stage: str = ""
    model: str = MODEL
    dtype: str = "f32"
    weights_digest: str = "first"
    serving: bool = True
    error: BaseException | None = None
    """Raised by the next calls instead of an answer."""
    delay_seconds: float = 0.0
    calls: int = 0
    descriptions: int = 0
    describe_gate: asyncio.Event | None = None
    """Holds descriptions back until it is set."""
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
        if self.describe_gate is not None:
            await self.describe_gate.wait()
        description = stage_pb2.DescribeStageResponse(
            stage=self.stage,
            model=self.model,
            serving=self.serving,
            version="1",
            dtype=self.dtype,
            weights_digest=self.weights_digest,
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
class FakeVaeDecoder(FakeStage, vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    stage: str = "vae-decoder"
    service_names: tuple[str, ...] = ("klein_api.v1.VaeDecoderService",)
    latent_channels: int = LATENT_CHANNELS
    encode_error: BaseException | None = None
    decode_error: BaseException | None = None
    lost_decodes: int = 0
    """So many decodings end with UNAVAILABLE."""
    reading_gate: asyncio.Event | None = None
    """Holds back the reading of latents until it is set."""
    decode_gate: asyncio.Event | None = None
    chunk_gate: asyncio.Event | None = None
    """Holds an image back, but not its summary, until it is set."""
    references: list[bytes] = field(default_factory=list)
    initial_images: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    """Files of the initial images and masks that were encoded."""
    decode_specs: list[vae_pb2.DecodeSpec] = field(default_factory=list)
    announced_extra_bytes: int = 0
    padding: bytes = b""
    """Follows every image."""
    files: dict[int, bytes] = field(default_factory=dict)
    """Image files by format, for tests that need real ones; a format without one gets the bytes of its inputs."""

    def add_service(self, server) -> None:
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(self, server)

    def describe_facts(self, description) -> None:
        description.vae_decoder.latent_channels = self.latent_channels

    async def EncodeReference(self, requests, context):
        messages = requests.__aiter__()
        spec = await spec_of(messages)
        async with self.handling(context, spec.model):
            data = b"".join([message.image_chunk async for message in messages])
            self.references.append(data)
            if self.encode_error is not None:
                raise self.encode_error
            if not without_png_header(data).startswith(b"image:"):
                raise InvalidInput.of(spec.field_name, "is not an image")
            width_px, height_px = reference_size_px(data)
            summary = vae_pb2.ReferenceSummary(width_px=width_px, height_px=height_px)
            yield vae_pb2.EncodeReferenceResponse(summary=summary)
            for frame in frames(reference_latents(data), height_px // 16, width_px // 16, LATENT_CHANNELS):
                yield vae_pb2.EncodeReferenceResponse(reference_latents=frame)

    async def EncodeInitialImage(self, requests, context):
        messages = requests.__aiter__()
        spec = await spec_of(messages)
        async with self.handling(context, spec.model):
            image, mask = self._files([message async for message in messages], "image_chunk")
            self.initial_images.append((image, mask))
            if self.encode_error is not None:
                raise self.encode_error
            if not without_png_header(image).startswith(b"image:"):
                raise InvalidInput.of("initial_image", "is not an image")
            if mask is not None and not without_png_header(mask).startswith(b"mask:"):
                raise InvalidInput.of("mask", "is not an image")
            width_px, height_px = reference_size_px(image)
            rows, columns = height_px // 16, width_px // 16
            summary = vae_pb2.ReferenceSummary(width_px=width_px, height_px=height_px)
            yield vae_pb2.EncodeInitialImageResponse(summary=summary)
            for frame in frames(
                initial_latents(spec.inpainting, image, mask), rows, columns, LATENT_CHANNELS
            ):
                yield vae_pb2.EncodeInitialImageResponse(initial_latents=frame)
            for frame in frames(token_mask(spec.inpainting, image, mask), rows, columns, 1):
                yield vae_pb2.EncodeInitialImageResponse(mask=frame)

    def _files(self, messages, image_part: str) -> tuple[bytes, bytes | None]:
        """Joins the chunks of an initial image and its mask, which must come in this order."""
        parts = [message.WhichOneof("part") for message in messages]
        if parts != sorted(parts, key=[image_part, "mask_chunk"].index):
            raise InvalidInput.of("spec", f"is followed by {parts}")
        image = b"".join(getattr(message, image_part) for message in messages)
        mask = b"".join(message.mask_chunk for message in messages)
        return image, mask if "mask_chunk" in parts else None

    async def DecodeLatents(self, requests, context):
        messages = requests.__aiter__()
        spec = await spec_of(messages)
        self.decode_specs.append(spec)
        async with self.handling(context, spec.model):
            if self.reading_gate is not None:
                await self.reading_gate.wait()
            reader = FrameReader("latents", limit_bytes=64 << 20)
            files = []
            async for message in messages:
                if message.WhichOneof("part") == "latents":
                    reader.add(message.latents)
                elif reader.data:
                    raise InvalidInput.of("initial_image", "comes after latents")
                else:
                    files.append(message)
            reader.require_finished()
            if self.decode_gate is not None:
                await self.decode_gate.wait()
            if self.lost_decodes:
                self.lost_decodes -= 1
                raise StageUnavailable("lost")
            if self.decode_error is not None:
                raise self.decode_error
            quality = spec.quality if spec.HasField("quality") else None
            latents = bytes(reader.data)
            if spec.HasField("overlay"):
                latents = overlaid(latents, spec.overlay, *self._files(files, "initial_image_chunk"))
            elif files:
                raise InvalidInput.of("overlay", "is not set, and files came")
            image = self.files.get(spec.format) or encoded_image(latents, spec.format, quality) + self.padding
            rows, columns, _ = reader.spec.shape
            yield vae_pb2.DecodeLatentsResponse(
                summary=vae_pb2.DecodeSummary(
                    width_px=columns * 16,
                    height_px=rows * 16,
                    format=spec.format,
                    size_bytes=len(image) + self.announced_extra_bytes,
                )
            )
            if self.chunk_gate is not None:
                await self.chunk_gate.wait()
            yield vae_pb2.DecodeLatentsResponse(image_chunk=image[:7])
            for start in range(7, len(image), MAX_FRAME_BYTES):
                yield vae_pb2.DecodeLatentsResponse(image_chunk=image[start : start + MAX_FRAME_BYTES])

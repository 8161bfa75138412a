"""Stub stages: they only send, check and hash tensors of klein-4B's sizes at 1024 × 1024."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

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
from klein_api.v1.image_pb2 import IMAGE_FORMAT_PNG
from klein_api.v1.tensor_pb2 import DATA_TYPE_BF16
from klein_services.runtime.frames import (
    MAX_FRAME_BYTES,
    FrameEnvelope,
    FrameReader,
    TensorSpec,
    serialized_frames,
)
from klein_services.runtime.stage import DescribeStageServicer, Service

EMBEDDING = TensorSpec(DATA_TYPE_BF16, (512, 7680))
LATENTS = TensorSpec(DATA_TYPE_BF16, (64, 64, 128))
IMAGE_BYTES = 3 << 19
SIDE_PX = 1024
STEPS = 4
_PROMPT_FRAME = FrameEnvelope(text_pb2.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)
_LATENTS_FRAME = FrameEnvelope(denoiser_pb2.DenoiseLatentsResponse.LATENTS_FIELD_NUMBER, index=0)


class StubStage(Service):
    """A stage of klein-4B's tensor sizes that computes nothing."""

    service: str

    def __init__(self) -> None:
        self.service_names = (f"klein_api.v1.{self.service}",)
        self._description = DescribeStageServicer(stage=self.name, model="stub", load=stage_pb2.StageLoad)

    def register(self, server: grpc.aio.Server) -> None:
        self._description.register(server)
        self.add(server)

    @abstractmethod
    def add(self, server: grpc.aio.Server) -> None:
        """Registers the stage's own service."""

    async def load(self) -> None:
        facts: dict[str, Any] = {
            "text-encoder": stage_pb2.TextEncoderFacts(sequence_length=512, embedding_channels=7680),
            "denoiser": stage_pb2.DenoiserFacts(
                distilled=True,
                default_step_count=STEPS,
                default_guidance_scale=1,
                embedding_channels=7680,
                latent_channels=128,
            ),
            "vae-decoder": stage_pb2.VaeDecoderFacts(latent_channels=128),
        }
        self._description.loaded(device="none", dtype="bf16", weights_digest="stub", facts=facts[self.name])

    async def drain(self) -> None:
        self._description.draining()


class StubTextEncoder(StubStage, text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Sends the same embedding for every prompt."""

    name = "text-encoder"
    service = "TextEncoderService"
    _data = secrets.token_bytes(EMBEDDING.byte_count)

    def add(self, server: grpc.aio.Server) -> None:
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)

    async def EncodePrompt(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield text_pb2.EncodePromptResponse(summary=text_pb2.PromptSummary(token_count=20))
        for message in serialized_frames(memoryview(self._data), EMBEDDING, _PROMPT_FRAME):
            yield message


class StubDenoiser(StubStage, denoiser_service_pb2_grpc.DenoiserServiceServicer):
    """Reads and checks an embedding, posts four steps, sends the same latents."""

    name = "denoiser"
    service = "DenoiserService"
    _data = secrets.token_bytes(LATENTS.byte_count)

    def add(self, server: grpc.aio.Server) -> None:
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def DenoiseLatents(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        reader = FrameReader("prompt_embedding", limit_bytes=EMBEDDING.byte_count)
        async for request in requests:
            if request.WhichOneof("part") == "spec":
                yield denoiser_pb2.DenoiseLatentsResponse(queued=denoiser_pb2.DenoiseQueued())
            if request.WhichOneof("part") == "prompt_embedding":
                reader.add(request.prompt_embedding)
        reader.require_finished()
        yield denoiser_pb2.DenoiseLatentsResponse(started=denoiser_pb2.DenoiseStarted(step_count=STEPS))
        for step in range(1, STEPS + 1):
            yield denoiser_pb2.DenoiseLatentsResponse(
                step=denoiser_pb2.DenoiseStep(step=step, step_count=STEPS)
            )
        for message in serialized_frames(memoryview(self._data), LATENTS, _LATENTS_FRAME):
            yield message
        yield denoiser_pb2.DenoiseLatentsResponse(summary=denoiser_pb2.DenoiseSummary(step_count=STEPS))


class StubVaeDecoder(StubStage, vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    """Reads and checks latents, sends the same image."""

    name = "vae-decoder"
    service = "VaeDecoderService"
    _data = secrets.token_bytes(IMAGE_BYTES)

    def add(self, server: grpc.aio.Server) -> None:
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(self, server)

    async def DecodeLatents(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        reader = FrameReader("latents", limit_bytes=LATENTS.byte_count)
        async for request in requests:
            if request.WhichOneof("part") == "latents":
                reader.add(request.latents)
        reader.require_finished()
        summary = vae_pb2.DecodeSummary(
            width_px=SIDE_PX, height_px=SIDE_PX, format=IMAGE_FORMAT_PNG, size_bytes=IMAGE_BYTES
        )
        yield vae_pb2.DecodeLatentsResponse(summary=summary)
        for start in range(0, IMAGE_BYTES, MAX_FRAME_BYTES):
            yield vae_pb2.DecodeLatentsResponse(image_chunk=self._data[start : start + MAX_FRAME_BYTES])


STUBS: dict[str, Callable[[], StubStage]] = {
    "text-encoder": StubTextEncoder,
    "denoiser": StubDenoiser,
    "vae-decoder": StubVaeDecoder,
}

"""A real orchestrator before fake stages, and how tests call it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc

from klein_api.v1.image_service_pb2 import GenerateImageRequest, ImageSpec
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.server import running_server
from klein_services.runtime.status import explain
from tests.services.fakes.fake_denoiser import FakeDenoiser
from tests.services.fakes.fake_stages import MODEL, FakeTextEncoder, FakeVaeDecoder
from tests.services.fakes.fake_tensors import (
    encoded_image,
    image_latents,
    initial_latents,
    overlaid,
    prompt_embedding,
    reference_latents,
    token_mask,
)
from tests.services.fakes.runtime_toy import failure, until


@dataclass
class FakeSuite:
    """Three fake stages and a real orchestrator, each on its own port."""

    text_encoder: FakeTextEncoder = field(default_factory=FakeTextEncoder)
    denoiser: FakeDenoiser = field(default_factory=FakeDenoiser)
    vae_decoder: FakeVaeDecoder = field(default_factory=FakeVaeDecoder)
    settings: dict[str, object] = field(default_factory=dict)
    orchestrator: Orchestrator = field(init=False)
    images: ImageServiceStub = field(init=False)
    targets: dict[str, str] = field(init=False)
    address: str = field(init=False)
    """Of the orchestrator."""
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
                "stage_wait_seconds": 0.0,
                "drain_delay_seconds": 0.0,
            }
            settings = OrchestratorSettings(**(defaults | self.settings))  # type: ignore[arg-type]
            self.orchestrator = Orchestrator(settings, settings.table())
            self.address = await stack.enter_async_context(running_server(self.orchestrator, settings))
            options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            self.channel = await stack.enter_async_context(grpc.aio.insecure_channel(self.address, options))
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
        edit: MaskedEdit | None = None,
    ) -> bytes:
        """What a request must give, worked out without any server."""
        tokens = self.text_encoder.tokens
        negative_embedding = b"" if negative is None else prompt_embedding(negative, tokens)
        painted = []
        if edit is not None:
            files = edit.inpainting, edit.initial_image, edit.mask
            painted = [initial_latents(*files), token_mask(*files), repr(edit.strength).encode()]
        latents = image_latents(
            *size_px,
            seed,
            prompt_embedding(prompt, tokens),
            negative_embedding,
            [*painted, *(reference_latents(data) for data in references)],
        )
        if edit is not None and edit.has_overlay:
            latents = overlaid(latents, edit.inpainting, edit.initial_image, edit.mask)
        return encoded_image(latents, image_format, quality)


async def generate(suite, *, within_seconds=None, **spec):
    """Makes images through the unary method."""
    request = GenerateImageRequest(spec=ImageSpec(**spec))
    return await suite.images.GenerateImage(request, timeout=within_seconds)


async def refusal(suite, **options):
    """Returns the status details of a request that must fail."""
    return explain(await failure(generate(suite, **options)))


async def drained(call, events=None) -> None:
    """Reads a stream to its end."""
    async for event in call:
        if events is not None:
            events.append(event)


def parts_running() -> set[str]:
    """Returns the parts of requests that have tasks now."""
    names = ("Generation.run", "ImageDelivery.", "InputEncoder.")
    return {name for name in names for task in asyncio.all_tasks() if name in repr(task)}


async def nothing_left_running() -> None:
    """Waits until no request has a task any more."""
    await until(lambda: not parts_running())


async def standstill(count: Callable[[], int], seconds: float = 0.5) -> int:
    """Waits until something has begun and then not gone on for so long; returns how far it came."""
    await until(lambda: count() > 0)
    async with asyncio.timeout(30):
        before = 0
        while (now := count()) != before:
            before = now
            await asyncio.sleep(seconds)
    return before

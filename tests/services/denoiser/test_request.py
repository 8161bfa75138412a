"""What a request holds in memory: bounded by what it really brings, and held once."""

from __future__ import annotations

import asyncio
import weakref

import grpc
import pytest
import torch

from klein_services.denoiser.request import Model, RequestLimits, RequestReader
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    EMBEDDING_CHANNELS,
    LATENT_CHANNELS,
    Tensors,
    denoise,
    gated_steps,
    image,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)


def test_frames_are_let_go_once_the_tensors_are_made():
    model = Model(
        name="tiny",
        is_distilled=True,
        embedding_channels=EMBEDDING_CHANNELS,
        latent_channels=LATENT_CHANNELS,
        dtype=torch.float32,
    )
    limits = RequestLimits(image_count=1, reference_count=1, reference_tokens=16, text_tokens=16)
    reader = RequestReader(model, limits, on_order=lambda order: None)
    given = Tensors()
    for part in request(spec(), given):
        reader.accept(part)
    intake = weakref.ref(reader._intake)
    conditioning = reader.finish()
    assert torch.equal(conditioning.prompt_embedding, given.prompt_embedding)
    assert intake() is None


async def test_references_that_take_more_memory_than_others_leave_are_refused_as_overload(
    tmp_path, monkeypatch
):
    """A reference of 160 x 128 tokens of 64 bytes takes 1.25 MiB, which the spec alone does not tell."""
    large = Tensors(references=(image(160, 128),))
    folder = save_checkpoint(tmp_path, distilled=True)
    with gated_steps(monkeypatch) as gate:
        gate.hold()
        async with running_denoiser(folder, memory_limit_mib=1) as channel:
            running = asyncio.create_task(denoise(channel, request(spec())))
            await gate.blocked(0)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await denoise(channel, request(spec(reference_count=1), large))
            details = explain(failure.value)
            assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            gate.release()
            assert len((await running).latents) == 1

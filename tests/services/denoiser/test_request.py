"""Memory of a request: frames are released once tensors are assembled, and references are bounded."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest

from klein_services.denoiser.request import TensorReader
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    Tensors,
    denoise,
    eventually,
    gated_steps,
    image,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)


async def test_frames_are_released_before_the_first_step(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, distilled=True)
    gc.collect()  # errors of earlier tests may hold theirs in a cycle
    with gated_steps(monkeypatch) as gate:
        gate.hold()
        async with running_denoiser(folder) as channel:
            running = asyncio.create_task(denoise(channel, request(spec())))
            await gate.blocked(0)
            # The engine may step before the handler has returned from the submission.
            await eventually(lambda: not any(type(each) is TensorReader for each in gc.get_objects()))
            assert not running.done()
            gate.release()
            assert len((await running).latents) == 1


async def test_references_that_take_more_memory_than_others_leave_are_refused_as_overload(
    tmp_path, monkeypatch
):
    """A reference of 160 x 128 tokens of 64 bytes takes 1.25 MiB, which the spec does not show."""
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

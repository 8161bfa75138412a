"""Calls of a denoiser that must fail, with limits small enough to reach."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import stage_service_pb2
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.runtime.status import StatusDetails, explain
from tests.services.fakes.denoiser_server import denoise, running_denoiser, save_checkpoint

LIMITS = {
    "reference_limit": 3,
    "reference_token_limit": 100,
    "image_limit": 4,
    "text_token_limit": 16,
    "receive_timeout_seconds": 3.0,
}


def save_both_variants(factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Writes a distilled checkpoint and a base one; returns their folders by whether they are distilled."""
    return {
        distilled: save_checkpoint(factory.mktemp("tiny"), distilled=distilled) for distilled in (True, False)
    }


async def refusal(folder: Path, parts: Iterable[api.DenoiseLatentsRequest]) -> StatusDetails:
    """Makes a call that must fail, and checks that the server has dropped it."""
    async with running_denoiser(folder, **LIMITS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, parts)
        async with asyncio.timeout(10):
            while True:
                answer = await StageServiceStub(channel).DescribeStage(
                    stage_service_pb2.DescribeStageRequest()
                )
                if answer.load.queued_count == answer.load.running_count == 0:
                    break
    return explain(failure.value)

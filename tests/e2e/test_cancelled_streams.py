"""Streams that clients cancel give their slots back, over real processes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient, Generation, Overloaded
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_services.cli.suite import Suite, SuiteOptions
from tests.e2e.running_suite import READY_SECONDS, Case, Running, picture

SLOTS = 8
CANCELLED = 320
LATEST_CANCEL_SECONDS = 0.12
RELEASE_SECONDS = 120.0
"""Far less than the hour after which a request's time limit frees a slot that was lost."""
EDIT = Case("the shape of image 1 on the background of image 2", size=(64, 64))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    options = SuiteOptions(threads=1, device="cpu", settings={"KLEIN_QUEUE_LIMIT": str(SLOTS)})
    with Suite(options) as suite:
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        yield Running(suite, Pipeline.from_folder(WEIGHTS), (64, 64), None)


def edit(seed: int) -> Case:
    """Returns an edit whose references and prompt no cache has."""
    return Case(
        f"{seed} {EDIT.prompt}", EDIT.size, (picture(96, 80, 2 * seed), picture(70, 130, 2 * seed + 1))
    )


async def cancel_streams(running: Running, count: int) -> None:
    """Starts `count` streams, at most `SLOTS` at once, and cancels each at a random moment."""
    moments = random.Random(0)

    async def one(stub, seed: int) -> None:
        request = api.StreamGenerateImageRequest(spec=edit(seed).spec(running.default_size))
        call = stub.StreamGenerateImage(request, timeout=60)
        await asyncio.sleep(moments.uniform(0, LATEST_CANCEL_SECONDS))
        call.cancel()

    async with AsyncClient(running.suite.target) as client:
        stub = client.stub()
        for first in range(0, count, SLOTS):
            await asyncio.gather(*(one(stub, seed) for seed in range(first, first + SLOTS)))


def ask_until_admitted(running: Running, cases: list[Case]) -> list[Generation]:
    """Repeats all requests at once while the last cancelled ones still hold slots."""
    end = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            return running.ask(*cases)
        except Overloaded:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


def test_every_slot_is_free_again_after_hundreds_of_cancelled_edits(running: Running) -> None:
    asyncio.run(cancel_streams(running, CANCELLED))
    # Text-to-image: two references each would be more than the vae-decoder's queue takes.
    cases = [Case(f"a blue star {index}", size=(64, 64)) for index in range(SLOTS)]
    for case, generation in zip(cases, ask_until_admitted(running, cases), strict=True):
        expected = case.expected(running.pipeline, running.default_size)
        assert [image.data for image in generation.images] == expected

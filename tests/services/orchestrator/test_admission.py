"""A request is admitted by its denoiser before anything is encoded for it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from klein_services.runtime.errors import DeadlineUnreachable, QueueFull
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running, refusal
from tests.services.fakes.runtime_toy import failure, until

REFERENCES = [b"image:64x96", b"image:128x64"]


@pytest.fixture
async def suite():
    async with FakeSuite(settings={"cache_bytes": 0}).running() as suite:
        yield suite


@pytest.mark.parametrize("error", [QueueFull(4, 2.5), DeadlineUnreachable(1.0, 20.0)])
async def test_refused_requests_cost_no_encoding(suite, error):
    suite.denoiser.error = error
    sized = {"references": REFERENCES, "width_px": 64, "height_px": 64}
    failures = await asyncio.gather(
        *(failure(generate(suite, prompt=f"fox {number}", **sized)) for number in range(20))
    )
    assert {error.code() for error in failures} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert suite.denoiser.calls == 20
    assert (suite.text_encoder.calls, suite.vae_decoder.calls) == (0, 0)


async def test_nothing_is_encoded_until_the_denoiser_has_answered(suite):
    suite.denoiser.admission_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(lambda: suite.denoiser.calls == 1)
    await asyncio.sleep(0.2)
    assert suite.text_encoder.calls == 0
    suite.denoiser.admission_gate.set()
    assert (await request).images[0].data == suite.expected_image("fox", 1)


async def test_a_request_that_is_cancelled_before_its_admission_encodes_nothing(suite):
    suite.denoiser.admission_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(lambda: suite.denoiser.calls == 1)
    request.cancel()
    await until(lambda: suite.denoiser.cancelled == 1)
    await nothing_left_running()
    assert suite.text_encoder.calls == 0


async def test_of_an_edit_without_size_only_the_first_reference_is_encoded_before(suite):
    suite.denoiser.error = QueueFull(4, 2.5)
    details = await refusal(suite, prompt="fox", references=REFERENCES)
    assert (details.reason, details.retry_after_seconds) == ("QUEUE_FULL", 2.5)
    assert suite.vae_decoder.references == REFERENCES[:1]
    assert suite.text_encoder.calls == 0


async def test_of_a_masked_edit_without_size_only_the_initial_image_is_encoded_before(suite):
    suite.denoiser.error = QueueFull(4, 2.5)
    await refusal(suite, prompt="fox", references=REFERENCES, initial_image=b"image:64x64", mask=b"mask:")
    assert [image for image, _ in suite.vae_decoder.initial_images] == [b"image:64x64"]
    assert (suite.vae_decoder.references, suite.text_encoder.calls) == ([], 0)


async def test_a_refused_first_reference_does_not_hide_another_and_costs_no_prompt(suite):
    details = await refusal(suite, prompt="fox", references=[b"no picture", *REFERENCES, b"none either"])
    assert {violation.field for violation in details.violations} == {"references[0]", "references[3]"}
    assert (suite.text_encoder.calls, suite.denoiser.calls) == (0, 0)

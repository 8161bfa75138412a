"""The trace of one request through a real orchestrator, and the prompts that it and the logs must not have."""

from __future__ import annotations

import asyncio
import json
import logging

import grpc
import pytest
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_services.runtime.logs import REQUEST_ID_KEY
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import (
    FakeSuite,
    drained,
    generate,
    nothing_left_running,
    refusal,
)
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.span_collector import export

PROMPT = "a vermilion axolotl"
REFERENCE = reference_file(64, 96, "a")
SERVICE = "klein_api.v1.ImageService"
PUBLIC = f"{SERVICE}/GenerateImage"
ENCODE = "klein_api.v1.TextEncoderService/EncodePrompt"
REFERENCES = "klein_api.v1.VaeDecoderService/EncodeReference"
DENOISE = "klein_api.v1.DenoiserService/DenoiseLatents"
DECODE = "klein_api.v1.VaeDecoderService/DecodeLatents"


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


def path(collector, span):
    return [(each.kind, each.name) for each in ancestors(collector, span)]


def ancestors(collector, span):
    found = []
    while span is not None:
        found.insert(0, span)
        span = collector.parent_of(span)
    return found


def images_in_progress() -> float:
    """Returns the calls of the public API that have begun and not ended."""
    counts = {"grpc_server_started_total": 0.0, "grpc_server_handled_total": 0.0}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name in counts and sample.labels["grpc_service"] == SERVICE:
                counts[sample.name] += sample.value
    return counts["grpc_server_started_total"] - counts["grpc_server_handled_total"]


async def end_and_export() -> None:
    """Exports the spans once the server's have ended: a client has its answer a moment before."""
    await until(lambda: not images_in_progress())
    await export()


async def test_a_request_is_one_trace_from_its_arrival_to_its_decoded_image(span_collector, suite):
    answer = await generate(suite, prompt=PROMPT, seed=7, image_count=2, references=[REFERENCE])
    assert len(answer.images) == 2
    await end_and_export()
    assert len({span.trace for span in span_collector.spans}) == 1
    root = [("SERVER", PUBLIC), ("INTERNAL", "generate_content fake")]
    paths = [path(span_collector, span) for span in span_collector.spans]
    for method, count in ((ENCODE, 1), (REFERENCES, 1), (DENOISE, 1), (DECODE, 2)):
        assert paths.count([*root, ("CLIENT", method)]) == count
        assert paths.count([*root, ("CLIENT", method), ("SERVER", method)]) == count
    for hop, count in (
        ("hop text-encoder → denoiser", 1),
        ("hop vae-decoder → denoiser", 1),
        ("hop denoiser → vae-decoder", 2),
        ("hop vae-decoder → orchestrator", 2),
    ):
        assert paths.count([*root, ("INTERNAL", hop)]) == count
    assert paths.count([*root, ("INTERNAL", "describe stages")]) == 1
    assert len(paths) == 2 + 5 * 2 + 6 + 1
    assert not any(span.is_error for span in span_collector.spans)


async def test_the_requests_span_has_the_attributes_of_the_conventions(span_collector, suite):
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(
            spec=ImageSpec(prompt=PROMPT, seed=7, image_count=2, references=[REFERENCE], step_count=3)
        ),
        metadata=((REQUEST_ID_KEY, "r7"),),
    )
    await drained(call)
    await end_and_export()
    (span,) = span_collector.named("generate_content fake")
    assert span.attributes == {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.output.type": "image",
        "gen_ai.provider.name": "klein-suite",
        "gen_ai.request.model": "fake",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "r7",
        "gen_ai.response.model": "fake",
        "klein.request_id": "r7",
        "klein.flow": "edit",
        "klein.image.width": 64,
        "klein.image.height": 96,
        "klein.steps": 3,
        "klein.guidance_scale": 1.0,
        "klein.reference_count": 1,
    }
    assert [attributes["klein.cache.outcome"] for _, attributes in span.events] == ["miss", "miss"]
    servers = [each for each in span_collector.spans if each.kind == "SERVER"]
    assert {each.attributes["klein.request_id"] for each in servers} == {"r7"}


async def test_no_prompt_is_in_traces_or_logs_unless_the_setting_asks(span_collector, suite, caplog):
    caplog.set_level(logging.DEBUG)
    await generate(suite, prompt=PROMPT, seed=1)
    await refusal(suite, prompt=PROMPT, width_px=63)
    await end_and_export()
    assert "axolotl" not in str(span_collector.requests)
    lines = [str(vars(record)) for record in caplog.records]
    assert len(lines) > 4
    assert not any("axolotl" in line for line in lines)


async def test_prompts_are_recorded_when_the_setting_asks(span_collector, caplog):
    caplog.set_level(logging.INFO)
    async with FakeSuite(settings={"log_prompts": True}).running() as suite:
        await generate(suite, prompt=PROMPT, seed=1)
    await end_and_export()
    (span,) = span_collector.named("generate_content fake")
    assert json.loads(span.attributes["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": PROMPT}]}
    ]
    assert [record.prompt for record in caplog.records if record.getMessage() == "prompt"] == [PROMPT]


async def test_failures_have_their_code_in_every_span_that_they_pass(span_collector, suite):
    suite.denoiser.error = grpc.StatusCode.INTERNAL and RuntimeError("broken")
    await refusal(suite, prompt=PROMPT, seed=1)
    await end_and_export()
    (request,) = span_collector.named("generate_content fake")
    (client,) = [span for span in span_collector.named(DENOISE) if span.kind == "CLIENT"]
    (server,) = span_collector.named(PUBLIC)
    for span in (request, client, server):
        assert span.is_error
        assert span.attributes["error.type"] == "INTERNAL"
    assert client.attributes["rpc.response.status_code"] == "INTERNAL"
    assert "broken" not in str(span_collector.requests)


async def test_a_request_whose_client_went_away_ends_every_span_as_cancelled(span_collector, suite):
    suite.denoiser.step_gate = asyncio.Event()
    request = asyncio.create_task(generate(suite, prompt=PROMPT, seed=1))
    await until(lambda: suite.denoiser.calls == 1)
    request.cancel()
    await nothing_left_running()
    await until(lambda: suite.denoiser.cancelled == 1)
    await end_and_export()
    (span,) = span_collector.named("generate_content fake")
    assert not span.is_error
    denoising = {each.kind: each for each in span_collector.named(DENOISE)}
    assert denoising.keys() == {"CLIENT", "SERVER"}
    assert denoising["CLIENT"].attributes["rpc.response.status_code"] == "CANCELLED"


async def test_an_unknown_model_has_a_span_with_a_bounded_name(span_collector, suite):
    await refusal(suite, prompt=PROMPT, model="x" * 500)
    await end_and_export()
    (span,) = span_collector.named("generate_content unknown")
    assert span.attributes["error.type"] == "NOT_FOUND"

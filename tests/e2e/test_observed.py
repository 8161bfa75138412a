"""Real processes as their operators see them: one trace a request, logs without prompts, phases of the start."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from klein_client import AsyncClient
from klein_services.cli.process import SUITE
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.scrape import scrape
from tests.e2e.running_suite import READY_SECONDS, Case, picture
from tests.services.fakes.span_collector import SpanCollector, collecting

PROMPT = "a large red heart, sesquipedalian, on a yellow background"
GENERATION = "generate_content pico"
REQUEST = ["orchestrator: klein_api.v1.ImageService/StreamGenerateImage", f"orchestrator: {GENERATION}"]
TEXT = "klein_api.v1.TextEncoderService/EncodePrompt"
DENOISE = "klein_api.v1.DenoiserService/DenoiseLatents"
DECODE = "klein_api.v1.VaeDecoderService/DecodeLatents"
REFERENCE = "klein_api.v1.VaeDecoderService/EncodeReference"


def between(stage: str, method: str) -> list[str]:
    return [*REQUEST, f"orchestrator: {method}", f"{stage}: {method}"]


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """Returns collector, log files, metrics pages and summary of a suite that made one image and has stopped."""

    async def ask(suite):
        options = Case(PROMPT, references=(picture(64, 64, 1),)).arguments((None, None))
        async with AsyncClient(suite.target) as client:
            return await client.generate(PROMPT, timeout_seconds=READY_SECONDS, **options)

    folder = tmp_path_factory.mktemp("observed")
    with collecting() as collector:
        settings = {
            "KLEIN_OTLP_ENDPOINT": collector.endpoint,
            "KLEIN_LOG_LEVEL": "debug",
            "KLEIN_LOG_FORMAT": "json",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        options = SuiteOptions(model="pico", device="cpu", threads=1, log_folder=folder, settings=settings)
        with Suite(options) as suite:
            suite.wait_until_ready(timeout_seconds=READY_SECONDS)
            generation = asyncio.run(ask(suite))
            pages = {process: scrape(f"127.0.0.1:{port}") for process, port in suite.metrics_ports.items()}
        yield collector, folder, pages, generation.summary


def test_a_request_is_one_trace_over_four_processes(observed):
    collector: SpanCollector = observed[0]
    spans = [span for span in collector.spans if span.trace == collector.named(GENERATION)[0].trace]
    paths = [collector.path_of(span) for span in spans]
    for path in (
        [*between("text-encoder", TEXT), "text-encoder: queue"],
        [*between("text-encoder", TEXT), "text-encoder: encode-prompt"],
        [*between("vae-decoder", REFERENCE), "vae-decoder: read-reference"],
        [*between("vae-decoder", REFERENCE), "vae-decoder: encode-reference"],
        [*between("denoiser", DENOISE), "denoiser: queue"],
        [*between("denoiser", DENOISE), "denoiser: denoise steps"],
        [*between("vae-decoder", DECODE), "vae-decoder: decode"],
        [*between("vae-decoder", DECODE), "vae-decoder: write-image"],
        [*REQUEST, "orchestrator: hop text-encoder → denoiser"],
        [*REQUEST, "orchestrator: hop vae-decoder → denoiser"],
        [*REQUEST, "orchestrator: hop denoiser → vae-decoder"],
        [*REQUEST, "orchestrator: hop vae-decoder → orchestrator"],
    ):
        assert path in paths, path
    steps = [span for span in spans if span.name == "denoise steps"]
    assert [(s.attributes["klein.step.first"], s.attributes["klein.step.last"]) for s in steps] == [(1, 4)]
    assert all(path[0] == REQUEST[0] for path in paths), "every span is inside the public call"
    for span in spans:
        parent = collector.parent_of(span)
        if parent is not None and parent.process == span.process:
            assert span.raw.start_time_unix_nano >= parent.raw.start_time_unix_nano - 10**7


def test_logs_carry_the_requests_ids_in_every_process_and_never_its_prompt(observed):
    collector, folder, _, summary = observed
    (request,) = collector.named(GENERATION)
    for process in SUITE:
        text = Path(folder, f"{process}.log").read_text(encoding="utf-8")
        assert "sesquipedalian" not in text
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert any(line["level"] == "debug" for line in lines), "debug lines were asked for"
        accessed = [line for line in lines if line.get("request_id") == summary.request_id]
        assert accessed, process
        assert {line["trace_id"] for line in accessed} == {request.trace}
        assert all(line["span_id"] for line in accessed)
    assert "sesquipedalian" not in str(collector.requests)


def test_the_phases_of_a_start_add_up_to_the_time_since_its_process_began(observed):
    for process, page in observed[2].items():
        phases = {found["phase"]: value for found, value in page.series("klein_model_load_seconds")}
        assert set(phases) == {"import", "read_weights", "warm_up", "other"}
        age_seconds = time.time() - page.value("process_start_time_seconds")
        assert 0 < sum(phases.values()) < age_seconds, process
        if process != "orchestrator":
            assert all(phases[name] > 0 for name in ("import", "read_weights", "warm_up"))

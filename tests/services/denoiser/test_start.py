"""Start of the denoiser: settings, warm-up and the token budget."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from klein_core.checkpoint.files import ModelFiles
from klein_services.denoiser import application
from klein_services.denoiser.adapters import AdapterRegistry
from klein_services.denoiser.application import assemble
from klein_services.denoiser.estimates import StepTimes
from klein_services.denoiser.request import ServedModel
from klein_services.denoiser.request_planner import RequestPlanner
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.denoiser.warmup import measure_budget, warm_up
from klein_services.runtime.settings import SettingsError, load_settings
from klein_services.runtime.worker import Worker
from tests.services.fakes.denoiser_server import (
    denoise,
    gated_steps,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)

MODEL = ServedModel(
    name="tiny", is_distilled=True, embedding_channels=24, latent_channels=16, dtype=torch.float32
)
PLANNER = RequestPlanner(model=MODEL, device=torch.device("cpu"), text_tokens=512)


class FakeDevice:
    """Takes a time for each step that grows with its tokens only beyond `free_tokens`."""

    def __init__(self, free_tokens: int, memory_tokens: int = 10**9) -> None:
        self.free_tokens = free_tokens
        self.memory_tokens = memory_tokens
        self.now = 0.0

    def step(self, trajectories) -> None:
        tokens = sum(512 + t.latents.shape[0] * t.latents.shape[1] for t in trajectories)
        if tokens > self.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.now += max(tokens, self.free_tokens) * 1e-6


@pytest.mark.parametrize(
    ("free_tokens", "memory_tokens", "images"),
    [(1, 10**9, 1), (2 * 1536, 10**9, 2), (5 * 1536, 10**9, 8), (10**9, 10**9, 64), (10**9, 5 * 1536, 2)],
)
def test_the_budget_is_the_largest_step_that_pays_and_fits(monkeypatch, free_tokens, memory_tokens, images):
    device, times = FakeDevice(free_tokens, memory_tokens), StepTimes()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    budget = measure_budget(device.step, PLANNER.sample, 1536, image_limit=64, times=times)
    assert budget == images * 1536
    for tokens in (1536, budget):
        assert times.seconds(1536, tokens) == pytest.approx(max(1536 / tokens * free_tokens, 1536) * 1e-6)


def test_no_step_is_tried_that_is_not_expected_to_fit(monkeypatch):
    device, tried = FakeDevice(10**9), []
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)

    def step(trajectories) -> None:
        tried.append(len(trajectories))
        device.step(trajectories)

    budget = measure_budget(
        step, PLANNER.sample, 1536, image_limit=64, times=StepTimes(), fits=lambda count: count <= 5
    )
    assert budget == 4 * 1536
    assert max(tried) == 4


def test_a_warm_up_samples_random_prompts():
    (prompt,) = PLANNER.sample(64, 64).prompt_embeddings
    assert prompt.std() > 0.9


def test_warm_up_measures_each_size(monkeypatch):
    device, times = FakeDevice(1), StepTimes()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    warm_up(device.step, PLANNER.sample, PLANNER.sample_tokens, [(64, 64), (1024, 512)], times)
    assert times.seconds(512 + 16) == pytest.approx(528e-6)
    assert times.seconds(512 + 64 * 32) == pytest.approx(2560e-6)
    assert times.seconds(10**6) is None


@pytest.mark.parametrize(
    ("packing", "on_gpu", "packs"),
    [("auto", False, False), ("auto", True, True), ("exact", True, False), ("packed", False, True)],
)
def test_auto_packs_on_cuda_only(packing, on_gpu, packs):
    assert DenoiserSettings(packing=packing).packs(on_gpu=on_gpu) is packs


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({"packing": "exact", "token_budget": 5000}, 0),
        ({"packing": "packed", "token_budget": 5000}, 5000),
        ({"packing": "packed"}, 2 * 1536),
    ],
)
def test_the_budget_is_none_when_exact_and_else_as_set_or_measured(monkeypatch, given, budget):
    device = FakeDevice(2 * 1536)
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    preparation = Worker("test-preparation", 1)
    adapters = AdapterRegistry(DenoiserSettings(), {}, torch.device("cpu"), torch.float32)
    denoiser = assemble(DenoiserSettings(**given), PLANNER, device.step, [], preparation, adapters)
    preparation.close()
    denoiser.engine.start()
    denoiser.engine.close()
    assert denoiser.engine.load(PLANNER.probe(512)).capacity == max(1, budget // 1536)


def test_settings_have_the_denoisers_port_and_refuse_what_they_cannot_have():
    assert load_settings(DenoiserSettings, {}).settings.port == 50052
    assert DenoiserSettings().sizes_px(on_gpu=True) == ((1024, 1024),)
    assert DenoiserSettings(warmup_sizes="").sizes_px(on_gpu=True) == ()
    assert DenoiserSettings(warmup_sizes="64x128, 256x64").sizes_px(on_gpu=False) == ((64, 128), (256, 64))
    for sizes in ("1024", "64x65", "32x64", "big"):
        with pytest.raises(SettingsError, match="KLEIN_WARMUP_SIZES"):
            DenoiserSettings(warmup_sizes=sizes).check()
    with pytest.raises(SettingsError, match="KLEIN_PACKING"):
        load_settings(DenoiserSettings, {"KLEIN_PACKING": "tight"})


async def test_a_warmed_up_server_knows_the_wait_of_its_first_request(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, distilled=True)
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folder, warmup_sizes="64x64") as channel:
            assert {step[0].latents.shape for step in gate.steps} == {(4, 4, 16)}
            heard = await denoise(channel, request(spec()))
    assert heard.queued[0].HasField("estimated_wait")


async def test_warm_up_and_steps_run_on_one_thread(tmp_path, monkeypatch):
    folder, threads, step_of = save_checkpoint(tmp_path, distilled=True), set(), application.step_of

    def recording(transformer):
        step = step_of(transformer)

        def recorded(trajectories) -> None:
            threads.add(threading.get_ident())
            step(trajectories)

        return recorded

    monkeypatch.setattr(application, "step_of", recording)
    async with running_denoiser(
        folder, warmup_sizes="64x64", packing="packed", step_image_limit=2
    ) as channel:
        assert len(threads) == 1
        await denoise(channel, request(spec()))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_failed_warm_up_ends_the_start(tmp_path, monkeypatch):
    def broken(trajectories) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(application, "step_of", lambda transformer: broken)
    settings = DenoiserSettings(
        model_path=str(save_checkpoint(tmp_path, distilled=True)), device="cpu", warmup_sizes="64x64"
    )
    preparation = Worker("test-preparation", 1)
    denoiser = application.load_denoiser(settings, preparation)
    with pytest.raises(RuntimeError, match="no kernel image"):
        denoiser.engine.start()
    denoiser.engine.close()
    preparation.close()


@pytest.mark.parametrize(
    ("given", "on_gpu", "compiles"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"offload": "blocks"}, True, False),
        ({"compile": "on"}, False, True),
        ({"compile": "off"}, True, False),
    ],
)
def test_auto_compiles_on_cuda_without_offload_only(given, on_gpu, compiles):
    assert DenoiserSettings(**given).compiles(on_gpu) is compiles


def test_offloaded_blocks_are_not_compiled():
    with pytest.raises(SettingsError, match="KLEIN_COMPILE is 'on' with KLEIN_OFFLOAD 'blocks'"):
        DenoiserSettings(compile="on", offload="blocks").check()


def test_the_text_length_is_the_checkpoints_or_kleins(tmp_path):
    assert application.prompt_length(ModelFiles.of(tmp_path)) == 512
    assert application.prompt_length(ModelFiles.of(save_checkpoint(tmp_path, distilled=True))) == 7


def test_blocks_are_offloaded_from_cuda_devices_only(tmp_path):
    folder = save_checkpoint(tmp_path, distilled=True)
    preparation = Worker("test-preparation", 1)
    settings = DenoiserSettings(model_path=str(folder), device="cpu", offload="blocks")
    with pytest.raises(SettingsError, match=r"KLEIN_OFFLOAD is 'blocks'.*cpu"):
        application.load_denoiser(settings, preparation)
    preparation.close()

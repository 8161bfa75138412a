"""The embedded model's trainer: command line, optimizer, batches, resuming. Needs a clone: `training/`."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from klein_core.denoiser.packing import Span
from klein_core.pico import WEIGHTS
from klein_core.text_encoder.tokenizer import PromptTokenizer
from klein_core.vae_decoder.decoder import VaeDecoder
from training.pico import decoder_training, flow_training, reading, vae_training
from training.pico.batches import Batch, Supply
from training.pico.checkpoints import load_state, save_state
from training.pico.mixture import FAMILIES, REFERENCE_COUNT
from training.pico.muon import Muon, orthogonalized

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("module", "flag"), [("train", "--flow-minutes"), ("evaluate", "--count"), ("samples", "--output")]
)
def test_the_commands_start_from_a_clone(module: str, flag: str) -> None:
    command = [sys.executable, "-m", f"training.pico.{module}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m training.pico.{module}")
    assert flag in done.stdout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small work on several threads spends its time waiting when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_orthogonalized_matrix_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in ((24, 24), (16, 90), (90, 16)):
        left, _, right = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
        spread = left * torch.linspace(0.05, 1, left.shape[1]) @ right
        values = torch.linalg.svdvals(orthogonalized(spread))
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_muon_moves_kernels_in_any_memory_format() -> None:
    """A channels-last kernel cannot be flattened in place: an update of the copy would be lost."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=memory_format))
        before = kernel.detach().clone()
        kernel.grad = torch.randn_like(kernel)
        Muon([kernel], 0.1).step()
        assert (kernel - before).abs().mean() > 1e-3


def test_workers_that_share_the_matrices_make_the_step_of_one() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(8, 12), torch.randn(12, 4), torch.randn(9, 5)]
    gradients = [torch.randn_like(weight) for weight in weights]

    def stepped(workers: tuple[int, int], parts: list[torch.Tensor]) -> list[torch.Tensor]:
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

        def add_up(flat: torch.Tensor) -> None:
            parts.append(flat.clone())
            if len(parts) == 2:
                flat.copy_(parts[0] + parts[1])

        Muon(parameters, 0.1, workers=workers, add_up=add_up).step()
        return [parameter.detach() for parameter in parameters]

    shared: list[torch.Tensor] = []
    stepped((0, 2), shared)
    together = stepped((1, 2), shared)
    alone = stepped((0, 1), [])
    for one, both in zip(alone, together, strict=True):
        torch.testing.assert_close(both, one)


def test_a_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.ckpt"
    save_state(path, {"step": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1}


@pytest.fixture(scope="module")
def supply() -> Supply:
    tokenizer = PromptTokenizer.from_folder(WEIGHTS / "tokenizer", reading.SEQUENCE_LENGTH)
    autoencoder = VaeDecoder.from_folder(WEIGHTS).autoencoder
    return Supply(autoencoder, tokenizer, random.Random(1), kept=1, uses=3)


def small_batch(supply: Supply, family: str) -> Batch:
    return supply.draw(family, 0.0, tokens=160)


def test_batches_fit_together_and_are_used_several_times(supply: Supply) -> None:
    for family in FAMILIES:
        batch = small_batch(supply, family)
        assert small_batch(supply, family) is batch
        count, rows, columns, _ = batch.targets.shape
        assert len(batch.tasks) == len(batch.prompts) == count
        assert (columns * 16, rows * 16) == batch.setting.target
        assert len(batch.references) == REFERENCE_COUNT[family]
        assert batch.weights.mean() == pytest.approx(1, abs=1e-4)


def new_model() -> flow_training.Model:
    torch.manual_seed(0)
    return flow_training.Model(reading.build_encoder(), reading.ReadOuts())


def test_the_first_guess_at_full_noise_is_the_noise() -> None:
    transformer = new_model().transformer
    noise = torch.randn(4, 4, 128)
    span = Span(torch.zeros(8, 384), noise, sigma=1.0)
    with torch.no_grad():
        velocity = transformer([span])[0]
    assert torch.nn.functional.cosine_similarity(velocity.flatten(), noise.flatten(), dim=0) > 0.9


def test_flow_training_learns_and_goes_on_after_a_stop(
    supply: Supply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_training, "_TOKENS_PER_STEP", 240)
    monkeypatch.setattr(flow_training, "_WARM_UP_STEPS", 1)
    config = flow_training.FlowTrainingConfig(tmp_path / "flow.ckpt", seconds=1000.0)
    batch = small_batch(supply, "text to image")
    run = flow_training.Training(config, new_model(), supply)

    def error() -> float:
        torch.manual_seed(3)
        embedding = flow_training.embedded(run.model, batch, 40)
        return float(flow_training.velocity_loss(run.model, batch, embedding).detach())

    before = error()
    for _ in range(4):
        run._one_step()
    assert error() < before
    run.save()
    resumed = flow_training.Training(config, new_model(), supply)
    assert resumed.step == run.step == 4
    for old, new in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_autoencoder_learns_and_its_encoder_stays_when_the_decoder_is_refined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_training, "_STATISTICS_PICTURES", 32)
    config = vae_training.VaeTrainingConfig(tmp_path / "vae.ckpt", seconds=1.5)
    finished = vae_training.train(config)
    again = vae_training.train(config)
    assert torch.equal(again.encoder.conv_in.weight, finished.encoder.conv_in.weight)
    refined = decoder_training.refine_decoder(config.state, tmp_path / "decoder.ckpt", 1.0)
    assert torch.equal(refined.encoder.conv_in.weight, finished.encoder.conv_in.weight)
    assert not torch.equal(refined.decoder.conv_out.weight, finished.decoder.conv_out.weight)


def test_a_stopped_autoencoder_s_training_goes_on_with_other_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[float] = []

    def batch(step: int, rng: random.Random) -> torch.Tensor:
        draws.append(rng.random())
        if len(draws) > 1:
            raise KeyboardInterrupt
        return torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(vae_training, "_batch_for", batch)
    config = vae_training.VaeTrainingConfig(tmp_path / "vae.ckpt", seconds=60, report_every=1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            vae_training.train(config)
    first, _, resumed = draws
    assert resumed != first

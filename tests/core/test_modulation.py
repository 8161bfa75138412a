"""Timestep rounding, sinusoids and the order of modulation chunks, against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import Timesteps
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from klein_core.denoiser.modulation import effective_timesteps, modulations, sinusoid
from klein_core.denoiser.sampler import sigmas

# Sizes of 512² and 1024²; 764, 956 and 720 would result from rounding sigma itself.
ROUNDED = [(4096, [1000, 968, 908, 768]), (1024, [1000, 960, 884, 716])]


def timesteps_of_diffusers(token_count: int, step_count: int, dtype: torch.dtype) -> Tensor:
    """Returns the timesteps of the scheduler, rounded as the pipeline and then the transformer do."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    line = np.linspace(1.0, 1 / step_count, step_count)
    scheduler.set_timesteps(sigmas=line, mu=compute_empirical_mu(token_count, step_count))
    return scheduler.timesteps.to(dtype) / 1000 * 1000


@pytest.mark.parametrize(("token_count", "expected"), ROUNDED)
def test_bfloat16_timesteps_are_those_of_diffusers(token_count: int, expected: list[int]):
    levels = torch.tensor(sigmas(token_count, 4)[:-1])
    assert effective_timesteps(levels, torch.bfloat16).tolist() == expected
    rounded_first = levels.to(torch.bfloat16) * 1000
    assert rounded_first.tolist() != expected


@pytest.mark.parametrize("step_count", [1, 4, 8, 50])
@pytest.mark.parametrize("token_count", [16, 1024, 2304, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_timesteps_are_rounded_as_often_as_in_diffusers(
    dtype: torch.dtype, token_count: int, step_count: int
):
    levels = torch.tensor(sigmas(token_count, step_count)[:-1])
    expected = timesteps_of_diffusers(token_count, step_count, dtype)
    assert torch.equal(effective_timesteps(levels, dtype), expected)


def test_the_division_and_the_product_show_at_fifty_steps():
    """Base klein at 512²: rounding 1000·σ alone would give another timestep."""
    levels = torch.tensor(sigmas(1024, 50)[:-1])
    rounded_once = (levels * 1000).to(torch.bfloat16)
    assert not torch.equal(timesteps_of_diffusers(1024, 50, torch.bfloat16), rounded_once)


def test_float32_timesteps_are_nearly_exact():
    levels = torch.tensor(sigmas(1024, 4)[:-1])
    exact = torch.tensor([1000, 958.085, 883.982, 717.497])
    torch.testing.assert_close(effective_timesteps(levels, torch.float32), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [256, 32])
def test_the_sinusoid_equals_diffusers(channels: int):
    timesteps = torch.tensor([0.0, 1.0, 716.0, 958.085, 1000.0])
    theirs = Timesteps(num_channels=channels, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
    assert torch.equal(sinusoid(timesteps, channels), theirs)


def test_modulation_is_shift_scale_gate_for_each_sublayer():
    first, second = modulations(torch.arange(6.0).reshape(1, 1, 6), sublayers=2)
    assert [part.item() for part in (*first[:3], *second[:3])] == [0, 1 + 1, 2, 3, 1 + 4, 5]

"""The schedule against diffusers' klein pipeline and scheduler, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_core.denoiser.sampler import empirical_mu, sigmas
from klein_core.errors import InvalidInput

PUBLISHED = [
    (1024, 4, [1, 0.958085, 0.883982, 0.717497, 0]),
    (4096, 4, [1, 0.967384, 0.908144, 0.767200, 0]),
    (16384, 4, [1, 0.986986, 0.961947, 0.893915, 0]),
    (4096, 2, [1, 0.909111, 0]),
]


def diffusers_sigmas(token_count: int, step_count: int) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    line = np.linspace(1.0, 1 / step_count, step_count)
    scheduler.set_timesteps(sigmas=line, mu=compute_empirical_mu(token_count, step_count))
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("token_count", [16, 1024, 4080, 4300, 4301, 16384])
@pytest.mark.parametrize("step_count", [1, 4, 8, 50])
def test_equals_diffusers_exactly(token_count: int, step_count: int):
    assert empirical_mu(token_count, step_count) == compute_empirical_mu(token_count, step_count)
    assert sigmas(token_count, step_count) == diffusers_sigmas(token_count, step_count)


@settings(deadline=None, max_examples=100)
@given(token_count=st.integers(1, 20000), step_count=st.integers(1, 100))
def test_equals_diffusers_everywhere_and_falls(token_count: int, step_count: int):
    levels = sigmas(token_count, step_count)
    assert levels == diffusers_sigmas(token_count, step_count)
    assert (levels[0], levels[-1], len(levels)) == (1.0, 0.0, step_count + 1)
    assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize(("token_count", "step_count", "published"), PUBLISHED)
def test_equals_published_values(token_count: int, step_count: int, published: list[float]):
    assert sigmas(token_count, step_count) == pytest.approx(published, abs=1e-6)


def test_the_shift_drops_above_4300_tokens():
    assert empirical_mu(4300, 4) == pytest.approx(2.30848, abs=1e-5)
    assert empirical_mu(4301, 4) == pytest.approx(1.18470, abs=1e-5)


def test_levels_are_float32_values():
    levels = sigmas(1024, 50)
    assert torch.tensor(levels).tolist() == levels


@pytest.mark.parametrize("counts", [(0, 4), (16, 0), (16, -1)])
def test_refuses_nothing_to_do(counts: tuple[int, int]):
    with pytest.raises(InvalidInput, match="at least 1"):
        sigmas(*counts)

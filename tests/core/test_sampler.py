"""Noise, schedule, Euler steps, guidance and resuming, against diffusers' scheduler and pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klein_core.denoiser.packing import Span
from klein_core.denoiser.sampler import Trajectory, empirical_mu, initial_noise, packed_step, sigmas
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import InvalidInput
from klein_core.variants import NoiseSchedule
from tests.tiny.transformer import oracle_velocity, random_span, relative_error, tiny_oracle, twin

DTYPES = [torch.float32, torch.bfloat16]
PUBLISHED = [
    (1024, 4, [1, 0.958085, 0.883982, 0.717497, 0]),
    (4096, 4, [1, 0.967384, 0.908144, 0.767200, 0]),
    (16384, 4, [1, 0.986986, 0.961947, 0.893915, 0]),
    (4096, 2, [1, 0.909111, 0]),
]


@pytest.fixture(scope="module")
def oracle() -> Flux2Transformer2DModel:
    return tiny_oracle()


@pytest.fixture(scope="module")
def ours(oracle: Flux2Transformer2DModel) -> FlowTransformer:
    return twin(oracle)


def run(transformer: FlowTransformer, *trajectories: Trajectory, until: int | None = None) -> list[Tensor]:
    while active := [t for t in trajectories if not t.finished and t.step_index != until]:
        packed_step(transformer, active)
    return [trajectory.latents for trajectory in trajectories]


def request(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Returns arguments of a trajectory with two references of other sizes."""
    span = random_span([(4, 6), (3, 3), (2, 5)], seed=seed + 100)
    return {"prompt_embedding": span.prompt_embedding, "references": span.references, **changes}


def start(seed: int = 0, step_count: int = 4, **changes: Any) -> Trajectory:
    size = {"rows": 4, "columns": 6, "channels": 16}
    return Trajectory.from_noise(seed=seed, step_count=step_count, **size, **request(seed, **changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (32, 32)])
def test_noise_is_that_of_diffusers(dtype: torch.dtype, size: tuple[int, int]):
    generator = torch.Generator("cpu").manual_seed(42)
    theirs = randn_tensor((1, 128, *size), generator=generator, device=torch.device("cpu"), dtype=dtype)
    packed = Flux2KleinPipeline._pack_latents(theirs)[0]
    ours = initial_noise(42, *size, 128, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.flatten(0, 1), packed)


@pytest.mark.parametrize(("channels", "size"), [(3, (3, 3)), (5, (7, 3))])
def test_noise_in_bfloat16_is_drawn_in_bfloat16(channels: int, size: tuple[int, int]):
    """Counts of elements that 16 does not divide: at others float32 noise, rounded, is the same on a processor."""
    generator = torch.Generator("cpu").manual_seed(42)
    rounded = torch.randn((1, channels, *size), generator=generator).to(torch.bfloat16)
    generator.manual_seed(42)
    theirs = randn_tensor(
        (1, channels, *size), generator=generator, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert not torch.equal(theirs, rounded)
    assert torch.equal(initial_noise(42, *size, channels, torch.bfloat16).permute(2, 0, 1), theirs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_drawn_channels_last_is_another(dtype: torch.dtype):
    generator = torch.Generator("cpu").manual_seed(42)
    channels_last = torch.randn((8, 8, 128), generator=generator, dtype=dtype)
    assert relative_error(initial_noise(42, 8, 8, 128, dtype), channels_last) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_bit_for_bit_those_of_diffusers(dtype: torch.dtype):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=compute_empirical_mu(24, 8))
    trajectory = start(step_count=8, prompt_embedding=torch.zeros(7, 24, dtype=dtype))
    theirs = trajectory.latents
    for timestep in scheduler.timesteps:
        velocity = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        trajectory.advance([velocity])
        assert trajectory.latents.dtype == dtype
        assert torch.equal(trajectory.latents, theirs)
    assert trajectory.finished


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_whole_run_equals_the_loop_of_the_pipeline(oracle, ours, guidance_scale: float):
    negative = random_span([(1, 1)], seed=7, text_length=5).prompt_embedding
    trajectory = start(5, negative_prompt_embedding=negative, guidance_scale=guidance_scale)
    assert len(trajectory.spans) == (1 if guidance_scale == 1 else 2)
    latents = trajectory.latents
    for sigma, following in zip(trajectory.sigmas, trajectory.sigmas[1:], strict=False):
        prompts = [trajectory.spans[0].prompt_embedding, negative]
        positive, other = (
            oracle_velocity(oracle, Span(prompt, latents, trajectory.references, sigma)) for prompt in prompts
        )
        velocity = positive if guidance_scale == 1 else other + guidance_scale * (positive - other)
        latents = latents + (following - sigma) * velocity
    assert relative_error(run(ours, trajectory)[0], latents) < 1e-5


def test_a_guided_images_pair_is_one_forward_beside_other_images(ours, monkeypatch):
    calls = []
    forward = FlowTransformer.forward
    monkeypatch.setattr(
        FlowTransformer, "forward", lambda self, spans: calls.append(len(spans)) or forward(self, spans)
    )
    guided = start(1, guidance_scale=4.0, negative_prompt_embedding=torch.ones(7, 24))
    packed_step(ours, [guided])
    packed_step(ours, [start(2), guided])
    assert calls == [2, 3]


def test_guidance_of_one_or_less_ignores_the_negative_prompt():
    assert len(start(guidance_scale=1.0, negative_prompt_embedding=torch.zeros(7, 24)).spans) == 1


@pytest.mark.parametrize("step", [0, 1, 3, 6, 7])
def test_resuming_is_bit_for_bit_the_uninterrupted_run(ours, step: int):
    guidance = {"guidance_scale": 3.0, "negative_prompt_embedding": torch.ones(7, 24)}
    (whole,) = run(ours, start(1, 7, **guidance))
    (checkpoint,) = run(ours, start(1, 7, **guidance), until=step)
    resumed = Trajectory(latents=checkpoint, step_count=7, step_index=step, **request(1, **guidance))
    assert torch.equal(run(ours, resumed)[0], whole)


def test_images_packed_midway_equal_each_alone(ours):
    alone = [run(ours, start(seed, 4 + seed))[0] for seed in range(3)]
    early, *late = [start(seed, 4 + seed) for seed in range(3)]
    run(ours, early, until=2)
    for packed, expected in zip(run(ours, early, *late), alone, strict=True):
        assert relative_error(packed, expected) < 1e-5


def test_seeds_share_conditioning_and_differ(ours):
    shared = request()
    size = {"rows": 4, "columns": 6, "channels": 16, "step_count": 4}
    first, second, again = (Trajectory.from_noise(seed=s, **size, **shared) for s in (1, 2, 1))
    assert first.spans[0].prompt_embedding is second.spans[0].prompt_embedding
    one, two, three = run(ours, first, second, again)
    assert torch.equal(one, three)
    assert relative_error(two, one) > 0.1


def test_the_preview_of_a_straight_path_is_its_end():
    trajectory = start(step_count=5)
    assert torch.equal(trajectory.preview(), trajectory.latents)
    data = torch.randn(4, 6, 16)
    velocity = trajectory.latents - data
    while not trajectory.finished:
        trajectory.advance([velocity])
        torch.testing.assert_close(trajectory.preview(), data, atol=1e-5, rtol=1e-5)
    assert torch.equal(trajectory.preview(), trajectory.latents)


def test_refuses_what_cannot_be_run(ours):
    with pytest.raises(InvalidInput, match="negative_prompt_embedding"):
        start(guidance_scale=4.0)
    with pytest.raises(InvalidInput, match="step_index"):
        Trajectory(latents=torch.zeros(4, 6, 16), step_count=4, step_index=5, **request())
    with pytest.raises(InvalidInput, match="latents"):
        Trajectory(latents=torch.zeros(24, 16), step_count=4, **request())
    finished = Trajectory(latents=torch.zeros(4, 6, 16), step_count=4, step_index=4, **request())
    with pytest.raises(InvalidInput, match="finished"):
        packed_step(ours, [finished])


SCHEDULES = {
    "published": ({"shift": 3.0, "use_dynamic_shifting": True}, NoiseSchedule()),
    "linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        NoiseSchedule(shift=1.0, is_linear=True),
    ),
    "static": ({"shift": 3.0}, NoiseSchedule(is_dynamic=False)),
    "static, odd": ({"shift": 1.15}, NoiseSchedule(is_dynamic=False, shift=1.15)),
    "unshifted": ({}, NoiseSchedule(is_dynamic=False, shift=1.0)),
}
"""Name → diffusers' configuration and ours."""


def diffusers_sigmas(token_count: int, step_count: int, config: dict | None = None) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(**(SCHEDULES["published"][0] if config is None else config))
    line = np.linspace(1.0, 1 / step_count, step_count)
    scheduler.set_timesteps(sigmas=line, mu=compute_empirical_mu(token_count, step_count))
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("token_count", [16, 1024, 4080, 4300, 4301, 16384])
@pytest.mark.parametrize("step_count", [1, 4, 8, 50])
def test_the_schedule_equals_diffusers_exactly(token_count: int, step_count: int):
    assert empirical_mu(token_count, step_count) == compute_empirical_mu(token_count, step_count)
    assert sigmas(token_count, step_count) == diffusers_sigmas(token_count, step_count)


@settings(deadline=None, max_examples=40)
@given(
    token_count=st.integers(1, 20000), step_count=st.integers(1, 100), name=st.sampled_from(sorted(SCHEDULES))
)
def test_the_schedule_equals_diffusers_everywhere_and_falls(token_count: int, step_count: int, name: str):
    config, schedule = SCHEDULES[name]
    levels = sigmas(token_count, step_count, schedule)
    assert levels == diffusers_sigmas(token_count, step_count, config)
    assert (levels[0], levels[-1], len(levels)) == (1.0, 0.0, step_count + 1)
    assert levels == sorted(set(levels), reverse=True)


@pytest.mark.parametrize(("token_count", "step_count", "published"), PUBLISHED)
def test_the_schedule_equals_published_values(token_count: int, step_count: int, published: list[float]):
    assert sigmas(token_count, step_count) == pytest.approx(published, abs=1e-6)


def test_the_shift_drops_above_4300_tokens():
    assert empirical_mu(4300, 4) == pytest.approx(2.30848, abs=1e-5)
    assert empirical_mu(4301, 4) == pytest.approx(1.18470, abs=1e-5)


def test_levels_are_float32_values():
    levels = sigmas(1024, 50)
    assert torch.tensor(levels).tolist() == levels


@pytest.mark.parametrize("counts", [(0, 4), (16, 0), (16, -1)])
def test_a_schedule_needs_tokens_and_steps(counts: tuple[int, int]):
    with pytest.raises(InvalidInput, match="at least 1"):
        sigmas(*counts)

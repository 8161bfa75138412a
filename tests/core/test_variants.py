"""Sampling of every kind of model, distilled, base and with cached references, equals diffusers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from klein_core.denoiser import modulation
from klein_core.denoiser.packing import Span
from klein_core.denoiser.sampler import initial_noise
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.vae_decoder.decoder import VaeDecoder
from tests.core.test_pipeline import PROMPT, Pair, pictures, png
from tests.tiny.transformer import relative_error

KINDS: dict[str, dict[str, Any]] = {
    "distilled": {"distilled": True},
    "base": {"distilled": False},
    "reference-cache": {"distilled": True, "reference_cache": True},
}
EACH = pytest.mark.parametrize("pair", KINDS, indirect=True)
TOKENS_BEFORE_THE_DROP = 4300


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("checkpoint"), **KINDS[request.param])


@pytest.fixture
def steps(monkeypatch) -> list[list[Span]]:
    """Records the spans of each step in place of computing them: velocity 1 for the first span, 0 for another."""
    recorded: list[list[Span]] = []

    def forward(self: FlowTransformer, spans: list[Span]) -> list[Tensor]:
        recorded.append(list(spans))
        return [torch.full_like(span.latents, float(index == 0)) for index, span in enumerate(spans)]

    monkeypatch.setattr(FlowTransformer, "forward", forward)
    monkeypatch.setattr(VaeDecoder, "decode", lambda self, latents: latents)
    return recorded


def diffusers_sigmas(token_count: int, step_count: int) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    line = np.linspace(1.0, 1 / step_count, step_count)
    scheduler.set_timesteps(sigmas=line, mu=compute_empirical_mu(token_count, step_count))
    return scheduler.sigmas.tolist()


@EACH
def test_steps_guidance_and_spans_are_the_kinds_own(pair: Pair, steps: list[list[Span]]):
    is_base = not pair.ours.is_distilled
    [latents] = pair.ours.generate(PROMPT, width_px=64, height_px=64, seeds=[3])
    assert len(steps) == (50 if is_base else 4)
    # Guidance's pair is one packed step; both have the same latents at the same noise level.
    assert {len(spans) for spans in steps} == {2 if is_base else 1}
    assert all(spans[0].latents is spans[-1].latents and spans[0].sigma == spans[-1].sigma for spans in steps)
    # All the way from noise: minus velocity 1, or 0 + 4 · (1 - 0).
    velocity = 4.0 if is_base else 1.0
    noise = initial_noise(3, 4, 4, latents.shape[-1], latents.dtype)
    torch.testing.assert_close(latents, noise - velocity, atol=1e-5, rtol=0)


@EACH
def test_pads_go_to_the_transformer_as_diffusers_makes_them(pair: Pair, steps: list[list[Span]]):
    config = pair.ours.text_encoder.config
    options = {} if pair.ours.is_distilled else {"negative_prompt": "dull"}
    list(pair.ours.generate(PROMPT, width_px=64, height_px=64, step_count=1, **options))
    for span, prompt in zip(steps[0], (PROMPT, "dull"), strict=False):
        expected = pair.oracle.encode_prompt(
            prompt, max_sequence_length=config.sequence_length, text_encoder_out_layers=config.tapped_layers
        )[0][0]
        assert span.prompt_embedding.shape == (config.sequence_length, config.embedding_channels)
        assert relative_error(span.prompt_embedding, expected) < 1e-5


@EACH
def test_without_its_pads_a_prompt_gives_another_velocity(pair: Pair):
    encoded = pair.ours.text_encoder.encode([PROMPT])[0]
    latents = initial_noise(1, 4, 6, pair.ours.transformer.config.in_channels, encoded.embedding.dtype)
    whole = Span(encoded.embedding, latents, (), 0.7)
    if pair.ours.uses_reference_cache:
        whole = replace(whole, reference_cache=pair.ours.transformer.reference_cache([latents[:3]]))
    trimmed = replace(whole, prompt_embedding=encoded.embedding[: encoded.token_count])
    with torch.no_grad():
        assert relative_error(*pair.ours.transformer([whole, trimmed])) > 0.01


@EACH
@pytest.mark.parametrize("step_count", [4, 50])
@pytest.mark.parametrize(("rows", "columns"), [(66, 65), (67, 65)], ids=["below the drop", "above it"])
def test_only_the_targets_tokens_and_the_steps_decide_the_levels(
    pair: Pair, steps: list[list[Span]], rows: int, columns: int, step_count: int
):
    reference_tokens = (96 // 16) * (64 // 16)
    assert rows * columns + reference_tokens > TOKENS_BEFORE_THE_DROP
    list(
        pair.ours.generate(
            PROMPT,
            references=[png(pictures(1)[0])],
            width_px=16 * columns,
            height_px=16 * rows,
            step_count=step_count,
        )
    )
    levels = [spans[0].sigma for spans in steps]
    assert [*levels, 0.0] == diffusers_sigmas(rows * columns, step_count)
    by_all_tokens = diffusers_sigmas(rows * columns + reference_tokens, step_count)
    assert [*levels, 0.0] != by_all_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_timesteps_as_diffusers_does(kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    pair = Pair(tmp_path, **KINDS[kind], dtype=torch.bfloat16)
    ours: list[float] = []
    theirs: list[float] = []
    sinusoid = modulation.sinusoid

    def record(timesteps: Tensor, channels: int) -> Tensor:
        ours.extend(timesteps.tolist())
        return sinusoid(timesteps, channels)

    monkeypatch.setattr(modulation, "sinusoid", record)
    pair.oracle.transformer.time_guidance_embed.time_proj.register_forward_pre_hook(
        lambda module, arguments: theirs.extend(arguments[0].tolist())
    )
    size = {"width": 128, "height": 96}
    guidance = {} if pair.ours.is_distilled else {"guidance_scale": 4.0}
    pair.oracle_image(seed=1, references=pictures(1), step_count=4, **size, **guidance)
    list(
        pair.ours.generate(
            PROMPT, references=[png(pictures(1)[0])], width_px=128, height_px=96, step_count=4, **guidance
        )
    )
    # The order and number of calls are each implementation's own.
    assert sorted(set(ours)) == sorted(set(theirs))
    levels = diffusers_sigmas(8 * 6, 4)[:-1]
    assert len(set(ours)) == len(levels) + (kind == "reference-cache")
    assert not {1000 * level for level in levels[1:]} & set(ours)

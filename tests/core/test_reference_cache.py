"""References as cached keys and values, against diffusers' KV pipeline: its first step, later steps, whole images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from torch import Tensor

from klein_core.denoiser.packing import Span
from klein_core.denoiser.reference_cache import ReferenceCache, bytes_per_token
from klein_core.denoiser.sampler import Trajectory, packed_step
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import InvalidInput
from klein_core.model_registry import PUBLISHED_MODELS
from klein_core.pipeline import Pipeline
from klein_core.quantization.quantized_weight import QuantizedWeight
from tests.core.test_pipeline import PROMPT, Pair, pictures, png
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.transformer import (
    oracle_velocity,
    random_span,
    relative_error,
    save_tiny_transformer,
    tiny_oracle,
    twin,
)

TOLERANCE = 1e-5
REFERENCES = [[(3, 4)], [(2, 6), (4, 4), (5, 3)]]


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def kv_oracle(**changes: Any) -> Flux2Transformer2DModel:
    """Returns diffusers' network with the attention processors of its KV pipeline."""
    oracle = tiny_oracle(**changes)
    for block in oracle.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in oracle.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return oracle


@pytest.fixture(scope="module")
def oracle() -> Flux2Transformer2DModel:
    return kv_oracle()


@pytest.fixture(scope="module")
def ours(oracle: Flux2Transformer2DModel) -> FlowTransformer:
    return twin(oracle)


def oracle_step(
    oracle: Flux2Transformer2DModel, span: Span, cache: Flux2KVCache | None = None
) -> tuple[Tensor, Flux2KVCache]:
    """Runs one step of diffusers' pipeline: with references, which fill a cache, or with a cache."""

    def channels_first(image: Tensor) -> Tensor:
        return image.permute(2, 0, 1)[None]

    images, ids = [], []
    if cache is None:
        images += [channels_first(image) for image in span.references]
        ids.append(Flux2KleinKVPipeline._prepare_image_ids(images))
    images.append(channels_first(span.latents))
    ids.append(Flux2KleinKVPipeline._prepare_latent_ids(images[-1]))
    prompt = span.prompt_embedding[None]
    timestep = torch.tensor([span.sigma], dtype=torch.float32) * 1000
    arguments: dict[str, Any] = {"kv_cache": cache, "kv_cache_mode": "cached"}
    if cache is None:
        count = sum(rows * columns for rows, columns in span.grids[1:])
        arguments = {"kv_cache_mode": "extract", "num_ref_tokens": count}
    result = oracle(
        hidden_states=torch.cat([Flux2KleinKVPipeline._pack_latents(i) for i in images], dim=1),
        timestep=timestep.to(span.latents.dtype) / 1000,
        encoder_hidden_states=prompt,
        txt_ids=Flux2KleinKVPipeline._prepare_text_ids(prompt),
        img_ids=torch.cat(ids, dim=1),
        return_dict=False,
        **arguments,
    )
    velocity = result[0][0].unflatten(0, span.latents.shape[:2])
    return velocity, result[1] if cache is None else cache


def cached(ours: FlowTransformer, span: Span) -> Span:
    return replace(span, references=(), reference_cache=ours.reference_cache(span.references))


@pytest.mark.parametrize("references", REFERENCES, ids=len)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 8, 8, 8),
            "mlp_ratio": 2.0,
        },
    ],
    ids=["tiny", "wider"],
)
def test_first_and_later_steps_equal_diffusers(shape: dict[str, Any], references: list[tuple[int, int]]):
    oracle = kv_oracle(**shape)
    ours = twin(oracle)
    first = random_span([(4, 6), *references], sigma=1.0)
    expected, their_cache = oracle_step(oracle, first)
    span = cached(ours, first)
    assert relative_error(ours([span])[0], expected) < TOLERANCE
    for sigma in (0.717, 0.02):
        later = replace(span, latents=span.latents * 0.8 + sigma, sigma=sigma)
        expected, _ = oracle_step(oracle, later, their_cache)
        assert relative_error(ours([later])[0], expected) < TOLERANCE


def test_what_is_cached_is_what_diffusers_caches(oracle, ours):
    span = random_span([(4, 6), (3, 4), (2, 2)], sigma=0.9)
    _, theirs = oracle_step(oracle, span)
    cache = ours.reference_cache(span.references)
    layers = [*theirs.double_block_caches, *theirs.single_block_caches]
    assert cache.token_count == 16
    assert len(layers) == len(cache.keys_values)
    for layer, (key, value) in zip(layers, cache.keys_values, strict=True):
        their_key, their_value = layer.get()
        assert relative_error(key, their_key[0]) < TOLERANCE
        assert relative_error(value, their_value[0]) < TOLERANCE


def test_without_references_it_is_the_standard_forward(oracle, ours):
    span = random_span([(4, 6)])
    assert relative_error(ours([span])[0], oracle_velocity(oracle, span)) < TOLERANCE


@pytest.mark.parametrize("references", REFERENCES, ids=len)
def test_bfloat16_stays_as_close_to_float32_as_diffusers(references: list[tuple[int, int]]):
    span = random_span([(4, 6), *references], sigma=0.7)
    exact, _ = oracle_step(kv_oracle(), span)
    half = Span(
        span.prompt_embedding.bfloat16(),
        span.latents.bfloat16(),
        tuple(r.bfloat16() for r in span.references),
        span.sigma,
    )
    rounded = kv_oracle().to(torch.bfloat16)
    theirs, _ = oracle_step(rounded, half)
    ours = twin(rounded)
    assert relative_error(ours([cached(ours, half)])[0], exact) < 1.5 * relative_error(theirs, exact)


def test_standard_editing_gives_another_image(ours):
    span = random_span([(4, 6), (3, 4)], sigma=0.7)
    assert relative_error(ours([cached(ours, span)])[0], ours([span])[0]) > 0.01


def test_the_order_of_references_matters(ours):
    span = random_span([(4, 6), (3, 4), (3, 4)], sigma=0.7)
    turned = replace(span, references=span.references[::-1])
    assert relative_error(ours([cached(ours, turned)])[0], ours([cached(ours, span)])[0]) > 0.01


def mixed(ours: FlowTransformer) -> list[Span]:
    """Returns spans with caches of two lengths, of two contents, with reference tokens, and with neither."""
    one, other, longer = (
        random_span([(4, 6), grid], seed=i) for i, grid in enumerate([(3, 4), (3, 4), (5, 5)])
    )
    cache = cached(ours, one)
    return [
        cache,
        random_span([(4, 6)], seed=7),
        replace(cache, latents=other.latents, sigma=0.2),
        cached(ours, longer),
        random_span([(4, 6), (3, 4)], seed=8, sigma=0.4),
        cached(ours, other),
        replace(cached(ours, longer), latents=random_span([(2, 2)]).latents),
    ]


@pytest.mark.parametrize(
    "picked", [range(7), range(6, -1, -1), (0, 2), (0, 5), (0, 3), (0, 1), (3, 6)], ids=str
)
def test_any_mix_gives_each_span_what_it_gets_alone(ours, picked):
    spans = mixed(ours)
    for velocity, index in zip(ours([spans[i] for i in picked]), picked, strict=True):
        assert relative_error(velocity, ours([spans[index]])[0]) < TOLERANCE


def test_a_cache_is_left_as_it_was_and_serves_again(ours):
    span = cached(ours, random_span([(4, 6), (3, 4)]))
    before = span.reference_cache.keys_values.clone()
    first = ours([span])[0]
    assert torch.equal(ours([span])[0], first)
    assert torch.equal(span.reference_cache.keys_values, before)


def test_seeds_share_a_cache_and_differ(ours):
    source = random_span([(4, 6), (3, 4)])
    cache = ours.reference_cache(source.references)
    size = {"rows": 4, "columns": 6, "channels": 16, "step_count": 3}
    one, other, alone = (
        Trajectory.from_noise(
            seed=seed, **size, prompt_embedding=source.prompt_embedding, reference_cache=cache
        )
        for seed in (1, 2, 1)
    )
    while not alone.finished:
        packed_step(ours, [one, other])
        packed_step(ours, [alone])
    assert relative_error(one.latents, alone.latents) < TOLERANCE
    assert relative_error(other.latents, alone.latents) > 0.1


def test_the_size_of_a_cache_is_known_in_advance(ours):
    cache = ours.reference_cache(random_span([(1, 1), (3, 5), (2, 2)]).references)
    assert cache.size_bytes == 19 * bytes_per_token(ours.config, torch.float32)
    klein = PUBLISHED_MODELS["klein-9b-kv"].transformer
    assert bytes_per_token(klein, torch.bfloat16) == 524_288


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantized_weights_cache_what_they_stand_for(tmp_path: Path, quantization: str):
    save_tiny_transformer(tmp_path)
    stored = FlowTransformer.from_folder(tmp_path, quantization=quantization)
    plain = FlowTransformer.from_folder(tmp_path)
    for name, layer in stored.linears.items():
        if isinstance(layer.weight, QuantizedWeight):
            plain.linears[name].weight.copy_(layer.weight.dense(torch.float32))
    assert isinstance(
        stored.linears["single_transformer_blocks.2.attn.to_qkv_mlp_proj"].weight, QuantizedWeight
    )
    span = random_span([(4, 6), (3, 4), (2, 2)])
    assert relative_error(stored([cached(stored, span)])[0], plain([cached(plain, span)])[0]) < TOLERANCE


def test_refuses_references_and_caches_that_do_not_fit(ours):
    span = random_span([(4, 6), (3, 4)])
    with pytest.raises(InvalidInput, match="references"):
        ours.reference_cache([])
    with pytest.raises(InvalidInput, match=r"references\[1\]"):
        ours.reference_cache([*span.references, span.references[0][0]])
    with pytest.raises(InvalidInput, match="when a reference_cache is given"):
        ours([replace(span, reference_cache=ours.reference_cache(span.references))])
    foreign = ReferenceCache(torch.zeros(4, 2, 12, 2, 16))
    with pytest.raises(InvalidInput, match="reference_cache: has shape"):
        ours([replace(span, references=(), reference_cache=foreign)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("checkpoint"), distilled=True, reference_cache=True)


@pytest.mark.parametrize("reference_count", [0, 1, 3])
def test_images_equal_those_of_diffusers(pair: Pair, reference_count: int):
    references = pictures(reference_count)
    size = {"width": 160, "height": 96} if reference_count != 1 else {"width": None, "height": None}
    expected = pair.oracle_image(seed=5, references=references, step_count=4, **size)
    [image] = pair.ours.generate(
        PROMPT,
        references=[png(reference) for reference in references],
        width_px=size["width"],
        height_px=size["height"],
        seeds=[5],
    )
    assert image.shape == expected.shape
    assert np.ptp(expected) > 50, "a flat picture would prove nothing"
    assert np.abs(image.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_bf16_is_close_to_diffusers_in_bf16(tmp_path: Path):
    pair = Pair(tmp_path, distilled=True, reference_cache=True, dtype=torch.bfloat16)
    expected = pair.oracle_image(seed=5, references=pictures(2), step_count=4, width=128, height=96)
    [image] = pair.ours.generate(
        PROMPT, references=[png(p) for p in pictures(2)], width_px=128, height_px=96, seeds=[5], step_count=4
    )
    error = np.square(image.numpy().astype(float) - expected.astype(float)).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 45


def test_the_pipeline_computes_references_once_a_call(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    built = []
    original = FlowTransformer.reference_cache
    monkeypatch.setattr(
        FlowTransformer,
        "reference_cache",
        lambda self, references, adapters: (
            built.append(len(references)) or original(self, references, adapters)
        ),
    )
    files = [png(p) for p in pictures(2)]
    images = list(pair.ours.generate(PROMPT, references=files, seeds=[1, 2], step_count=2))
    assert built == [2]
    assert not torch.equal(*images)


def test_the_folder_declares_that_references_are_cached_and_guidance_is_refused(tmp_path: Path):
    save_tiny_checkpoint(tmp_path, reference_cache=True)
    pipeline = Pipeline.from_folder(tmp_path)
    assert pipeline.uses_reference_cache
    assert pipeline.is_distilled
    with pytest.raises(InvalidInput, match="guidance_scale"):
        list(pipeline.generate(PROMPT, width_px=64, height_px=64, guidance_scale=3.0))

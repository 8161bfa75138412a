"""Flow transformer against diffusers', and each known mistake in reimplementing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser import blocks, modulation, rope, transformer
from klein_core.denoiser.packing import Packing, Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError, InvalidInput
from tests.tiny.transformer import (
    oracle_velocity,
    random_span,
    relative_error,
    save_tiny_transformer,
    tiny_oracle,
    twin,
)

TOLERANCE = 1e-5
REFERENCES = [[], [(3, 4)], [(2, 6), (4, 4), (5, 3)]]
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_attention_heads": 3, "attention_head_dim": 32, "axes_dims_rope": (8, 8, 8, 8), "in_channels": 128},
    {"num_attention_heads": 1, "attention_head_dim": 24, "axes_dims_rope": (4, 12, 6, 2), "mlp_ratio": 2.0},
    {"num_layers": 1, "num_single_layers": 1, "rope_theta": 500, "joint_attention_dim": 40, "eps": 1e-4},
    {"attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)},
]


def span_for(shape: dict[str, Any], references: list[tuple[int, int]], **changes: Any) -> Span:
    channels = {key: shape[key] for key in ("joint_attention_dim", "in_channels") if key in shape}
    return random_span([(4, 6), *references], **channels, **changes)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("references", REFERENCES, ids=len)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_diffusers(shape: dict[str, Any], references: list[tuple[int, int]]):
    oracle = tiny_oracle(**shape)
    for sigma in (1.0, 0.717, 0.02):
        span = span_for(shape, references, sigma=sigma)
        (velocity,) = twin(oracle)([span])
        assert velocity.shape == span.latents.shape
        assert relative_error(velocity, oracle_velocity(oracle, span)) < TOLERANCE


@pytest.mark.parametrize("references", REFERENCES, ids=len)
def test_bfloat16_stays_close_to_float32(references: list[tuple[int, int]]):
    oracle, span = tiny_oracle(), span_for({}, references)
    exact = oracle_velocity(oracle, span)
    (velocity,) = twin(tiny_oracle().to(torch.bfloat16))([span])
    assert velocity.dtype == torch.bfloat16
    theirs = relative_error(oracle_velocity(tiny_oracle().to(torch.bfloat16), span), exact)
    assert relative_error(velocity, exact) < 1.5 * theirs


@pytest.mark.parametrize(
    "loud",
    [
        "transformer_blocks.0.ff_context.linear_out",
        "transformer_blocks.1.ff_context.linear_out",
        "single_transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.2.attn.to_out",
    ],
)
def test_what_float16_cannot_hold_is_clipped_as_diffusers_clips(loud: str):
    oracle, span = tiny_oracle(), span_for({}, [(3, 4)], dtype=torch.float16)
    oracle.get_submodule(loud).weight.mul_(3000)
    oracle = oracle.half()
    expected = oracle_velocity(oracle, span)
    assert expected.isfinite().all()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            (velocity,) = twin(oracle)([span])
        assert relative_error(velocity, expected) < 0.02


def half_split(heads: Tensor, table: Tensor, workspace: object) -> Tensor:
    table = table.reshape(*table.shape[:2], *(1,) * (heads.ndim - 3), *table.shape[2:])
    (cosine, sine), (first, second) = table.unbind(-1), heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def value_first(gate_and_value: Tensor, workspace: object, out: Tensor | None = None) -> Tensor:
    value, gate = gate_and_value.chunk(2, dim=-1)
    return torch.mul(torch.nn.functional.silu(gate), value, out=out)


def scale_first(
    per_span: Tensor, sublayers: int, span_index: Tensor | None
) -> tuple[modulation.Modulation, ...]:
    right = original_modulations(per_span, sublayers, span_index)
    return tuple(m._replace(shift=m.scale - 1, scale=1 + m.shift) for m in right)


def references_first(span: Span) -> Tensor:
    return torch.cat([image.flatten(0, 1) for image in (*span.references, span.latents)])


original_modulations = modulation.modulations

WRONG = {
    "3 rotary on halves": [(blocks, "apply_rope", half_split)],
    "4 modulation in another order": [(transformer, "modulations", scale_first)],
    "5 SiLU on the second half": [(blocks, "swiglu", value_first)],
    "10 references before the target": [(transformer, "_image_tokens", references_first)],
    "11 reference times that begin at 1": [(rope, "REFERENCE_TIME_STEP", 1)],
}


@pytest.mark.parametrize("trap", WRONG)
def test_a_trap_would_be_noticed(trap: str, monkeypatch: pytest.MonkeyPatch):
    oracle, span = tiny_oracle(), span_for({}, [(4, 6)])
    ours, expected = twin(oracle), oracle_velocity(oracle, span)
    assert relative_error(ours([span])[0], expected) < TOLERANCE
    rope.span_rope_table.cache_clear()
    for module, name, wrong in WRONG[trap]:
        monkeypatch.setattr(module, name, wrong)
    assert relative_error(ours([span])[0], expected) > 100 * TOLERANCE
    rope.span_rope_table.cache_clear()


def test_the_heads_halves_are_scale_then_shift():
    oracle, span = tiny_oracle(), span_for({}, [])
    swapped = twin(oracle)
    weight = swapped.norm_out.linear.weight
    swapped.norm_out.linear.weight = torch.nn.Parameter(weight.roll(weight.shape[0] // 2, dims=0))
    assert relative_error(swapped([span])[0], oracle_velocity(oracle, span)) > 100 * TOLERANCE


def test_padding_tokens_of_the_prompt_are_attended():
    oracle, span = tiny_oracle(), span_for({}, [])
    trimmed = Span(span.prompt_embedding[:-2], span.latents, span.references, span.sigma)
    assert relative_error(twin(oracle)([trimmed])[0], oracle_velocity(oracle, span)) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_loads_a_folder(tmp_path, dtype):
    oracle, span = save_tiny_transformer(tmp_path), span_for({}, [(2, 2)])
    ours = FlowTransformer.from_folder(tmp_path, dtype=dtype)
    assert ours.dtype == (dtype or torch.float32)
    assert not ours.training
    tolerance = 0.1 if dtype == torch.bfloat16 else TOLERANCE
    assert relative_error(ours([span])[0], oracle_velocity(oracle, span)) < tolerance


def test_a_projection_missing_from_a_fused_group_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny_transformer(tmp_path)
    path = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["transformer_blocks.1.attn.add_k_proj.weight"]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.attn\.to_added_qkv"):
        FlowTransformer.from_folder(tmp_path)


def test_tensors_of_other_shapes_are_named_all_at_once():
    good = random_span([(2, 2)])
    bad = Span(good.prompt_embedding[:, :5], good.latents[0], (good.latents[..., :3],))
    with pytest.raises(InvalidInput) as caught:
        twin(tiny_oracle())([good, bad])
    assert [v.field for v in caught.value.violations] == ["prompt_embedding", "latents", "references[0]"]


def test_no_spans_is_no_work():
    assert twin(tiny_oracle())([]) == []


def test_lengths_of_a_packing():
    packing = Packing.of([random_span([(2, 3), (1, 4)]), random_span([(2, 2)], text_length=5)])
    assert packing.text_lengths == (7, 5)
    assert packing.target_lengths == (6, 4)
    assert packing.joint_lengths == (17, 9)
    assert not packing.is_batch


def test_gradients_reach_every_parameter_and_match_inference():
    ours = twin(tiny_oracle()).requires_grad_(True)
    spans = [random_span([(3, 3), (2, 2)], sigma=s, seed=i) for i, s in enumerate((0.2, 0.9))]
    expected = ours(spans)
    with torch.enable_grad():
        velocities = ours(spans)
        torch.stack(velocities).square().mean().backward()
    for velocity, inferred in zip(velocities, expected, strict=True):
        assert relative_error(velocity, inferred) < TOLERANCE
    # Keys of the last layer see every token; gates and scales of each kind of token must have learned too.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_gradients_equal_diffusers():
    oracle = tiny_oracle().requires_grad_(True)
    ours, span = twin(oracle), random_span([(3, 4), (2, 2)])
    ours.requires_grad_(True)
    with torch.enable_grad():
        ours([span])[0].square().mean().backward()
        oracle_velocity(oracle, span, gradients=True).square().mean().backward()
    theirs = dict(oracle.named_parameters())
    fused = checkpoint_names(ours.config)
    for name, parameter in ours.named_parameters():
        expected = torch.cat([theirs[part].grad for part in fused.get(name, (name,))])
        assert relative_error(parameter.grad, expected) < 1e-4, name

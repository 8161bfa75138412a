"""Position ids and RoPE tables against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_core.denoiser.rope import apply_rope, rope_table, span_ids, span_rope_table
from klein_core.denoiser.workspace import Workspace

grids = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=15)
@given(text_length=st.integers(1, 40), grids=grids)
def test_ids_equal_diffusers(text_length: int, grids: tuple[tuple[int, int], ...]):
    target, *references = [torch.zeros(1, 1, *grid) for grid in grids]
    expected = [Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, text_length, 1))[0]]
    expected.append(Flux2KleinPipeline._prepare_latent_ids(target)[0])
    if references:
        expected.append(Flux2KleinPipeline._prepare_image_ids(references)[0])
    assert torch.equal(span_ids(text_length, grids), torch.cat(expected).double())


def test_reference_times_begin_at_ten():
    ids = span_ids(1, ((1, 1), (1, 1), (1, 1)))
    assert ids[:, 0].tolist() == [0, 0, 10, 20]


@pytest.mark.parametrize(
    ("axes", "theta"), [((32, 32, 32, 32), 2000.0), ((4, 4, 4, 4), 2000.0), ((8, 2, 6), 7.5)]
)
def test_the_table_equals_diffusers_exactly(axes: tuple[int, ...], theta: float):
    ids = span_ids(512, ((16, 12), (3, 128), (128, 3)))
    cosine, sine = Flux2PosEmbed(theta=theta, axes_dim=axes)(ids)
    ours = rope_table(ids, axes, theta)
    assert ours.dtype == torch.float32
    assert torch.equal(ours[..., 0].repeat_interleave(2, dim=1), cosine)
    assert torch.equal(ours[..., 1].repeat_interleave(2, dim=1), sine)


def test_complex_and_compiled_rotation_agree(monkeypatch: pytest.MonkeyPatch):
    heads = torch.randn(2, 10, 2, 3, 8)
    table = rope_table(span_ids(4, ((2, 3),)), (2, 2, 2, 2), 2000)[None]
    with torch.enable_grad():
        complex_product = apply_rope(heads, table, Workspace())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(heads, table, Workspace()), complex_product)


def test_rotation_keeps_norms_and_does_not_change_text_position_zero():
    heads = torch.randn(1, 5, 2, 16)
    rotated = apply_rope(
        heads, span_rope_table(1, ((2, 2),), (4, 4, 4, 4), 2000.0, torch.device("cpu"))[None], Workspace()
    )
    torch.testing.assert_close(rotated.norm(dim=-1), heads.norm(dim=-1))
    assert torch.equal(rotated[:, 0], heads[:, 0])
    assert not torch.allclose(rotated[:, 2], heads[:, 2])

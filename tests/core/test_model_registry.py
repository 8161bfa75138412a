"""The registry of published models is frozen, and identifies bare files by shape and name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from klein_core.errors import CheckpointError
from klein_core.model_registry import (
    PUBLISHED_MODELS,
    SMALL_DECODER,
    published_model,
    variant_of_bare_file,
    variants_of_shape,
)

SIZES = {
    "4b": ["klein-4b", "klein-base-4b"],
    "9b": ["klein-9b", "klein-base-9b", "klein-9b-kv"],
}


@pytest.mark.parametrize("row", PUBLISHED_MODELS.values(), ids=lambda row: row.name)
def test_each_row_fits_together(row):
    assert row.transformer.joint_attention_dim == row.text_encoder.embedding_channels
    assert row.transformer.in_channels == row.vae.packed_channels == SMALL_DECODER.vae.packed_channels
    assert (row.default_step_count, row.default_guidance_scale) == (
        (4, 1.0) if row.is_distilled else (50, 4.0)
    )
    assert row.license.non_commercial == row.gated == ("9b" in row.name)


def test_only_one_row_keeps_references_and_only_base_rows_are_not_distilled():
    assert [row.name for row in PUBLISHED_MODELS.values() if row.uses_reference_cache] == ["klein-9b-kv"]
    undistilled = [row.name for row in PUBLISHED_MODELS.values() if not row.is_distilled]
    assert undistilled == ["klein-base-4b", "klein-base-9b"]


def test_rows_cannot_be_changed():
    row = published_model("klein-4b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.name = "another"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PUBLISHED_MODELS["klein-4b"] = row  # type: ignore[index]
    with pytest.raises(TypeError):
        row.quantized["fp8"] = None  # type: ignore[index]


def test_names_are_found_in_any_case_and_unknown_ones_list_the_known():
    assert published_model("Klein-9B-kv").uses_reference_cache
    with pytest.raises(CheckpointError, match="Did you mean klein-base-4b") as caught:
        published_model("klein-base4b")
    assert all(name in str(caught.value) for name in PUBLISHED_MODELS)


@pytest.mark.parametrize("names", SIZES.values(), ids=SIZES)
def test_a_bare_file_needs_a_name_because_models_of_a_size_have_equal_tensors(names):
    shape = published_model(names[0]).transformer
    assert [row.name for row in variants_of_shape(shape)] == names
    with pytest.raises(CheckpointError, match=f"name one of {', '.join(names)}"):
        variant_of_bare_file(shape)
    for name in names:
        assert variant_of_bare_file(shape, name).name == name


def test_a_name_of_another_size_and_a_shape_of_no_model_are_refused():
    shape = published_model("klein-4b").transformer
    with pytest.raises(CheckpointError, match=r"klein-9b has another shape.*klein-4b, klein-base-4b"):
        variant_of_bare_file(shape, "klein-9b")
    with pytest.raises(CheckpointError, match="no known variant has this shape: 6 double"):
        variant_of_bare_file(dataclasses.replace(shape, num_layers=6))


def test_it_needs_no_torch():
    script = "import sys, klein_core.model_registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

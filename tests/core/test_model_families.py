"""Models of other families: recognized by name, and refused with one sentence wherever one is loaded or inspected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from klein_core.checkpoint.config import read_text_encoder_config, read_variant
from klein_core.checkpoint.inspect import inspect_path
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER, other_family, published_model
from klein_core.pipeline import Pipeline
from tests.tiny.checkpoint import save_tiny_checkpoint

FLUX_3 = "FLUX.3, a later family .*this suite serves FLUX.2 .klein"
ENTRIES = {
    "modelspec.architecture": "flux-3-klein-4b",
    "modelspec.title": "FLUX.3 [klein]",
    "title": "flux3 klein",
}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "FLUX.3-klein-4B",
            "black-forest-labs/FLUX.3-klein-base-4B",
            "flux.3-klein",
            "flux-3",
            "flux_3",
            "Flux3",
        ),
        *(
            "Flux3KleinPipeline",
            "Flux3Transformer2DModel",
            "AutoencoderKLFlux3",
            "flux-3-klein-4b.safetensors",
        ),
    ],
)
def test_flux_3_is_recognized(name: str):
    assert other_family(name).startswith("FLUX.3")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Flux2Pipeline", "FLUX.2 [dev]"),
        ("black-forest-labs/FLUX.2-dev", "FLUX.2 [dev]"),
        ("Mistral3ForConditionalGeneration", "a text encoder of FLUX.2 [dev]"),
        ("FluxPipeline", "FLUX.1"),
        ("FluxKontextPipeline", "FLUX.1"),
        ("FluxTransformer2DModel", "FLUX.1"),
        ("black-forest-labs/FLUX.1-schnell", "FLUX.1"),
        ("flux1-dev.safetensors", "FLUX.1"),
        ("flux-dev", "FLUX.1"),
    ],
)
def test_earlier_families_are_recognized(name: str, family: str):
    assert other_family(name).startswith(family)
    assert "this suite serves FLUX.2 [klein]" in other_family(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            name
            for row in PUBLISHED_MODELS.values()
            for name in (row.name, row.repository, row.transformer_file.name)
        ),
        *(SMALL_DECODER.repository, "Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2Transformer2DModel"),
        *(
            "AutoencoderKLFlux2",
            "Qwen3ForCausalLM",
            "someone/flux-3d-icons",
            "someone/FLUX.2-klein-like-flux.3",
        ),
        *("someone/klein-from-flux.1", "flux.30", "stable-diffusion", ""),
    ],
)
def test_klein_and_unknown_names_are_no_other_family(name: str):
    assert other_family(name) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", "Flux3KleinPipeline"),
        ("model_index.json", "transformer", ["diffusers", "Flux3Transformer2DModel"]),
        ("transformer/config.json", "_class_name", "Flux3Transformer2DModel"),
        ("vae/config.json", "_class_name", "AutoencoderKLFlux3"),
    ],
)
def test_a_class_of_flux_3_in_any_file_is_named_at_load_and_by_inspect(
    folder: Path, file: str, key: str, value: object
):
    edit(folder / file, **{key: value})
    for read in (read_variant, Pipeline.from_folder):
        with pytest.raises(CheckpointError, match=FLUX_3):
            read(folder)
    try:
        report = inspect_path(folder)
    except CheckpointError as error:
        found = [str(error)]
    else:
        found = [*report.problems, *(text for part in report.components for text in part.problems)]
    assert any("FLUX.3" in text for text in found)


def test_a_whole_folder_of_flux_3_is_one_sentence(folder: Path):
    edit(folder / "model_index.json", _class_name="Flux3KleinPipeline")
    edit(folder / "text_encoder/config.json", model_type="qwen9")
    # Also where one stage alone reads its part of the folder.
    for read in (inspect_path, read_text_encoder_config, FlowTransformer.from_folder):
        with pytest.raises(CheckpointError, match=f"_class_name is Flux3KleinPipeline: this is {FLUX_3}"):
            read(folder)


@pytest.mark.parametrize("key", ENTRIES)
def test_a_file_with_a_header_of_flux_3_is_refused(folder: Path, key: str):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {key: ENTRIES[key]})
    for read in (inspect_path, FlowTransformer.from_folder):
        with pytest.raises(CheckpointError, match=f"header entry {key} is .*{FLUX_3}"):
            read(path.parent)


def test_a_file_of_unknown_layout_is_named_by_its_header_or_its_name(tmp_path: Path):
    tensors = {"blocks.0.weight": torch.zeros(1)}
    for name, metadata, family in (
        ("flux-3-klein-4b", {}, FLUX_3),
        ("a", {"modelspec.architecture": "Flux.3"}, FLUX_3),
        ("b", {"modelspec.architecture": "flux-1-dev"}, "FLUX.1, an earlier family"),
    ):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match=family):
            inspect_path(path)


def test_a_name_of_klein_with_a_header_of_another_flux_loads(folder: Path):
    """Tools write older families' names into files of [klein]; the tensors decide."""
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(
        safetensors.torch.load_file(path), path, {"modelspec.architecture": "flux-1-dev"}
    )
    assert inspect_path(folder).is_usable


def test_a_variant_of_another_family_is_named():
    with pytest.raises(CheckpointError, match=FLUX_3):
        published_model("flux.3-klein-4b")

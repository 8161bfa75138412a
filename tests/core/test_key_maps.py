"""Files of every layout of names load into equal networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klein_core.checkpoint.files import open_checkpoint
from klein_core.checkpoint.key_mapping import find_layout
from klein_core.checkpoint.tensor_reader import TensorReader
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError
from klein_core.text_encoder.encoder import TextEncoder
from klein_core.vae_decoder.decoder import VaeDecoder
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.layouts import bare_text_encoder, bfl_transformer, bfl_vae, prefixed

FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a function that copies the checkpoint with one component's tensors changed."""

    def write(component: str, change: Callable[[Tensors], Tensors]):
        for path in folder.rglob("*"):
            target = tmp_path / path.relative_to(folder)
            if path.is_dir():
                target.mkdir()
            elif path != folder / FILES[component]:
                target.write_bytes(path.read_bytes())
        tensors = change(load_file(folder / FILES[component]))
        save_file(tensors, (tmp_path / FILES[component]).with_name("any name.safetensors"))
        return tmp_path

    return write


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@contextmanager
def read_names(monkeypatch) -> Iterator[list[str]]:
    """Lists the tensors whose bytes are read inside the block, one entry a reading."""
    names: list[str] = []
    fill = TensorReader._fill

    def counted(self, name, first, values):
        names.append(name)
        fill(self, name, first, values)

    with monkeypatch.context() as patch:
        patch.setattr(TensorReader, "_fill", counted)
        yield names


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("writer", [dict, bfl_transformer])
def test_a_transformer_is_the_same_from_either_layout_and_behind_any_prefix(folder, copy, writer, prefix):
    ours = FlowTransformer.from_folder(copy("transformer", lambda t: prefixed(writer(t), prefix)))
    assert_equal(ours, FlowTransformer.from_folder(folder))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("writer", [dict, bfl_vae])
def test_an_autoencoder_is_the_same_from_either_layout(folder, copy, writer, prefix):
    ours = VaeDecoder.from_folder(copy("vae", lambda t: prefixed(writer(t), prefix)))
    assert_equal(ours.autoencoder, VaeDecoder.from_folder(folder).autoencoder)


@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.qwen3_4b.transformer.model."])
def test_a_text_encoder_is_the_same_with_or_without_a_prefix_and_a_head(folder, copy, prefix, lm_head):
    def change(tensors: Tensors) -> Tensors:
        bare = bare_text_encoder(tensors, lm_head=False)
        head = {prefix.removesuffix("model.") + "lm_head.weight": torch.ones(3, 3)} if lm_head else {}
        return prefixed(bare, prefix) | head

    ours = TextEncoder.from_folder(copy("text_encoder", change))
    assert_equal(ours.model, TextEncoder.from_folder(folder).model)


def test_a_stage_finds_its_part_of_a_whole_model_s_file_and_reads_no_other(folder, tmp_path, monkeypatch):
    whole = {
        **prefixed(bfl_transformer(load_file(folder / FILES["transformer"])), "model.diffusion_model."),
        **prefixed(bfl_vae(load_file(folder / FILES["vae"])), "first_stage_model."),
        **prefixed(
            bare_text_encoder(load_file(folder / FILES["text_encoder"]), lm_head=True),
            "text_encoders.qwen3_4b.transformer.model.",
        ),
    }
    for component, path in FILES.items():
        (tmp_path / component).mkdir()
        save_file(whole, tmp_path / path)
        (tmp_path / component / "config.json").write_bytes((folder / component / "config.json").read_bytes())
    with read_names(monkeypatch) as names:
        transformer = FlowTransformer.from_folder(tmp_path)
    assert names
    assert all(name.startswith("model.diffusion_model.") for name in names)
    with read_names(monkeypatch) as names:
        autoencoder = VaeDecoder.from_folder(tmp_path).autoencoder
    assert names
    assert all(name.startswith("first_stage_model.") for name in names)
    assert_equal(transformer, FlowTransformer.from_folder(folder))
    assert_equal(autoencoder, VaeDecoder.from_folder(folder).autoencoder)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    assert_equal(TextEncoder.from_folder(tmp_path).model, TextEncoder.from_folder(folder).model)


def test_diffusers_reads_the_authors_layout_as_we_do(folder):
    """The test's writer against diffusers' own conversion, which knows nothing of either of us."""
    tensors = load_file(folder / FILES["transformer"])
    converted = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(bfl_transformer(tensors))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensors[name]) for name in tensors)


def test_diffusers_reads_the_authors_autoencoder_as_we_do(folder):
    """Its conversion of the layout's ancestor, which has the two 1×1 convolutions outside."""
    tensors = load_file(folder / FILES["vae"])
    authors = {
        name.replace("encoder.quant_conv", "quant_conv").replace(
            "decoder.post_quant_conv", "post_quant_conv"
        ): tensor
        for name, tensor in bfl_vae(tensors).items()
        if not name.startswith("bn.")
    }
    levels = {"down_block_types": range(4), "up_block_types": range(4)}
    converted = single_file_utils.convert_ldm_vae_checkpoint(authors, levels)
    assert converted.keys() == {name for name in tensors if not name.startswith("bn.")}
    assert all(torch.equal(converted[name], tensors[name]) for name in converted)


def test_the_halves_of_the_head_are_told_apart_by_layout(folder, copy):
    """Loaded without the swap, every value would be in the wrong half."""
    changed = copy("transformer", bfl_transformer)
    stored = load_file(changed / "transformer" / "any name.safetensors")[
        "final_layer.adaLN_modulation.1.weight"
    ]
    head = FlowTransformer.from_folder(changed).norm_out.linear.weight
    assert torch.equal(head, torch.cat(stored.chunk(2)[::-1]))
    assert not torch.equal(head, stored)


@pytest.mark.parametrize(
    ("component", "change", "words"),
    [
        (
            "transformer",
            lambda t: bfl_transformer(t) | {"guidance_in.in_layer.weight": torch.ones(1)},
            "guidance_in",
        ),
        ("transformer", lambda t: _without(bfl_transformer(t), "txt_in.weight"), "missing: txt_in.weight"),
        (
            "transformer",
            lambda t: _wider(bfl_transformer(t), "final_layer.adaLN_modulation.1.weight"),
            "final_layer.adaLN_modulation.1.weight",
        ),
        (
            "transformer",
            lambda t: _wider(bfl_transformer(t), "double_blocks.0.img_attn.qkv.weight"),
            "double_blocks.0.img_attn.qkv.weight",
        ),
        (
            "transformer",
            lambda t: {"weight": torch.ones(1)},
            "no tensor of a klein transformer: it holds weight",
        ),
        ("vae", lambda t: _without(bfl_vae(t), "bn.running_var"), "missing: bn.running_var"),
        (
            "vae",
            lambda t: _without(t, "bn.running_mean", "bn.running_var"),
            "missing: bn.running_mean, bn.running_var",
        ),
        (
            "vae",
            lambda t: bfl_vae(t) | {"decoder.mid.attn_1.q.weight": torch.ones(32, 32, 3, 3)},
            "attn_1.q.weight",
        ),
        ("text_encoder", lambda t: _without(t, "model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj"),
        ("text_encoder", lambda t: t | {"visual.patch.weight": torch.ones(1)}, "visual.patch.weight"),
    ],
)
def test_what_does_not_fit_is_named_as_the_file_names_it(copy, component, change, words):
    load = {
        "transformer": FlowTransformer.from_folder,
        "vae": VaeDecoder.from_folder,
        "text_encoder": TextEncoder.from_folder,
    }[component]
    with pytest.raises(CheckpointError) as caught:
        load(copy(component, change))
    assert words in str(caught.value)


def test_another_component_s_file_is_called_what_it_is(folder):
    with pytest.raises(CheckpointError, match="no tensor of a klein vae: it holds a transformer"):
        find_layout("vae", open_checkpoint(folder / FILES["transformer"]))


def test_a_stage_reads_each_needed_tensor_once_and_no_other(folder, copy, monkeypatch):
    """Also not the language head, the norm and the layer after the last tap, nor the other stages' files."""
    changed = copy("text_encoder", lambda t: t | {"lm_head.weight": torch.ones(320, 32)})
    with read_names(monkeypatch) as names:
        encoder = TextEncoder.from_folder(changed)
    assert sorted(names) == sorted("model." + name for name in encoder.model.state_dict())
    assert not any(name.startswith(("model.layers.3.", "lm_head", "model.norm")) for name in names)


def _without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _wider(tensors: Tensors, name: str) -> Tensors:
    return tensors | {name: torch.cat([tensors[name], tensors[name][:16]])}

"""The table of configuration keys against the signatures of the classes that read them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import transformers.tokenization_utils_tokenizers as backend
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3Config

from klein_core.checkpoint.config import read_noise_schedule, read_transformer_config, read_vae_config
from klein_core.checkpoint.config_keys import CONFIG_KEYS, TOKENIZER, ConfigKeys
from klein_core.errors import CheckpointError
from klein_core.text_encoder.tokenizer import PromptTokenizer
from klein_core.variants import NoiseSchedule
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.text_encoder import tiny_tokenizer

READERS = {
    "model_index.json": (Flux2KleinPipeline, Flux2KleinKVPipeline),
    "scheduler/scheduler_config.json": (FlowMatchEulerDiscreteScheduler,),
    "transformer/config.json": (Flux2Transformer2DModel,),
    "vae/config.json": (AutoencoderKLFlux2,),
}
POPPED = re.compile(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)["']""")
LOADING_ARGUMENTS = set(
    ["tokenizer", "gguf_file", "_spm_precompiled_charsmap", "backend", "files_loaded", "unk_id"]
)
"""Arguments that from_pretrained passes on or other backends read; no key of a Qwen2 tokenizer's file."""


def parameters(reader: type) -> set[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = inspect.signature(reader.__init__).parameters.values()
    return {each.name for each in named if each.kind not in kinds} - {"self"}


@pytest.mark.parametrize("file", READERS)
def test_every_key_of_a_diffusers_class_is_in_the_table(file: str):
    read = set().union(*map(parameters, READERS[file]))
    assert len(read) > 4
    assert read - CONFIG_KEYS[file].known == set()


def test_every_key_of_qwen3_is_in_the_table():
    read = {each.name for each in dataclasses.fields(Qwen3Config)}
    assert "rope_parameters" in read
    assert read - CONFIG_KEYS["text_encoder/config.json"].known == set()


def test_every_key_of_the_tokenizer_is_in_the_table():
    sources = map(inspect.getsource, (PreTrainedTokenizerBase.__init__, backend.TokenizersBackend.__init__))
    read = {key for source in sources for key in POPPED.findall(source)}
    read |= parameters(Qwen2Tokenizer) | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES)
    assert {"padding_side", "split_special_tokens"} <= read
    assert read - TOKENIZER.known - LOADING_ARGUMENTS == set()


def defaults(reader: type) -> dict[str, object]:
    named = inspect.signature(reader.__init__).parameters
    return {name: each.default for name, each in named.items() if each.default is not inspect.Parameter.empty}


def test_a_key_that_is_missing_means_what_it_means_to_diffusers(tmp_path: Path):
    folder = tmp_path / "model"
    save_tiny_checkpoint(folder)
    (folder / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderKLFlux2"}))
    required = {
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
    }
    (folder / "transformer/config.json").write_text(json.dumps(required))
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    vae, transformer = read_vae_config(folder), read_transformer_config(folder)
    for read, reader, keys in (
        (vae, AutoencoderKLFlux2, CONFIG_KEYS["vae/config.json"]),
        (transformer, Flux2Transformer2DModel, CONFIG_KEYS["transformer/config.json"]),
    ):
        expected = {key: value for key, value in defaults(reader).items() if key in keys.honored}
        # Unset means as many as come in.
        expected.pop("out_channels", None)
        assert {key: getattr(read, key) for key in expected} == expected
    schedule = defaults(FlowMatchEulerDiscreteScheduler)
    assert read_noise_schedule(folder) == NoiseSchedule(
        is_dynamic=schedule["use_dynamic_shifting"], shift=schedule["shift"], is_linear=False
    )


@pytest.mark.parametrize("file", CONFIG_KEYS)
def test_a_key_has_one_treatment(file: str):
    keys = CONFIG_KEYS[file]
    assert len(keys.known) == len(keys.honored) + len(keys.fixed) + len(keys.without_effect)


def test_a_new_key_of_a_class_would_be_noticed():
    known = CONFIG_KEYS["scheduler/scheduler_config.json"]
    shorter = ConfigKeys(known.honored, {}, known.without_effect)
    assert parameters(FlowMatchEulerDiscreteScheduler) - shorter.known >= {"use_karras_sigmas"}


OTHER_VALUES = {"padding_side": "left", "truncation_side": "left", "split_special_tokens": True}


@pytest.mark.parametrize("key", TOKENIZER.fixed)
def test_a_tokenizer_that_is_set_otherwise_is_refused_by_name(tmp_path: Path, key: str):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: OTHER_VALUES[key]}))
    with pytest.raises(CheckpointError, match=rf"{key} is {OTHER_VALUES[key]!r}; only"):
        PromptTokenizer.from_folder(tmp_path, 64)


def test_a_tokenizer_whose_own_file_pads_on_the_left_is_refused(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "padding_side"})
    )
    path = tmp_path / "tokenizer.json"
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding}))
    with pytest.raises(CheckpointError, match="padding_side is 'left'"):
        PromptTokenizer.from_folder(tmp_path, 64)

"""Text encoder against diffusers' pipeline, and each known mistake in reimplementing it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import Flux2KleinPipeline

from klein_core.errors import CheckpointError, InvalidInput
from klein_core.text_encoder.encoder import TextEncoder
from klein_core.text_encoder.tokenizer import TokenizedPrompt
from tests.tiny.text_encoder import save_tiny_text_encoder, tiny_tokenizer

LENGTH = 64
PROMPTS = ["", "A cat on the mat", "ü 猫 \N{CAT FACE}", "the end<|im_end|>\n<think>no", "a long one " * 40]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_tiny_text_encoder(folder)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return TextEncoder.from_folder(checkpoint[0])


def diffusers_embedding(model, prompts, length=LENGTH, taps=(1, 2, 3)):
    with torch.no_grad():
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(
            model, tiny_tokenizer(), prompts, max_sequence_length=length, hidden_states_layers=list(taps)
        )


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_embeddings_equal_diffusers_alone_and_in_a_batch(checkpoint, encoder):
    together = encoder.encode(PROMPTS)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        expected = diffusers_embedding(checkpoint[1], prompt)[0]
        [alone] = encoder.encode([prompt])
        assert batched.embedding.shape == (LENGTH, 96)
        assert relative(alone.embedding, expected) <= 1e-5
        assert relative(batched.embedding, expected) <= 1e-5
        assert (alone.token_count, alone.truncated) == (batched.token_count, batched.truncated)


def test_kleins_defaults_apply_when_the_configuration_is_silent(tmp_path):
    """36 layers tapped at 9, 18 and 27, 512 tokens; layers after the last tap are not even built."""
    model = save_tiny_text_encoder(tmp_path, num_hidden_layers=36, intermediate_size=32)
    path = tmp_path / "text_encoder/config.json"
    config = json.loads(path.read_text())
    del config["text_encoder_out_layers"], config["max_sequence_length"]
    path.write_text(json.dumps(config))
    encoder = TextEncoder.from_folder(tmp_path)
    assert len(encoder.model.layers) == 27
    assert encoder.config.tapped_layers == (9, 18, 27)
    expected = diffusers_embedding(model, "A cat", 512, (9, 18, 27))[0]
    [found] = encoder.encode(["A cat"])
    assert found.embedding.shape == (512, 96)
    assert relative(found.embedding, expected) <= 1e-5


def test_every_tap_is_unnormed(checkpoint, encoder):
    """The deepest tap is the cut model's last layer, where a final norm would show."""
    [found] = encoder.encode(["A cat"])
    deepest = found.embedding[:, -32:]
    normed = checkpoint[1].model.norm(deepest)
    expected = diffusers_embedding(checkpoint[1], "A cat")[0][:, -32:]
    assert relative(deepest, expected) <= 1e-5
    assert relative(normed, expected) > 0.1


def test_pads_are_masked_yet_computed(encoder):
    tokens = encoder.tokenizer.tokenize("A cat")
    unmasked = TokenizedPrompt(tokens.token_ids, (1,) * LENGTH, LENGTH, truncated=False)
    masked_rows, unmasked_rows = encoder.embed([tokens])[0], encoder.embed([unmasked])[0]
    real = tokens.token_count
    assert relative(masked_rows[:real], unmasked_rows[:real]) <= 1e-5
    assert relative(masked_rows[real:], unmasked_rows[real:]) > 1e-2
    assert masked_rows[real:].abs().amax(dim=1).min() > 0


def test_the_pad_token_matters_and_is_the_tokenizers(checkpoint, encoder):
    tokens = encoder.tokenizer.tokenize("A cat")
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert set(tokens.token_ids[tokens.token_count :]) == {tokenizer.pad_token_id}
    wrong_ids = (
        *tokens.token_ids[: tokens.token_count],
        *[tokenizer.eos_token_id] * (LENGTH - tokens.token_count),
    )
    wrong = TokenizedPrompt(wrong_ids, tokens.attention_mask, tokens.token_count, truncated=False)
    assert relative(encoder.embed([wrong])[0], diffusers_embedding(checkpoint[1], "A cat")[0]) > 1e-2


def test_no_prompts_are_no_embeddings(encoder):
    assert encoder.encode([]) == []


def test_one_bad_prompt_fails_the_batch(encoder):
    with pytest.raises(InvalidInput):
        encoder.encode(["fine", "x" * 10_000_000])


def test_dtype_is_the_checkpoints_unless_given(tmp_path):
    save_tiny_text_encoder(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path / "text_encoder")
    [own] = TextEncoder.from_folder(tmp_path).encode(["A cat"])
    [full] = TextEncoder.from_folder(tmp_path, dtype=torch.float32).encode(["A cat"])
    assert own.embedding.dtype == torch.bfloat16
    assert full.embedding.dtype == torch.float32
    assert relative(own.embedding.float(), full.embedding) < 0.1


def test_rotary_frequencies_are_not_rounded_in_bf16(tmp_path):
    """They are computed, not loaded: a cast of the whole model would ruin far positions."""
    save_tiny_text_encoder(tmp_path)
    model = TextEncoder.from_folder(tmp_path, dtype=torch.bfloat16).model
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert not model.rotary_emb.inv_freq.is_meta
    assert model.rotary_emb.inv_freq[1] == pytest.approx(1e6 ** (-2 / 16), rel=1e-6)


def test_a_sharded_checkpoint_without_its_unneeded_shards_loads(tmp_path, encoder):
    model = save_tiny_text_encoder(tmp_path, tie_word_embeddings=False)
    (tmp_path / "text_encoder/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="40KB")
    index = json.loads((tmp_path / "text_encoder/model.safetensors.index.json").read_text())["weight_map"]
    needless = lambda name: name.startswith(("lm_head", "model.norm", "model.layers.3."))  # noqa: E731
    needed = {file for name, file in index.items() if not needless(name)}
    dropped = set(index.values()) - needed
    assert dropped
    for file in dropped:
        (tmp_path / "text_encoder" / file).unlink()
    [found] = TextEncoder.from_folder(tmp_path).encode(["A cat"])
    assert relative(found.embedding, diffusers_embedding(model, "A cat")[0]) <= 1e-5


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "nonsense"), ("num_key_value_heads", "two")])
def test_an_unusable_configuration_is_a_checkpoint_error(tmp_path, key, value):
    save_tiny_text_encoder(tmp_path)
    path = tmp_path / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match="text_encoder"):
        TextEncoder.from_folder(tmp_path)

"""Text encoder: prompts to embeddings, with Qwen3 cut after its last tapped layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from klein_core.checkpoint.component import open_component
from klein_core.checkpoint.config import read_text_encoder_config
from klein_core.checkpoint.config_keys import TEXT_ENCODER
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.weights import load_weights, weights_digest
from klein_core.errors import CheckpointError
from klein_core.linear import Linear
from klein_core.params import DEFAULT_LIMITS, Limits
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_core.quantization.loading import QuantizedLoader
from klein_core.text_encoder.tokenizer import PromptTokenizer, TokenizedPrompt
from klein_core.variants import TextEncoderConfig


class TextEncoder:
    """A checkpoint's tokenizer and cut Qwen3 on one device."""

    def __init__(self, config: TextEncoderConfig, tokenizer: PromptTokenizer, model: Qwen3Model) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model

    @classmethod
    def from_folder(
        cls,
        files: ModelFiles | Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantization: str = NO_QUANTIZATION,
    ) -> TextEncoder:
        """Loads a model's tokenizer, and its text encoder up to the last tapped layer.

        Args:
            files: a model's folder in diffusers' layout, or the path of each part.
            device: device of the weights.
            dtype: of activations and of weights that are not quantized; `None` is the checkpoint's.
            quantization: format to quantize the layers' plain weights to, one of `constants.QUANTIZATIONS`.

        Raises:
            CheckpointError: files are missing, corrupt or do not fit the configuration.
        """
        files = ModelFiles.of(files)
        config = read_text_encoder_config(files)
        tokenizer = PromptTokenizer.from_folder(files.tokenizer_folder, config.sequence_length)
        model = build_cut_qwen3(config, device)
        component = open_component(files, config)
        quantized = QuantizedLoader.of(component, quantization, is_layer_linear)
        load_weights(model, component, device=device, dtype=dtype, quantized=quantized)
        model.requires_grad_(False)
        model.train(False)
        return cls(config, tokenizer, model)

    def encode(self, prompts: Sequence[str], limits: Limits = DEFAULT_LIMITS) -> list[EncodedPrompt]:
        """Encodes prompts in one batch; embeddings have the model's dtype and device.

        Raises:
            InvalidInput: a prompt has more characters than `limits` allow, or is not valid text.
        """
        if not prompts:
            return []
        tokenized = [self.tokenizer.tokenize(prompt, limits) for prompt in prompts]
        embeddings = self.embed(tokenized)
        return [
            EncodedPrompt(embedding, tokens.token_count, tokens.truncated)
            for embedding, tokens in zip(embeddings, tokenized, strict=True)
        ]

    def digest(self) -> str:
        """Returns a digest of weights, tokenizer and taps, as a cache key for embeddings; see `weights_digest`."""
        taps = f"{self.config.tapped_layers} {self.config.sequence_length}"
        return weights_digest(self.model, self.tokenizer.digest, taps)

    @torch.no_grad()
    def embed(self, tokenized: Sequence[TokenizedPrompt]) -> Tensor:
        """Runs the model on tokenized prompts; returns (B, sequence_length, embedding_channels)."""
        device = self.model.device
        token_ids = torch.tensor([tokens.token_ids for tokens in tokenized], device=device)
        mask = torch.tensor([tokens.attention_mask for tokens in tokenized], device=device)
        return tapped_embedding(self.model, token_ids, mask, self.config.tapped_layers)


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as input of the flow transformer."""

    embedding: Tensor
    """(sequence_length, embedding_channels), padding rows included: the transformer attends to them."""
    token_count: int
    """Tokens without padding, the chat template's included."""
    truncated: bool
    """Whether the prompt was longer than the sequence and was cut."""


def is_layer_linear(parameter: str) -> bool:
    """Returns whether a parameter is the weight of a linear layer; the embedding table and the norms are not."""
    return parameter.startswith("layers.") and parameter.endswith("_proj.weight")


def build_cut_qwen3(config: TextEncoderConfig, device: torch.device | str = "cpu") -> Qwen3Model:
    """Builds Qwen3 up to its last tapped layer, without its final norm.

    Parameters are on `meta`, the rotary frequencies on `device`.

    Raises:
        CheckpointError: the configuration does not describe a Qwen3.
    """
    try:
        qwen3 = Qwen3Config.from_dict(_cut_config(config))
        qwen3._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = Qwen3Model(qwen3)
            for name, layer in list(model.layers.named_modules()):
                if isinstance(layer, torch.nn.Linear):
                    # Ours takes quantized weights and is fast in bfloat16 on every CPU.
                    model.layers.set_submodule(name, Linear(layer.in_features, layer.out_features))
    # Qwen3Config's checks raise exceptions of several types.
    except Exception as error:
        raise CheckpointError(
            f"text_encoder/config.json is not a usable Qwen3 configuration: {error}"
        ) from error
    model.set_submodule("norm", torch.nn.Identity())
    # The frequencies are computed, not stored in the checkpoint: on meta they would have no values.
    model.rotary_emb = Qwen3RotaryEmbedding(qwen3).to(device)
    return model


def tapped_embedding(model: Qwen3Model, token_ids: Tensor, mask: Tensor, taps: Sequence[int]) -> Tensor:
    """Concatenates the tapped hidden states of tokens (B, S) on the channel axis: (B, S, taps · hidden).

    Padding is masked as keys, but its rows are computed, because the flow transformer attends to them.
    Source: diffusers' `Flux2KleinPipeline`.
    """
    if _attends_to_all_before(model.config):
        # transformers would make the same mask, but looks at its values for that: a GPU and its host would wait twice.
        length = token_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=token_ids.device).tril()
        mask = causal & mask.bool()[:, None, None, :]
    output = model(input_ids=token_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[tap] for tap in taps], dim=-1)


def _attends_to_all_before(config: Qwen3Config) -> bool:
    """Returns whether all layers attend to every token before, as published ones do, and not to a window or to all."""
    return getattr(config, "is_causal", True) and set(config.layer_types or ()) == {"full_attention"}


def _cut_config(config: TextEncoderConfig) -> dict[str, object]:
    """Returns the Qwen3 configuration of the layers up to the last tapped one."""
    layer_count = max(config.tapped_layers)
    # Some of the keys without effect would change the form of the model's output.
    cut = {key: value for key, value in config.qwen3.items() if key not in TEXT_ENCODER.without_effect}
    cut |= {"num_hidden_layers": layer_count, "use_cache": False}
    # Describes the stored weights, which the loader handles; the network is built unquantized.
    cut.pop("quantization_config", None)
    if isinstance(cut.get("layer_types"), list):
        cut["layer_types"] = cut["layer_types"][:layer_count]
    return cut

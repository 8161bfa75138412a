"""Configurations of bare weights files, inferred from the shapes of their tensors. Torch-free.

Values that no shape determines are klein's: rotary axes and bases, epsilons, groups of the norms, tapped layers.
"""

from __future__ import annotations

import re

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.key_mapping import TEXT_ENCODER, TRANSFORMER, VAE, KeyMap, TensorSlice, find_layout
from klein_core.checkpoint.key_maps import EMBEDDING, text_encoder_key_map, transformer_key_map, vae_key_map
from klein_core.errors import CheckpointError
from klein_core.model_registry import PUBLISHED_MODELS
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

_BLOCK = "transformer_blocks.0"
_SINGLE_BLOCK = "single_transformer_blocks.0"
_PACKED_DTYPES = ("U8", "F4")
"""Dtypes that hold two 4-bit numbers in a byte: the columns are twice those of the shape."""


def transformer_config(checkpoint: Checkpoint) -> TransformerConfig:
    """Returns the configuration of a flow transformer.

    Raises:
        CheckpointError: a tensor that determines it is missing or of an impossible shape.
    """
    layout = find_layout(TRANSFORMER, checkpoint)
    one_block = TransformerConfig(num_layers=1, num_single_layers=1, num_attention_heads=1)
    shapes = _Shapes(checkpoint, layout.prefixed(transformer_key_map(one_block, layout.style)))
    hidden_size, head_dim = shapes.rows("x_embedder.weight"), shapes.rows(f"{_BLOCK}.attn.norm_q.weight")
    fused_rows = shapes.rows(f"{_SINGLE_BLOCK}.attn.to_qkv_mlp_proj.weight")
    if hidden_size % head_dim or head_dim % 8 or fused_rows <= 3 * hidden_size:
        raise CheckpointError(
            f"{checkpoint.path}: hidden size {hidden_size}, head size {head_dim} and {fused_rows} rows of a "
            "single-stream projection are not klein's"
        )
    return TransformerConfig(
        num_layers=shapes.count(f"{_BLOCK}.attn.norm_q.weight"),
        num_single_layers=shapes.count(f"{_SINGLE_BLOCK}.attn.norm_q.weight"),
        num_attention_heads=hidden_size // head_dim,
        attention_head_dim=head_dim,
        joint_attention_dim=shapes.columns("context_embedder.weight"),
        in_channels=shapes.columns("x_embedder.weight"),
        mlp_ratio=(fused_rows - 3 * hidden_size) / (2 * hidden_size),
        axes_dims_rope=(head_dim // 4,) * 4,
        timestep_guidance_channels=shapes.columns("time_guidance_embed.timestep_embedder.linear_1.weight"),
    )


def vae_config(checkpoint: Checkpoint) -> VaeConfig:
    """Returns the configuration of an autoencoder; its decoder may be narrower than its encoder.

    Raises:
        CheckpointError: a tensor that determines it is missing.
    """
    layout = find_layout(VAE, checkpoint)
    shapes = _Shapes(checkpoint, layout.prefixed(vae_key_map(VaeConfig(), layout.style)))
    levels = range(len(VaeConfig.block_out_channels))
    encoder = tuple(shapes.rows(f"encoder.down_blocks.{level}.resnets.0.conv1.weight") for level in levels)
    decoder = tuple(shapes.rows(f"decoder.up_blocks.{level}.resnets.0.conv1.weight") for level in levels)[
        ::-1
    ]
    return VaeConfig(
        block_out_channels=encoder,
        decoder_block_out_channels=None if decoder == encoder else decoder,
        layers_per_block=shapes.count("encoder.down_blocks.0.resnets.0.conv1.weight"),
        latent_channels=shapes.columns("decoder.conv_in.weight"),
        use_quant_conv=shapes.has("quant_conv.weight"),
        use_post_quant_conv=shapes.has("post_quant_conv.weight"),
        mid_block_add_attention=shapes.has("encoder.mid_block.attentions.0.to_q.weight"),
    )


def text_encoder_config(checkpoint: Checkpoint) -> TextEncoderConfig:
    """Returns the configuration of a Qwen3: the published one of these shapes, or else one tapped at its quarters.

    Raises:
        CheckpointError: a tensor that determines it is missing, or the layer count is not a multiple of 4.
    """
    layout = find_layout(TEXT_ENCODER, checkpoint)
    one_layer = TextEncoderConfig(qwen3={}, tapped_layers=(1,))
    shapes = _Shapes(checkpoint, layout.prefixed(text_encoder_key_map(one_layer)))
    layer = "layers.0.self_attn"
    head_dim = shapes.rows(f"{layer}.q_norm.weight")
    sizes = {
        "hidden_size": shapes.rows("layers.0.input_layernorm.weight"),
        "intermediate_size": shapes.rows("layers.0.mlp.gate_proj.weight"),
        "num_attention_heads": shapes.rows(f"{layer}.q_proj.weight") // head_dim,
        "num_key_value_heads": shapes.rows(f"{layer}.k_proj.weight") // head_dim,
        "head_dim": head_dim,
        "vocab_size": shapes.rows(EMBEDDING),
    }
    known = [
        row.text_encoder
        for row in PUBLISHED_MODELS.values()
        if sizes.items() <= row.text_encoder.qwen3.items()
    ]
    if known:
        return known[0]
    layer_count = shapes.count("layers.0.input_layernorm.weight")
    if layer_count % 4:
        raise CheckpointError(
            f"{checkpoint.path}: no published text encoder has these shapes, and {layer_count} layers cannot be "
            "tapped at each quarter; give a folder with config.json"
        )
    # Values that shapes do not determine are those of Qwen3-4B.
    qwen3 = {**PUBLISHED_MODELS["klein-4b"].text_encoder.qwen3, **sizes, "num_hidden_layers": layer_count}
    return TextEncoderConfig(qwen3, tapped_layers=tuple(layer_count * part // 4 for part in (1, 2, 3)))


class _Shapes:
    """The shapes of a component's tensors, by parameter."""

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap) -> None:
        self._checkpoint = checkpoint
        self._key_map = key_map

    def has(self, parameter: str) -> bool:
        return self._slice(parameter).name in self._checkpoint.files

    def rows(self, parameter: str) -> int:
        return self._axis(parameter, 0)

    def columns(self, parameter: str) -> int:
        columns = self._axis(parameter, 1)
        is_packed = self._checkpoint.entry(self._slice(parameter).name).dtype in _PACKED_DTYPES
        return 2 * columns if is_packed else columns

    def count(self, parameter: str) -> int:
        """Returns the number of blocks that have this parameter; `parameter` is that of block 0.

        Raises:
            CheckpointError: a block is missing.
        """
        before, _, after = self._slice(parameter).name.rpartition(".0.")
        numbered = re.compile(rf"{re.escape(before)}\.(\d{{1,6}})\.{re.escape(after)}")
        found = {int(match[1]) for name in self._checkpoint.files if (match := numbered.fullmatch(name))}
        missing = set(range(len(found))) - found
        if missing or not found:
            raise CheckpointError(
                f"{self._checkpoint.path}: missing: {before}.{min(missing, default=0)}.{after}"
            )
        return len(found)

    def _axis(self, parameter: str, axis: int) -> int:
        name = self._slice(parameter).name
        if name not in self._checkpoint.files:
            raise CheckpointError(
                f"{self._checkpoint.path}: missing: {name}, which determines the model's shape"
            )
        shape = self._checkpoint.entry(name).shape
        if len(shape) <= axis or not shape[axis]:
            raise CheckpointError(
                f"{self._checkpoint.path}: {name} has shape {shape}, which no klein model has"
            )
        return shape[axis]

    def _slice(self, parameter: str) -> TensorSlice:
        return self._key_map[parameter][0]

"""Bytes of the activations of each stage, from a few fitted coefficients. Torch-free.

Activations grow with tokens or pixels times the widths of the network. `COEFFICIENTS` holds how many values of each
width are alive per token or pixel at the peak; everything else here is an exact size: prompts, a dequantized matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from klein_core.memory.precision import Precision
from klein_core.memory.weight_bytes import text_encoder_matrices, transformer_matrices
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

FP32, BF16, EMULATED = "fp32", "bf16", "bf16 emulated"
"""Arithmetic: emulated is bfloat16 on a processor that has no bfloat16 products, so that fp32 copies are multiplied."""
_FP32_BYTES = 4

# Fitted to counts of the live tensors of each block. `python -m benchmarks.plan_accuracy --calibrate` fits the rows to
# measured peaks and prints them, and the emulated rows with --emulate.
COEFFICIENTS: Mapping[tuple[str, str], tuple[float, float]] = MappingProxyType(
    {
        # Values of the hidden size: per token of prompt and images, per token of the images that are made.
        ("denoiser", FP32): (18.2, 10.2),
        ("denoiser", BF16): (22.7, 6.1),
        ("denoiser", EMULATED): (37.0, 1.4),
        # Per token of the prompt: values of the hidden size, besides the kept layers; of the intermediate size.
        ("text-encoder", FP32): (2.0, 3.0),
        ("text-encoder", BF16): (2.0, 3.0),
        ("text-encoder", EMULATED): (4.0, 4.0),
        # Per pixel: values of the width of the outermost level, and of the level inside it.
        ("decode", FP32): (4.0, 1.0),
        ("decode", BF16): (4.0, 1.0),
        ("decode", EMULATED): (4.5, 3.5),
        ("encode", FP32): (5.0, 0.0),
        ("encode", BF16): (5.0, 0.0),
        ("encode", EMULATED): (8.0, 0.0),
    }
)


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Tokens of one denoising step of equal images."""

    spans: int
    """Images of the step; a guided image counts twice."""
    text: int
    """Tokens of one prompt."""
    target: int
    """Tokens of one image."""
    references: int = 0
    """Tokens of all references of one image."""


@dataclass(frozen=True)
class Activations:
    """Peak of a stage's activations: `exact_bytes`, and `value_bytes` for each fitted value."""

    stage: str
    """First half of a key of `COEFFICIENTS`."""
    arithmetic: str
    features: tuple[int, int]
    """What the two coefficients are multiplied with."""
    value_bytes: int
    exact_bytes: int = 0

    @property
    def byte_count(self) -> int:
        first, second = COEFFICIENTS[self.stage, self.arithmetic]
        fitted = first * self.features[0] + second * self.features[1]
        return int(fitted * self.value_bytes) + self.exact_bytes


def step_activations(
    config: TransformerConfig, precision: Precision, shape: StepShape, *, emulated: bool = False
) -> Activations:
    """Returns the activations of one denoising step.

    Args:
        config: the transformer.
        precision: of its weights.
        shape: tokens of the step.
        emulated: whether bfloat16 products are made of fp32 copies.
    """
    arithmetic = _arithmetic(precision.value_bytes, emulated)
    targets, texts = shape.spans * shape.target, shape.spans * shape.text
    images = targets + shape.spans * shape.references
    size, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    largest = max(rows * columns for rows, columns in transformer_matrices(config))
    exact = texts * config.joint_attention_dim * precision.value_bytes
    exact += largest * _FP32_BYTES if arithmetic == EMULATED else 0
    if precision.is_quantized:
        # Either a matrix is dequantized for its product, or the inputs of the product are quantized.
        singles = images + texts if config.num_single_layers > 1 else targets
        inputs = precision.input_bytes(max(images * inner, singles * (size + inner)))
        exact += max(largest * precision.value_bytes, inputs)
    features = ((images + texts) * size, targets * size)
    return Activations("denoiser", arithmetic, features, precision.value_bytes, exact)


def reference_cache_bytes(config: TransformerConfig, tokens: int, value_bytes: int) -> int:
    """Returns the bytes of keys and values of `tokens` reference tokens in every block."""
    return 2 * config.hidden_size * (config.num_layers + config.num_single_layers) * tokens * value_bytes


def prompt_activations(
    config: TextEncoderConfig, precision: Precision, *, emulated: bool = False
) -> Activations:
    """Returns the activations of encoding one prompt; every layer's output is kept to the end.

    Args:
        config: the text encoder.
        precision: of its weights.
        emulated: whether bfloat16 products are made of fp32 copies.
    """
    arithmetic = _arithmetic(precision.value_bytes, emulated)
    length, size = config.sequence_length, config.hidden_size
    largest = max(rows * columns for rows, columns in text_encoder_matrices(config))
    exact = length * (max(config.tapped_layers) + 1) * size * precision.value_bytes
    exact += largest * precision.value_bytes if precision.is_quantized else 0
    exact += largest * _FP32_BYTES if arithmetic == EMULATED else 0
    features = (length * size, length * int(config.qwen3["intermediate_size"]))
    return Activations("text-encoder", arithmetic, features, precision.value_bytes, exact)


def vae_activations(
    config: VaeConfig, stage: str, width_px: int, height_px: int, value_bytes: int, *, emulated: bool = False
) -> Activations:
    """Returns the activations of one image in one piece, its pixels included.

    Args:
        config: the autoencoder.
        stage: `decode` or `encode`.
        width_px: of the image.
        height_px: of the image.
        value_bytes: of one activation.
        emulated: whether bfloat16 convolutions are made of fp32 copies.
    """
    widths, channels = config.block_out_channels, config.in_channels
    if stage == "decode":
        widths, channels = config.decoder_block_out_channels or widths, config.out_channels
    outermost, inside = (*widths, widths[-1])[:2]
    pixels = width_px * height_px
    features = (pixels * outermost, pixels * inside)
    image_bytes = channels * pixels * value_bytes
    return Activations(stage, _arithmetic(value_bytes, emulated), features, value_bytes, image_bytes)


def decode_bytes(
    config: VaeConfig, width_px: int, height_px: int, value_bytes: int, *, emulated: bool = False
) -> int:
    """Returns the peak bytes of decoding one image besides the weights; see `vae_activations`."""
    return vae_activations(config, "decode", width_px, height_px, value_bytes, emulated=emulated).byte_count


def encode_bytes(
    config: VaeConfig, width_px: int, height_px: int, value_bytes: int, *, emulated: bool = False
) -> int:
    """Returns the peak bytes of encoding one image besides the weights; see `vae_activations`."""
    return vae_activations(config, "encode", width_px, height_px, value_bytes, emulated=emulated).byte_count


def tile_size_px(config: VaeConfig, width_px: int, height_px: int) -> tuple[int, int]:
    """Returns (width, height) of the largest tile of an image."""
    return min(width_px, config.sample_size), min(height_px, config.sample_size)


def _arithmetic(value_bytes: int, emulated: bool) -> str:
    if value_bytes == _FP32_BYTES:
        return FP32
    return EMULATED if emulated else BF16

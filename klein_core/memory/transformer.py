"""What the flow transformer takes: its weights, and the tensors that are alive at the fullest point of a step.

Torch-free. Follows `klein_core.denoiser.blocks` line by line for images of one size, which are a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klein_core.memory.precision import Precision
from klein_core.variants import TransformerConfig

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Tokens of one packed step of equal images."""

    spans: int
    """Images, or twice as many where they are guided."""
    text: int
    """Tokens of one prompt."""
    target: int
    """Tokens of one image."""
    references: int = 0
    """Tokens of all references of one image."""

    @property
    def targets(self) -> int:
        return self.spans * self.target

    @property
    def images(self) -> int:
        return self.spans * (self.target + self.references)

    @property
    def texts(self) -> int:
        return self.spans * self.text

    @property
    def joint(self) -> int:
        return self.texts + self.images


def outer_bytes(config: TransformerConfig, value_bytes: int) -> int:
    """Returns what the weights outside of the blocks take, which are never quantized."""
    size = config.hidden_size
    time = config.timestep_guidance_channels * size + size * size
    modulations = (6 + 6 + 3 + 2) * size * size
    embedders = (2 * config.in_channels + config.joint_attention_dim) * size
    return (time + modulations + embedders) * value_bytes


def block_bytes(config: TransformerConfig, precision: Precision) -> list[int]:
    """Returns what each block takes, in their order."""
    head_norms = config.attention_head_dim * precision.value_bytes
    double = sum(precision.matrix_bytes(*matrix) for matrix in _double_matrices(config)) + 4 * head_norms
    single = sum(precision.matrix_bytes(*matrix) for matrix in _single_matrices(config)) + 2 * head_norms
    return [double] * config.num_layers + [single] * config.num_single_layers


def weight_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns what all weights take."""
    return outer_bytes(config, precision.value_bytes) + sum(block_bytes(config, precision))


def offloaded_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns what stays on the device where blocks are streamed to it: all but blocks, and two of those."""
    blocks = block_bytes(config, precision)
    pairs = [sum(pair) for pair in zip(blocks, [*blocks[1:], blocks[0]], strict=True)]
    return outer_bytes(config, precision.value_bytes) + max(pairs)


def parked_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns what blocks take in the machine's memory where they are streamed from it.

    Each block is one pinned piece, and torch hands those out in powers of two (`CachingHostAllocator.h`).
    """
    return sum(1 << (block - 1).bit_length() for block in block_bytes(config, precision))


def reference_cache_bytes(config: TransformerConfig, tokens: int, value_bytes: int) -> int:
    """Returns keys and values of reference tokens in every block."""
    return 2 * config.hidden_size * (config.num_layers + config.num_single_layers) * tokens * value_bytes


def step_bytes(
    config: TransformerConfig, precision: Precision, shape: StepShape, *, emulated: bool = False
) -> int:
    """Returns the most that a step takes beside the weights.

    Args:
        config: the network.
        precision: of its weights.
        shape: of the step.
        emulated: a processor that multiplies bfloat16 as fp32 copies, both factors and the product.
    """
    step = _Step(config, precision.value_bytes, shape, emulated and precision.value_bytes == 2)
    return step.inputs() + _quantized_bytes(config, precision, shape) + max(step.moments())


def _quantized_bytes(config: TransformerConfig, precision: Precision, shape: StepShape) -> int:
    """Returns the most that a product takes for its matrix to be quantized: unfolded, or its inputs quantized too."""
    if not precision.is_quantized:
        return 0
    matrices = (*_double_matrices(config), *_single_matrices(config))
    unfolded = max(rows * columns for rows, columns in matrices) * precision.value_bytes
    size, inner = config.hidden_size, _inner(config)
    singles = shape.joint if config.num_single_layers > 1 else shape.targets
    return max(unfolded, precision.input_bytes(max(shape.images * inner, singles * (size + inner))))


def _double_matrices(config: TransformerConfig) -> list[tuple[int, int]]:
    size, inner = config.hidden_size, _inner(config)
    one_stream = [(3 * size, size), (size, size), (2 * inner, size), (size, inner)]
    return 2 * one_stream


def _single_matrices(config: TransformerConfig) -> list[tuple[int, int]]:
    size, inner = config.hidden_size, _inner(config)
    return [(3 * size + 2 * inner, size), (size, size + inner)]


def _inner(config: TransformerConfig) -> int:
    return int(config.hidden_size * config.mlp_ratio)


@dataclass(frozen=True)
class _Step:
    """Counts bytes; each method lists what is alive at one place of the code."""

    config: TransformerConfig
    value: int
    shape: StepShape
    emulated: bool

    def inputs(self) -> int:
        """Prompts, latents and rotations, from the step's beginning to its end."""
        prompts = self.shape.texts * self.config.joint_attention_dim * self.value
        latents = self.shape.images * self.config.in_channels * self.value
        rotations = (self.shape.joint // self.shape.spans) * self.config.attention_head_dim * _FP32
        return prompts + latents + rotations

    def moments(self) -> Iterator[int]:
        yield from self._double_attention()
        yield from self._double_feed_forward()
        yield from self._single()
        yield from self._final()

    def _hidden(self, tokens: int, width: float = 1) -> int:
        """`width` times the hidden size, for every token."""
        return int(width * self.config.hidden_size) * tokens * self.value

    def _exact(self, tokens: int, width: float = 1) -> int:
        """The same in fp32; nothing where that is the precision anyway and values are changed in place."""
        return 0 if self.value == _FP32 else int(width * self.config.hidden_size) * tokens * _FP32

    def _product(self, tokens: int, columns: float, rows: float) -> int:
        """What a product takes beside its input and its output where it is emulated."""
        if not self.emulated:
            return 0
        size = self.config.hidden_size
        copies = int((columns + rows) * size) * tokens * _FP32
        return copies + max(int(rows * size) * int(columns * size) * _FP32, self._hidden(tokens, rows))

    @property
    def _ratio(self) -> float:
        return self.config.mlp_ratio

    def _streams(self) -> int:
        """Text and image tokens, which the caller keeps to the end."""
        return self._hidden(self.shape.joint)

    def _double_attention(self) -> Iterator[int]:
        joint, text, image = self.shape.joint, self.shape.texts, self.shape.images
        buffer = self._hidden(max(text, image), 2 * self._ratio) if self.config.num_layers > 1 else 0
        entered, projected = self._hidden(joint), self._hidden(joint, 3)
        kept = self._streams() + buffer + entered
        yield kept + projected + self._product(image, 1, 3)
        # Normalized queries and keys of both streams, and both side by side.
        yield kept + projected + self._exact(joint, 2) + int(2 * self.config.hidden_size) * joint * _FP32
        rotated = int(2 * self.config.hidden_size) * joint * _FP32 + (
            self._hidden(joint, 2) if self.value < _FP32 else 0
        )
        value, attended = self._hidden(joint), self._hidden(joint)
        yield kept + projected + rotated + value + attended + self._hidden(joint) + self._product(image, 1, 1)

    def _double_feed_forward(self) -> Iterator[int]:
        image = self.shape.images
        buffer = self._hidden(max(self.shape.texts, image), 2 * self._ratio)
        kept = self._streams() + buffer + self._hidden(image)
        yield kept + self._product(image, 1, 2 * self._ratio)
        yield kept + self._hidden(image) + self._product(image, self._ratio, 1)

    def _single_kept(self) -> int:
        """Streams, joint tokens, both buffers and the normalized tokens."""
        joint = self.shape.joint
        buffers = self._hidden(joint, 3 + 2 * self._ratio) + self._hidden(joint, 1 + self._ratio)
        return self._streams() + self._hidden(joint) + buffers + self._hidden(joint)

    def _single(self) -> Iterator[int]:
        if self.config.num_single_layers < 2:
            return
        joint = self.shape.joint
        yield self._single_kept() + self._product(joint, 1, 3 + 2 * self._ratio)
        query_key = self._exact(joint, 2) + (self._hidden(joint, 2) if self.value < _FP32 else 0)
        attended, update = self._hidden(joint), self._hidden(joint)
        kept = self._single_kept() + query_key + attended
        yield kept + update + self._product(joint, 1 + self._ratio, 1)

    def _final(self) -> Iterator[int]:
        joint, target = self.shape.joint, self.shape.targets
        entered, key_value = self._hidden(target), self._hidden(joint, 2)
        query, feed_forward = self._hidden(target), self._hidden(target, 2 * self._ratio)
        kept = self._single_kept() + entered + key_value
        yield kept + query + feed_forward + self._product(target, 1, 2 * self._ratio)
        yield (
            kept
            + query
            + feed_forward
            + self._exact(joint)
            + (self._hidden(joint) if self.value < _FP32 else 0)
        )
        key = self._hidden(joint) if self.value < _FP32 else 0
        attended, update = self._hidden(target), self._hidden(target)
        yield (
            kept + query + feed_forward + key + attended + update + self._product(target, 1 + self._ratio, 1)
        )

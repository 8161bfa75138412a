"""The flow transformer: any mix of images in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.checkpoint_config import TRANSFORMER_FOLDER, read_transformer_config
from klein_core.denoiser.blocks import DoubleStreamBlock, SingleStreamBlock
from klein_core.denoiser.checkpoint import checkpoint_names
from klein_core.denoiser.conditioning import (
    Modulation,
    ModulationLayer,
    TimestepEmbedding,
    modulated_norm,
    modulations,
)
from klein_core.denoiser.linear import Linear
from klein_core.denoiser.packing import Packing
from klein_core.denoiser.positions import span_rotations
from klein_core.denoiser.span import Span
from klein_core.variants import TransformerConfig
from klein_core.weights import load_weights


class Conditioning(NamedTuple):
    """Everything that the noise levels of a step decide, broadcastable to tokens."""

    text: tuple[Modulation, ...]
    image: tuple[Modulation, ...]
    joint: Modulation
    head: Tensor
    """(spans, 2 · hidden): scale, then shift."""


class OutputNorm(nn.Module):
    """Holds the head's modulation; its halves are scale, then shift (diffusers' order)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, 2 * hidden_size)


class FlowTransformer(nn.Module):
    """Predicts velocities (noise − data) for the targets of any mix of spans."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config
        self.time_guidance_embed = TimestepEmbedding(config.timestep_guidance_channels, hidden_size)
        self.double_stream_modulation_img = ModulationLayer(hidden_size, sublayers=2)
        self.double_stream_modulation_txt = ModulationLayer(hidden_size, sublayers=2)
        self.single_stream_modulation = ModulationLayer(hidden_size, sublayers=1)
        self.x_embedder = Linear(config.in_channels, hidden_size)
        self.context_embedder = Linear(config.joint_attention_dim, hidden_size)
        self.transformer_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = OutputNorm(hidden_size)
        self.proj_out = Linear(hidden_size, config.in_channels)

    @classmethod
    def from_folder(
        cls,
        checkpoint_folder: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> FlowTransformer:
        """Loads `checkpoint_folder/transformer`; `dtype` None keeps the checkpoint's own.

        Raises:
            CheckpointError: the configuration or the weights are not what this network needs.
        """
        config = read_transformer_config(checkpoint_folder)
        with torch.device("meta"):
            transformer = cls(config)
        folder = Path(checkpoint_folder) / TRANSFORMER_FOLDER
        load_weights(transformer, folder, device=device, dtype=dtype, rename=checkpoint_names(config))
        return transformer.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, activations and velocities."""
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are; spans are moved there."""
        return self.x_embedder.weight.device

    def compile_blocks(self) -> None:
        """Compiles the two block functions in place; all blocks of a kind share one compiled function.

        The first steps of a new kind of mix are slow. Lengths and batch sizes do not compile anew.
        """
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.compile(dynamic=True)

    def forward(self, spans: Sequence[Span]) -> list[Tensor]:
        """Returns one velocity (rows, columns, channels) a span, in the spans' order.

        A span's result does not depend on which others share the step.

        Raises:
            InvalidInput: a span's tensors do not fit this model.
        """
        for span in spans:
            span.check(self.config)
        # Equal lengths side by side share one attention call.
        order = sorted(range(len(spans)), key=lambda i: (spans[i].text_length, spans[i].image_length))
        velocities = self._velocities([spans[i] for i in order]) if spans else []
        by_position = dict(zip(order, velocities, strict=True))
        return [by_position[i] for i in range(len(spans))]

    def _velocities(self, spans: list[Span]) -> list[Tensor]:
        packing = Packing(tuple(s.text_length for s in spans), tuple(s.image_length for s in spans))
        conditioning = self._conditioning(spans, packing)
        rotations = self._rotations(spans, packing)
        text = self.context_embedder(self._on_device(packing.pack([s.prompt_embedding for s in spans])))
        image = self.x_embedder(self._on_device(packing.pack([_image_tokens(s) for s in spans])))
        for block in self.transformer_blocks:
            text, image = block(text, image, conditioning.text, conditioning.image, rotations, packing)
        joint = packing.join(text, image)
        for block in self.single_transformer_blocks:
            joint = block(joint, conditioning.joint, rotations, packing)
        return self._head(joint, conditioning.head, spans, packing)

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, self.dtype)

    def _conditioning(self, spans: list[Span], packing: Packing) -> Conditioning:
        sigmas = torch.tensor([span.sigma for span in spans], dtype=torch.float32, device=self.device)
        embedding = self.time_guidance_embed(sigmas, self.dtype)
        text = packing.spread(self.double_stream_modulation_txt(embedding), packing.text_lengths)
        image = packing.spread(self.double_stream_modulation_img(embedding), packing.image_lengths)
        joint = packing.spread(self.single_stream_modulation(embedding), packing.joint_lengths)
        head = self.norm_out.linear(F.silu(embedding))
        return Conditioning(modulations(text, 2), modulations(image, 2), modulations(joint, 1)[0], head)

    def _rotations(self, spans: list[Span], packing: Packing) -> Tensor:
        axes, theta = self.config.axes_dims_rope, self.config.rope_theta
        keys = [(span.text_length, span.grids) for span in spans]
        if len(set(keys)) == 1:
            return span_rotations(*keys[0], axes, theta, self.device)[None]
        return packing.pack([span_rotations(*key, axes, theta, self.device) for key in keys])

    def _head(self, joint: Tensor, head: Tensor, spans: list[Span], packing: Packing) -> list[Tensor]:
        targets = Packing((0,) * len(spans), tuple(span.target_length for span in spans))
        tokens = targets.pack(
            [
                part[span.text_length : span.text_length + span.target_length]
                for part, span in zip(packing.unpack(joint, packing.joint_lengths), spans, strict=True)
            ]
        )
        scale, shift = targets.spread(head, targets.image_lengths).chunk(2, dim=-1)
        velocities = self.proj_out(modulated_norm(tokens, 1 + scale, shift, self.config.eps))
        return [
            velocity.unflatten(0, span.latents.shape[:2])
            for velocity, span in zip(targets.unpack(velocities, targets.image_lengths), spans, strict=True)
        ]


def _image_tokens(span: Span) -> Tensor:
    """Returns (image tokens, channels): the target, then the references."""
    if not span.references:
        return span.latents.flatten(0, 1)
    images = [image.to(span.latents).flatten(0, 1) for image in (span.latents, *span.references)]
    return torch.cat(images)

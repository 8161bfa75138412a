"""The flow transformer: any mix of images in one step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from klein_core.checkpoint.component import open_component
from klein_core.checkpoint.config import read_transformer_config
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.weights import load_weights
from klein_core.denoiser.adapters.apply import Adapters, Stream, adapted
from klein_core.denoiser.blocks import (
    DoubleStreamBlock,
    FinalSingleStreamBlock,
    SingleStreamBlock,
    Step,
    Targets,
)
from klein_core.denoiser.modulation import (
    Modulation,
    ModulationLayer,
    TimestepEmbedding,
    modulated_norm,
    modulations,
    spread,
)
from klein_core.denoiser.packing import Packing, Span, check_references, keep_from_compiler
from klein_core.denoiser.reference_cache import REFERENCE_SIGMA, ReferenceCache, layers_of
from klein_core.denoiser.rope import reference_rotations, span_rotations
from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_core.quantization.loading import QuantizedLoader
from klein_core.variants import TransformerConfig

_BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+\.")
Level = tuple[float, Adapters]
"""A noise level, and what the span that has it adds to the network."""


class Conditioning(NamedTuple):
    """Everything that the noise levels of a step decide."""

    text: tuple[Modulation, ...]
    image: tuple[Modulation, ...]
    joint: Modulation
    targets: Modulation
    """The same for the targets alone."""
    head: tuple[Tensor, Tensor]
    """1 + scale and shift of the targets, (spans, 1, hidden)."""


class FlowTransformer(nn.Module):
    """Predicts velocities (noise − data) for the targets of any mix of spans."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.config = config
        self.time_guidance_embed = TimestepEmbedding(config.timestep_guidance_channels, hidden_size)
        self.double_stream_modulation_img = ModulationLayer(hidden_size, chunks=6)
        self.double_stream_modulation_txt = ModulationLayer(hidden_size, chunks=6)
        self.single_stream_modulation = ModulationLayer(hidden_size, chunks=3)
        self.x_embedder = Linear(config.in_channels, hidden_size)
        self.context_embedder = Linear(config.joint_attention_dim, hidden_size)
        self.transformer_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.num_layers))
        singles = [SingleStreamBlock(config) for _ in range(config.num_single_layers - 1)]
        self.single_transformer_blocks = nn.ModuleList([*singles, FinalSingleStreamBlock(config)])
        self.norm_out = ModulationLayer(hidden_size, chunks=2)
        self.proj_out = Linear(hidden_size, config.in_channels)
        self.linears = {name: part for name, part in self.named_modules() if isinstance(part, Linear)}
        """Every matrix of the network by name: what adapters add to."""

    @classmethod
    def from_folder(
        cls,
        files: ModelFiles | Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantization: str = NO_QUANTIZATION,
    ) -> FlowTransformer:
        """Loads a model's transformer.

        Args:
            files: a model's folder in diffusers' layout, or where each part lies.
            device: where the weights go.
            dtype: of activations and of weights that are not quantized; `None` is the checkpoint's own.
            quantization: what the blocks' plain weights are made into, one of `constants.QUANTIZATIONS`.

        Raises:
            CheckpointError: the configuration or the weights are not what this network needs.
        """
        files = ModelFiles.of(files)
        config = read_transformer_config(files)
        with torch.device("meta"):
            transformer = cls(config)
        component = open_component(files, config)
        quantized = QuantizedLoader.of(component, quantization, is_block_product)
        load_weights(transformer, component, device=device, dtype=dtype, quantized=quantized)
        return transformer.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, activations and velocities."""
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are; spans are moved there."""
        return self.x_embedder.weight.device

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the block functions in place; all blocks of a kind share one program.

        The first step of each kind of mix (one span, equal spans, others) is slow, and once more the first of other
        than two spans where two came first; lengths and further numbers of spans do not compile anew. Adapters are
        a kind of their own, whichever layers they change. `backend` is torch.compile's.
        """
        keep_from_compiler()
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.compile(dynamic=True, backend=backend)

    def forward(self, spans: Sequence[Span]) -> list[Tensor]:
        """Returns one velocity (rows, columns, channels) a span, in the spans' order.

        A span's result does not depend on which others share the step, nor on their adapters.

        Raises:
            InvalidInput: a span's tensors do not fit this model.
        """
        for span in spans:
            span.check(self.config)
        # Equal lengths side by side share one attention call.
        keys = [(span.text_length, span.cached_length, *span.grids) for span in spans]
        order = sorted(range(len(spans)), key=keys.__getitem__)
        velocities = self._velocities([spans[i] for i in order]) if spans else []
        by_position = dict(zip(order, velocities, strict=True))
        return [by_position[i] for i in range(len(spans))]

    @torch.no_grad()
    def reference_cache(self, references: Sequence[Tensor], adapters: Adapters = ()) -> ReferenceCache:
        """Returns what spans with these references need of them.

        References see each other and nothing else, at timestep 0: what models of the reference-cache kind were
        trained for. Source: `Flux2KleinKVPipeline` in diffusers.

        Args:
            references: (rows, columns, channels) each, in the order that prompts count.
            adapters: those of the spans that will use it.

        Raises:
            InvalidInput: there are none, or one does not fit this model.
        """
        check_references(references, self.config)
        grids = tuple((reference.shape[0], reference.shape[1]) for reference in references)
        tokens = torch.cat([self._on_device(reference).flatten(0, 1) for reference in references])
        packing = Packing.of_references(len(tokens))
        axes, theta = self.config.axes_dims_rope, self.config.rope_theta
        step = Step(packing, reference_rotations(grids, axes, theta, self.device)[None], Workspace())
        cache = ReferenceCache.empty(self.config, len(tokens), self.dtype, self.device)
        conditioning = self._conditioning([(REFERENCE_SIGMA, adapters)], packing)
        steps = [step._replace(record=layer) for layer in cache.keys_values]
        with adapted(self.linears, _lengths(packing), [adapters]):
            image = self.x_embedder(tokens[None])
            self._target_tokens(image[:, :0], image, conditioning, steps)
        return cache

    def _velocities(self, spans: list[Span]) -> list[Tensor]:
        packing = Packing.of(spans)
        conditioning = self._conditioning([(span.sigma, span.adapters) for span in spans], packing)
        step = Step(packing, self._rotations(spans, packing), Workspace())
        with adapted(self.linears, _lengths(packing), [span.adapters for span in spans]):
            velocities = self._packed_velocities(spans, conditioning, step)
        by_span = packing.unpack(velocities, packing.target_lengths)
        return [v.view(*s.latents.shape[:2], -1) for v, s in zip(by_span, spans, strict=True)]

    def _packed_velocities(self, spans: list[Span], conditioning: Conditioning, step: Step) -> Tensor:
        """Returns (batch, target tokens, channels) as the packing lays them."""
        packing = step.packing
        layers = layers_of([span.reference_cache for span in spans], self.config)
        text = self.context_embedder(self._on_device(packing.pack([s.prompt_embedding for s in spans])))
        image = self.x_embedder(self._on_device(packing.pack([_image_tokens(s) for s in spans])))
        tokens = self._target_tokens(
            text, image, conditioning, [step._replace(cached=layer) for layer in layers]
        )
        scale, shift = (spread(part, conditioning.targets.owners) for part in conditioning.head)
        return self.proj_out(modulated_norm(tokens, scale, shift, self.config.eps, step.scratch))

    def _target_tokens(
        self, text: Tensor, image: Tensor, conditioning: Conditioning, steps: Sequence[Step]
    ) -> Tensor:
        """Takes embedded tokens through all blocks; `steps` has one entry a layer. Returns the targets' tokens."""
        layers = iter(steps)
        for block in self.transformer_blocks:
            text, image = block(text, image, conditioning.text, conditioning.image, next(layers))
        joint = steps[0].packing.join(text, image)
        *blocks, final_block = self.single_transformer_blocks
        for block in blocks:
            joint = block(joint, conditioning.joint, next(layers))
        last = next(layers)
        targets: Tensor = final_block(
            joint, _targets(joint, conditioning.targets, last), conditioning.joint, last
        )
        return targets

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, self.dtype)

    def _conditioning(self, levels: list[Level], packing: Packing) -> Conditioning:
        text, image, joint, head = (part[:, None] for part in self._per_span_modulation(levels))
        of_text, of_image, of_joint, of_targets = packing.owners(self.device)
        (single,) = modulations(joint, 1, of_joint)
        scale, shift = head.chunk(2, dim=-1)
        return Conditioning(
            modulations(text, 2, of_text),
            modulations(image, 2, of_image),
            single,
            single._replace(owners=of_targets),
            (1 + scale, shift),
        )

    def _per_span_modulation(self, levels: list[Level]) -> tuple[Tensor, ...]:
        """Returns (spans, channels) for text, image, joint tokens and the head."""
        if self.device.type != "cpu" or torch.is_grad_enabled() or len(levels) == 1:
            return self._level_modulation(levels)
        # A matrix-vector product sums in another order than a matrix product; a span's result must not tell.
        rows = {level: self._level_modulation([level]) for level in set(levels)}
        return tuple(torch.cat(parts) for parts in zip(*(rows[level] for level in levels), strict=True))

    def _level_modulation(self, levels: list[Level]) -> tuple[Tensor, ...]:
        sigmas = torch.tensor([sigma for sigma, _ in levels], dtype=torch.float32, device=self.device)
        one_row_each = {Stream.SPANS: [[1] * len(levels)]}
        with adapted(self.linears, one_row_each, [adapters for _, adapters in levels]):
            embedding = self.time_guidance_embed(sigmas, self.dtype)
            return (
                self.double_stream_modulation_txt(embedding),
                self.double_stream_modulation_img(embedding),
                self.single_stream_modulation(embedding),
                self.norm_out(embedding),
            )

    def _rotations(self, spans: list[Span], packing: Packing) -> Tensor:
        axes, theta = self.config.axes_dims_rope, self.config.rope_theta
        keys = [(span.text_length, span.grids) for span in spans]
        if packing.is_batch and len(set(keys)) == 1:
            return span_rotations(*keys[0], axes, theta, self.device)[None]
        return packing.pack([span_rotations(*key, axes, theta, self.device) for key in keys])


def is_block_product(parameter: str) -> bool:
    """Whether a parameter is a matrix of a block: what published files quantize.

    Embedders, modulations and the head stay as they are: they are few and each error of theirs reaches every token.
    """
    return _BLOCK.match(parameter) is not None and ".norm_" not in parameter


def _lengths(packing: Packing) -> dict[Stream, list[tuple[int, ...]]]:
    """Returns the rows of each span that layers over tokens see."""
    return {
        Stream.TEXT: [packing.text_lengths],
        Stream.IMAGE: [packing.image_lengths],
        Stream.JOINT: [packing.joint_lengths, packing.target_lengths],
        Stream.TARGETS: [packing.target_lengths],
    }


def _targets(joint: Tensor, modulation: Modulation, step: Step) -> Targets:
    """Picks the targets' tokens and their rotations."""
    packing = step.packing
    return Targets(packing.targets(joint), packing.targets(step.rotations), modulation)


def _image_tokens(span: Span) -> Tensor:
    """Returns (image tokens, channels): the target, then the references."""
    if not span.references:
        return span.latents.flatten(0, 1)
    images = [image.to(span.latents).flatten(0, 1) for image in (span.latents, *span.references)]
    return torch.cat(images)

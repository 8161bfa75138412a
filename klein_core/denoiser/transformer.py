"""Flow transformer: computes one step for any mix of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from klein_core.checkpoint.component import open_component
from klein_core.checkpoint.config import read_transformer_config
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.weights import load_weights
from klein_core.denoiser.adapters.apply import Adapters, TokenStream, apply_adapters
from klein_core.denoiser.blocks import (
    BlockContext,
    DoubleStreamBlock,
    FinalSingleStreamBlock,
    SingleStreamBlock,
    Targets,
)
from klein_core.denoiser.modulation import (
    ModulationLayer,
    StepModulation,
    TimestepEmbedding,
    modulated_norm,
    modulations,
    per_token,
)
from klein_core.denoiser.packing import Packing, Span, check_references, exclude_from_compile
from klein_core.denoiser.reference_cache import REFERENCE_SIGMA, ReferenceCache, cached_layers
from klein_core.denoiser.rope import reference_rope_table, span_rope_table
from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_core.quantization.loading import QuantizedLoader
from klein_core.variants import TransformerConfig

_BLOCK = re.compile(r"(single_)?transformer_blocks\.\d+\.")

NoiseLevel = tuple[float, Adapters]
"""A span's sigma and its adapters, which together determine its modulation."""


class FlowTransformer(nn.Module):
    """Predicts velocities (noise − data) for the target tokens of any mix of spans."""

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
        """Every linear layer of the network by name; adapters apply to these."""
        self.is_compiled = False
        self.is_offloaded = False
        """Whether the blocks' weights are in host memory; see `offload_blocks`."""

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
            files: a model's folder in diffusers' layout, or the path of each part.
            device: device of the weights.
            dtype: of activations and of weights that are not quantized; `None` is the checkpoint's.
            quantization: format to quantize the blocks' plain weights to, one of `constants.QUANTIZATIONS`.

        Raises:
            CheckpointError: the configuration or the weights do not fit this network.
        """
        files = ModelFiles.of(files)
        config = read_transformer_config(files)
        with torch.device("meta"):
            transformer = cls(config)
        component = open_component(files, config)
        quantized = QuantizedLoader.of(component, quantization, is_block_linear)
        load_weights(transformer, component, device=device, dtype=dtype, quantized=quantized)
        return transformer.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, activations and velocities."""
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights; spans are moved to it."""
        return self.x_embedder.weight.device

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles the blocks in place; all blocks of one kind share a program.

        A program is compiled at the first step of each kind: one span, equal spans, unequal spans, and each of them
        with adapters. The number of spans becomes dynamic at the second number that occurs, which compiles once
        more. Later token counts, numbers of spans and sets of adapters do not compile again.

        Args:
            backend: torch.compile's.

        Raises:
            RuntimeError: the blocks are offloaded; their weights change their place in each step, and a program is
                compiled for one place.
        """
        if self.is_offloaded:
            raise RuntimeError("offloaded blocks cannot be compiled")
        exclude_from_compile()
        # Else each constant of a norm becomes an input on the CPU, which rules out CUDA graphs.
        torch._dynamo.config.specialize_float = True
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.compile(dynamic=True, backend=backend)
        self.is_compiled = True

    def forward(self, spans: Sequence[Span]) -> list[Tensor]:
        """Returns one velocity (rows, columns, channels) for each span, in the spans' order.

        A span's result does not depend on the other spans of the step or on their adapters.

        Raises:
            InvalidInput: a span's tensors do not fit this model.
        """
        for span in spans:
            span.check(self.config)
        # Neighbors with equal lengths share one attention call.
        keys = [(span.text_length, span.cached_length, *span.grids) for span in spans]
        order = sorted(range(len(spans)), key=keys.__getitem__)
        velocities = self._velocities([spans[i] for i in order]) if spans else []
        by_index = dict(zip(order, velocities, strict=True))
        return [by_index[i] for i in range(len(spans))]

    @torch.no_grad()
    def reference_cache(self, references: Sequence[Tensor], adapters: Adapters = ()) -> ReferenceCache:
        """Computes the keys and values of references, for the `reference_cache` of spans.

        References attend only to each other, at timestep 0, as models of the reference-cache kind were trained.
        Source: diffusers' `Flux2KleinKVPipeline`.

        Args:
            references: (rows, columns, channels) each, in the order in which prompts count them.
            adapters: of the spans that will use the cache.

        Raises:
            InvalidInput: there are none, or one does not fit this model.
        """
        check_references(references, self.config)
        grids = tuple((reference.shape[0], reference.shape[1]) for reference in references)
        tokens = torch.cat([self._on_device(reference).flatten(0, 1) for reference in references])
        packing = Packing.of_references(len(tokens))
        axes, theta = self.config.axes_dims_rope, self.config.rope_theta
        rope_table = reference_rope_table(grids, axes, theta, self.device)[None]
        context = BlockContext(packing, rope_table, Workspace())
        cache = ReferenceCache.empty(self.config, len(tokens), self.dtype, self.device)
        modulation = self._step_modulation([(REFERENCE_SIGMA, adapters)], packing)
        contexts = [context._replace(record=layer) for layer in cache.keys_values]
        with apply_adapters(self.linears, _row_counts(packing), [adapters]):
            image = self.x_embedder(tokens[None])
            self._target_tokens(image[:, :0], image, modulation, contexts)
        return cache

    def _velocities(self, spans: list[Span]) -> list[Tensor]:
        packing = Packing.of(spans)
        modulation = self._step_modulation([(span.sigma, span.adapters) for span in spans], packing)
        context = BlockContext(packing, self._rope_table(spans, packing), Workspace())
        with apply_adapters(self.linears, _row_counts(packing), [span.adapters for span in spans]):
            velocities = self._packed_velocities(spans, modulation, context)
        by_span = packing.unpack(velocities, packing.target_lengths)
        return [v.view(*s.latents.shape[:2], -1) for v, s in zip(by_span, spans, strict=True)]

    def _packed_velocities(
        self, spans: list[Span], modulation: StepModulation, context: BlockContext
    ) -> Tensor:
        """Returns packed velocities, (batch, target tokens, channels)."""
        packing = context.packing
        layers = cached_layers([span.reference_cache for span in spans], self.config)
        text = self.context_embedder(self._on_device(packing.pack([s.prompt_embedding for s in spans])))
        image = self.x_embedder(self._on_device(packing.pack([_image_tokens(s) for s in spans])))
        contexts = [context._replace(cached=layer) for layer in layers]
        tokens = self._target_tokens(text, image, modulation, contexts)
        scale, shift = (per_token(part, modulation.targets.span_index) for part in modulation.head)
        return self.proj_out(modulated_norm(tokens, scale, shift, self.config.eps, context.workspace))

    def _target_tokens(
        self, text: Tensor, image: Tensor, modulation: StepModulation, contexts: Sequence[BlockContext]
    ) -> Tensor:
        """Runs all blocks on embedded tokens, with one context for each; returns the target tokens."""
        remaining = iter(contexts)
        for block in self.transformer_blocks:
            text, image = block(text, image, modulation.text, modulation.image, next(remaining))
        packing = contexts[0].packing
        joint = packing.join(text, image)
        *blocks, final_block = self.single_transformer_blocks
        for block in blocks:
            joint = block(joint, modulation.joint, next(remaining))
        last = next(remaining)
        targets = Targets(packing.targets(joint), packing.targets(last.rope_table), modulation.targets)
        target_tokens: Tensor = final_block(joint, targets, modulation.joint, last)
        return target_tokens

    def _on_device(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device, self.dtype)

    def _step_modulation(self, levels: list[NoiseLevel], packing: Packing) -> StepModulation:
        text, image, joint, head = (part[:, None] for part in self._modulation_by_span(levels))
        text_index, image_index, joint_index, target_index = packing.span_index(self.device)
        (single,) = modulations(joint, 1, joint_index)
        scale, shift = head.chunk(2, dim=-1)
        return StepModulation(
            text=modulations(text, 2, text_index),
            image=modulations(image, 2, image_index),
            joint=single,
            targets=single._replace(span_index=target_index),
            head=(1 + scale, shift),
        )

    def _modulation_by_span(self, levels: list[NoiseLevel]) -> tuple[Tensor, ...]:
        """Returns (spans, channels) for text, image, joint tokens and the head."""
        if self.device.type != "cpu" or torch.is_grad_enabled() or len(levels) == 1:
            return self._modulation_of(levels)
        # gemv and gemm round differently; run levels one by one so results do not depend on the batch.
        rows = {level: self._modulation_of([level]) for level in set(levels)}
        return tuple(torch.cat(parts) for parts in zip(*(rows[level] for level in levels), strict=True))

    def _modulation_of(self, levels: list[NoiseLevel]) -> tuple[Tensor, ...]:
        sigmas = torch.tensor([sigma for sigma, _ in levels], dtype=torch.float32, device=self.device)
        one_row_each = {TokenStream.SPANS: [[1] * len(levels)]}
        with apply_adapters(self.linears, one_row_each, [adapters for _, adapters in levels]):
            embedding = self.time_guidance_embed(sigmas, self.dtype)
            return (
                self.double_stream_modulation_txt(embedding),
                self.double_stream_modulation_img(embedding),
                self.single_stream_modulation(embedding),
                self.norm_out(embedding),
            )

    def _rope_table(self, spans: list[Span], packing: Packing) -> Tensor:
        axes, theta = self.config.axes_dims_rope, self.config.rope_theta
        keys = [(span.text_length, span.grids) for span in spans]
        if packing.is_batch and len(set(keys)) == 1:
            return span_rope_table(*keys[0], axes, theta, self.device)[None]
        return packing.pack([span_rope_table(*key, axes, theta, self.device) for key in keys])


def is_block_linear(parameter: str) -> bool:
    """Returns whether a parameter is the weight of a block's linear layer; published checkpoints quantize these only.

    Embedders, modulation layers and the head stay unquantized: they are small, and their errors affect every token.
    """
    return _BLOCK.match(parameter) is not None and ".norm_" not in parameter


def _row_counts(packing: Packing) -> dict[TokenStream, list[tuple[int, ...]]]:
    """Returns each span's rows in the inputs of the layers of each stream."""
    return {
        TokenStream.TEXT: [packing.text_lengths],
        TokenStream.IMAGE: [packing.image_lengths],
        TokenStream.JOINT: [packing.joint_lengths, packing.target_lengths],
        TokenStream.TARGETS: [packing.target_lengths],
    }


def _image_tokens(span: Span) -> Tensor:
    """Returns (image tokens, channels): the target, then the references."""
    if not span.references:
        return span.latents.flatten(0, 1)
    images = [image.to(span.latents).flatten(0, 1) for image in (span.latents, *span.references)]
    return torch.cat(images)

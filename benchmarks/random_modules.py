"""This project's modules with random weights, and the calls of them that benchmarks time. Needs no diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shape
from klein_core.denoiser.packing import Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.text_encoder.encoder import build_cut_qwen3, tapped_embedding
from klein_core.vae_decoder.autoencoder import Autoencoder

Run = Callable[[], Tensor]
SIGMA = 0.9
REAL_TOKENS = 40


@dataclass(frozen=True)
class Place:
    """Device and precision of weights."""

    device: str
    dtype: torch.dtype


def random_module(build: Callable[[], nn.Module], place: Place) -> nn.Module:
    """Builds a module on its device with random weights that keep activations near unit variance."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device=place.device).eval().requires_grad_(False)
    for name, value in module.state_dict().items():
        if value.ndim >= 2:
            value.normal_(std=value[0].numel() ** -0.5)
        else:
            value.fill_(1 if name.endswith(("weight", "running_var")) else 0)
    for parameter in (*module.parameters(), *module.buffers()):
        parameter.data = parameter.data.to(place.dtype) if parameter.is_floating_point() else parameter.data
    return module


def flow_transformer(shape: Shape, place: Place) -> FlowTransformer:
    """Builds our transformer."""
    module = random_module(lambda: FlowTransformer(shape.transformer), place)
    assert isinstance(module, FlowTransformer)
    return module


def autoencoder(shape: Shape, place: Place) -> Autoencoder:
    """Builds our autoencoder."""
    module = random_module(lambda: Autoencoder(shape.vae), place)
    assert isinstance(module, Autoencoder)
    return module


@dataclass(frozen=True)
class StepInputs:
    """One image with references of its own size, at one noise level."""

    prompt: Tensor
    images: list[Tensor]

    @classmethod
    def draw(cls, shape: Shape, place: Place, size: int, reference_count: int) -> StepInputs:
        draw = {"device": place.device, "dtype": place.dtype}
        config, side = shape.transformer, size // 16
        images = [torch.randn(side, side, config.in_channels, **draw) for _ in range(1 + reference_count)]
        return cls(torch.randn(512, config.joint_attention_dim, **draw), images)


def step_run(module: FlowTransformer, inputs: StepInputs) -> Run:
    """One packed step of one image by this project: velocities (tokens, channels)."""
    span = Span(inputs.prompt, inputs.images[0], tuple(inputs.images[1:]), SIGMA)
    return lambda: module([span])[0].flatten(0, 1)


def cut_text_encoder(shape: Shape, place: Place) -> nn.Module:
    """Builds our text encoder."""
    # It builds itself on `meta` but for its rotary, which has no values to move from there.
    built = build_cut_qwen3(shape.text_encoder)
    module = random_module(lambda: built, place)
    return with_rotary(module, module, place)


def encode_run(module: nn.Module, shape: Shape, place: Place) -> Run:
    """One prompt, padded as always, by this project: embedding (1, tokens, channels)."""
    token_ids, mask = prompt_tokens(shape, place)
    taps = shape.text_encoder.tapped_layers
    return lambda: tapped_embedding(module, token_ids, mask, taps)  # type: ignore[arg-type]


def prompt_tokens(shape: Shape, place: Place) -> tuple[Tensor, Tensor]:
    """Returns the tokens and the mask of a short prompt, padded as always."""
    config = shape.text_encoder
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(config.qwen3["vocab_size"], (1, config.sequence_length), generator=generator)
    mask = (torch.arange(config.sequence_length) < REAL_TOKENS).long()[None]
    return token_ids.to(place.device), mask.to(place.device)


def with_rotary(module: nn.Module, model: nn.Module, place: Place) -> nn.Module:
    """Recomputes Qwen3's rotary frequencies, which are not part of its state."""
    model.rotary_emb = type(model.rotary_emb)(model.config).to(place.device)  # type: ignore[operator,arg-type]
    return module

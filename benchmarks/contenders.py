"""Contenders of the benchmarks: the same work in this project ("ours") and in diffusers, on the same random weights.

Each `*_run` function takes a built module and returns the call that is timed.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.random_modules import (
    SIGMA,
    Place,
    Run,
    StepInputs,
    prompt_tokens,
    random_module,
    with_rotary,
)
from benchmarks.shapes import Shape
from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.text_encoder.encoder import build_cut_qwen3
from klein_core.vae_decoder.autoencoder import Autoencoder


def oracle_transformer(shape: Shape, place: Place) -> nn.Module:
    """Builds diffusers' transformer."""
    arguments = asdict(shape.transformer)
    return random_module(lambda: Flux2Transformer2DModel(**arguments, guidance_embeds=False), place)


def share_transformer(oracle: nn.Module, shape: Shape) -> FlowTransformer:
    """Builds our transformer on the oracle's weights; only fused ones are copied."""
    with torch.device("meta"):
        ours = FlowTransformer(shape.transformer)
    weights, fused = oracle.state_dict(), checkpoint_names(shape.transformer)
    state = {
        name: torch.cat([weights[part] for part in fused[name]]) if name in fused else weights[name]
        for name in ours.state_dict()
    }
    ours.load_state_dict(state, assign=True)
    return ours.requires_grad_(False)


def oracle_step_run(module: nn.Module, inputs: StepInputs) -> Run:
    """One step of one image by diffusers; inputs that its pipeline prepares once are prepared before."""
    target = inputs.images[0]
    image_ids = torch.cat([_grid_ids(image, 10 * index) for index, image in enumerate(inputs.images)])
    text_ids = torch.zeros(len(inputs.prompt), 4, device=target.device)
    text_ids[:, 3] = torch.arange(len(inputs.prompt))
    arguments = {
        "hidden_states": torch.cat([image.flatten(0, 1) for image in inputs.images])[None],
        "encoder_hidden_states": inputs.prompt[None],
        "timestep": torch.tensor([SIGMA], device=target.device, dtype=target.dtype),
        "txt_ids": text_ids,
        "img_ids": image_ids,
        "return_dict": False,
    }
    return lambda: module(**arguments)[0][0, : target.shape[0] * target.shape[1]]


def oracle_text_encoder(shape: Shape, place: Place) -> Qwen3ForCausalLM:
    """Builds the language model that diffusers' pipeline runs whole."""
    module = random_module(lambda: Qwen3ForCausalLM(Qwen3Config(**shape.text_encoder.qwen3)), place)
    assert isinstance(module, Qwen3ForCausalLM)
    with_rotary(module, module.model, place)
    return module


def share_text_encoder(oracle: Qwen3ForCausalLM, shape: Shape, place: Place) -> nn.Module:
    """Builds our text encoder on the oracle's weights."""
    ours, weights = build_cut_qwen3(shape.text_encoder, place.device), oracle.state_dict()
    ours.load_state_dict({name: weights[f"model.{name}"] for name in ours.state_dict()}, assign=True)
    return ours.requires_grad_(False)


def oracle_encode_run(module: nn.Module, shape: Shape, place: Place) -> Run:
    """One prompt as diffusers' pipeline encodes it: all layers and the language model's head."""
    token_ids, mask = prompt_tokens(shape, place)

    def run() -> Tensor:
        output = module(input_ids=token_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat([output.hidden_states[tap] for tap in shape.text_encoder.tapped_layers], dim=-1)

    return run


def decode_runs(shape: Shape, place: Place, size: int) -> dict[str, Run]:
    """One image from its packed, normalized latents, by both."""
    oracle = random_module(lambda: AutoencoderKLFlux2(**asdict(shape.vae)), place)
    with torch.device("meta"):
        ours = Autoencoder(shape.vae)
    ours.load_state_dict(oracle.state_dict(), assign=True)
    ours.requires_grad_(False).eval()
    extents = (1, shape.vae.packed_channels, size // 16, size // 16)
    latents = torch.randn(extents, device=place.device, dtype=place.dtype)
    return {"ours": lambda: ours.decode(latents), "diffusers": lambda: _oracle_decode(oracle, latents, shape)}


def _oracle_decode(oracle: nn.Module, latents: Tensor, shape: Shape) -> Tensor:
    """Denormalizes and unpatches latents as diffusers' pipeline does, then decodes."""
    mean = oracle.bn.running_mean.view(1, -1, 1, 1)
    variance = oracle.bn.running_var.view(1, -1, 1, 1)
    packed = latents * torch.sqrt(variance + shape.vae.batch_norm_eps) + mean
    batch, channels, rows, columns = packed.shape
    patches = packed.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
    image: Tensor = oracle.decode(
        patches.reshape(batch, channels // 4, 2 * rows, 2 * columns), return_dict=False
    )[0]
    return image


def _grid_ids(image: Tensor, time: int) -> Tensor:
    rows, columns = image.shape[:2]
    axes = (torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(1))
    return torch.cartesian_prod(*axes).to(image.device)

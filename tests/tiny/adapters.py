"""Writes adapter files of every format from random factors, and the dense matrices that they stand for.

Written from the formats' descriptions alone; nothing of the reader is used. Layers are those of diffusers' tiny
network, so that what a file means can be merged into that network and compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_GLOBAL = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
HEAD = "final_layer.adaLN_modulation.1"
Deltas = dict[str, Tensor]
"""diffusers' parameter name → what is added to it at scale 1."""


@dataclass
class Written:
    """A file's content and what it means."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    deltas: Deltas = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path, self.metadata)
        return path


@dataclass(frozen=True)
class Target:
    """A layer as a format names it."""

    name: str
    shape: tuple[int, int]
    deltas: Callable[[Tensor], Deltas]
    """From the layer's whole matrix to the parameters' shares of it."""


def matrices(oracle: Flux2Transformer2DModel) -> dict[str, tuple[int, int]]:
    return {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in oracle.named_parameters()
        if parameter.ndim == 2
    }


def diffusers_targets(oracle: Flux2Transformer2DModel) -> list[Target]:
    return [
        Target(name, shape, lambda delta, name=name: {f"{name}.weight": delta})
        for name, shape in matrices(oracle).items()
    ]


def authors_targets(oracle: Flux2Transformer2DModel, *, with_head: bool = True) -> list[Target]:
    """Every layer under the name that the authors' checkpoint gives it, fused projections whole."""
    shapes = matrices(oracle)
    found = []
    for name, parts in _authors_names(oracle):
        rows = sum(shapes[part][0] for part in parts)
        found.append(
            Target(name, (rows, shapes[parts[0]][1]), lambda delta, parts=parts: _shares(delta, parts))
        )
    if with_head:
        found.append(Target(HEAD, shapes["norm_out.linear"], _unswapped))
    return found


def _authors_names(oracle: Flux2Transformer2DModel) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, part in _GLOBAL.items():
        yield name, (part,)
    for block in range(oracle.config.num_layers):
        for name, parts in _DOUBLE.items():
            yield f"double_blocks.{block}.{name}", tuple(f"transformer_blocks.{block}.{p}" for p in parts)
    for block in range(oracle.config.num_single_layers):
        ours = f"single_transformer_blocks.{block}.attn"
        yield f"single_blocks.{block}.linear1", (f"{ours}.to_qkv_mlp_proj",)
        yield f"single_blocks.{block}.linear2", (f"{ours}.to_out",)


def _shares(delta: Tensor, parts: tuple[str, ...]) -> Deltas:
    return {f"{part}.weight": share for part, share in zip(parts, delta.chunk(len(parts)), strict=True)}


def _unswapped(delta: Tensor) -> Deltas:
    """The authors' head has shift before scale, diffusers' scale before shift."""
    shift, scale = delta.chunk(2)
    return {"norm_out.linear.weight": torch.cat([scale, shift])}


@dataclass(frozen=True)
class Format:
    """How a trainer writes."""

    targets: Callable[[Flux2Transformer2DModel], list[Target]]
    prefix: str
    kind: str = "lora"
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: float | None = None
    """Written as a tensor of each layer."""
    underscored: bool = False
    metadata: dict[str, Any] | None = None
    """PEFT's configuration."""
    plain_metadata: dict[str, str] = field(default_factory=dict)
    """Header entries that change nothing."""
    rank: int = 3
    dtype: torch.dtype = torch.float32
    left_shape: tuple[int, int] = (4, 2)
    """Of a Kronecker product's first factor; diffusers takes no other than those of LyCORIS' own rule."""

    def write(self, oracle: Flux2Transformer2DModel, seed: int = 0) -> Written:
        generator = torch.Generator().manual_seed(seed)
        written = Written(metadata=dict(self.plain_metadata))
        if self.metadata is not None:
            written.metadata["lora_adapter_metadata"] = json.dumps(self.metadata)
        for target in self.targets(oracle):
            parts, delta = FACTORS[self.kind](self, target.shape, generator)
            name = target.name.replace(".", "_") if self.underscored else target.name
            for part, tensor in parts.items():
                written.tensors[f"{self.prefix}{name}.{part}"] = tensor
            written.deltas |= target.deltas(delta)
        return written

    @property
    def factor(self) -> float:
        told = (self.metadata or {}).get("transformer.lora_alpha")
        alpha = self.alpha if self.alpha is not None else told
        return 1.0 if alpha is None else float(alpha) / self.rank


def _random(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=generator) * 0.3).to(dtype)


def _alpha(form: Format) -> dict[str, Tensor]:
    return {} if form.alpha is None else {"alpha": torch.tensor(form.alpha)}


def lora(
    form: Format, shape: tuple[int, int], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    down = _random((form.rank, shape[1]), generator, form.dtype)
    up = _random((shape[0], form.rank), generator, form.dtype)
    return {form.down: down, form.up: up, **_alpha(form)}, form.factor * (up.float() @ down.float())


def loha(
    form: Format, shape: tuple[int, int], generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    sizes = {"a": (shape[0], form.rank), "b": (form.rank, shape[1])}
    parts = {
        f"hada_{name}_{half}": _random(size, generator, form.dtype) * 2
        for name in ("w1", "w2")
        for half, size in sizes.items()
    }
    first, second = (parts[f"hada_{name}_a"] @ parts[f"hada_{name}_b"] for name in ("w1", "w2"))
    return {**parts, **_alpha(form)}, form.factor * first * second


def _lokr(*decomposed: str) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """Makes a writer of Kronecker products in which these factors are products themselves."""

    def write(
        form: Format, shape: tuple[int, int], generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = form.left_shape
        sizes = {"w1": form.left_shape, "w2": (shape[0] // rows, shape[1] // columns)}
        parts: dict[str, Tensor] = {}
        factors = []
        for name, (rows, columns) in sizes.items():
            if name in decomposed:
                up = parts[f"lokr_{name}_a"] = _random((rows, form.rank), generator, form.dtype)
                down = parts[f"lokr_{name}_b"] = _random((form.rank, columns), generator, form.dtype)
                factors.append(up @ down)
            else:
                parts[f"lokr_{name}"] = _random((rows, columns), generator, form.dtype)
                factors.append(parts[f"lokr_{name}"])
        factor = form.factor if decomposed else 1.0
        return {**parts, **_alpha(form)}, factor * torch.kron(*factors)

    return write


FACTORS: dict[str, Callable[..., tuple[dict[str, Tensor], Tensor]]] = {
    "lora": lora,
    "loha": loha,
    "lokr": _lokr(),
    "lokr-w2": _lokr("w2"),
    "lokr-both": _lokr("w1", "w2"),
}
_KOHYA: dict[str, Any] = {"down": "lora_down.weight", "up": "lora_up.weight"}
_MODULES = (
    "to_q to_k to_v add_q_proj add_k_proj add_v_proj to_out.0 to_add_out linear_in linear_out to_qkv_mlp_proj "
    "to_out x_embedder context_embedder linear linear_1 linear_2 proj_out"
)
_PEFT = {"transformer.r": 3, "transformer.lora_alpha": 5, "transformer.target_modules": _MODULES.split()}

FORMATS = {
    "diffusers": Format(diffusers_targets, "transformer."),
    "diffusers-metadata": Format(diffusers_targets, "transformer.", metadata=_PEFT),
    "plain-metadata": Format(diffusers_targets, "transformer.", plain_metadata={"lora_alpha": "2"}),
    "bare": Format(diffusers_targets, ""),
    "peft": Format(diffusers_targets, "base_model.model."),
    "peft-named": Format(
        diffusers_targets, "base_model.model.", down="lora_A.default.weight", up="lora_B.default.weight"
    ),
    "peft-authors": Format(authors_targets, "base_model.model."),
    "ai-toolkit": Format(authors_targets, "diffusion_model."),
    "ai-toolkit-f16": Format(authors_targets, "diffusion_model.", dtype=torch.float16),
    "ai-toolkit-alpha": Format(authors_targets, "diffusion_model.", alpha=1.5),
    "ai-toolkit-diffusers": Format(diffusers_targets, "diffusion_model."),
    "down-up": Format(authors_targets, "diffusion_model.", alpha=6, **_KOHYA),
    "comfy": Format(authors_targets, "model.diffusion_model."),
    "kohya": Format(authors_targets, "lora_unet_", alpha=1.5, underscored=True, **_KOHYA),
    "kohya-no-alpha": Format(authors_targets, "lora_unet_", underscored=True, **_KOHYA),
    "one-trainer": Format(diffusers_targets, "lora_transformer_", alpha=2, underscored=True, **_KOHYA),
    "lokr": Format(authors_targets, "diffusion_model.", kind="lokr", alpha=7),
    "lokr-square": Format(authors_targets, "diffusion_model.", kind="lokr-w2", alpha=2, left_shape=(4, 4)),
    "lokr-w2": Format(authors_targets, "diffusion_model.", kind="lokr-w2", alpha=2),
    "lokr-both": Format(diffusers_targets, "lycoris_", kind="lokr-both", alpha=2, underscored=True),
    "loha": Format(authors_targets, "lora_unet_", kind="loha", alpha=2, underscored=True),
    "loha-wide": Format(diffusers_targets, "transformer.", kind="loha", rank=5),
}


def merged(oracle: Flux2Transformer2DModel, *scaled: tuple[Deltas, float]) -> Flux2Transformer2DModel:
    """Copies diffusers' network with deltas added to its weights."""
    copied = Flux2Transformer2DModel(**oracle.config).eval().requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    for deltas, scale in scaled:
        for name, delta in deltas.items():
            state[name] += scale * delta
    copied.load_state_dict(state)
    return copied

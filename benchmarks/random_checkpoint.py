"""Random checkpoint of any size as a diffusers folder, written tensor by tensor without holding the model in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.shapes import Shape
from klein_core.pico import WEIGHTS

_WRITTEN_AT_ONCE = 1 << 24
"""Values that are drawn, and held, at a time."""
_COUNTER, _COUNTER_BYTES = "num_batches_tracked", 8


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> None:
    """Writes all parts in bf16, drawn on `device`; tokenizer, scheduler and index are the embedded model's."""
    generator = torch.Generator(device).manual_seed(seed)
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(WEIGHTS / part, folder / part)
    shutil.copy(WEIGHTS / "model_index.json", folder)
    write_transformer(folder / "transformer", shape, generator)
    text = {**shape.text_encoder.qwen3, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    with torch.device("meta"):
        encoder = Qwen3ForCausalLM(Qwen3Config(**shape.text_encoder.qwen3))
        autoencoder = _autoencoder(shape)
    write_part(folder / "text_encoder", "model", encoder, text, generator)
    write_part(
        folder / "vae", "diffusion_pytorch_model", autoencoder, _diffusers_config(autoencoder), generator
    )


def write_transformer(folder: Path, shape: Shape, generator: torch.Generator) -> None:
    """Writes the flow transformer alone."""
    with torch.device("meta"):
        module = _transformer(shape)
    write_part(folder, "diffusion_pytorch_model", module, _diffusers_config(module), generator)


def write_part(
    folder: Path, stem: str, module: nn.Module, config: Mapping[str, Any], generator: torch.Generator
) -> None:
    """Writes `config.json` and one safetensors file with the names and shapes of a module on `meta`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    # A head that is tied to the embedding is not written twice.
    left_out = "lm_head.weight" if config.get("tie_word_embeddings") else None
    tensors = {name: tensor.shape for name, tensor in module.state_dict().items() if name != left_out}
    with (folder / f"{stem}.safetensors").open("wb") as file:
        file.write(_header(tensors))
        for name, shape in tensors.items():
            for piece in _values(name, shape, generator):
                file.write(piece.view(torch.uint8).numpy().data)


def _header(tensors: Mapping[str, torch.Size]) -> bytes:
    """Returns the length and the JSON text that a safetensors file begins with."""
    entries, start = {}, 0
    for name, shape in tensors.items():
        stop = start + (_COUNTER_BYTES if name.endswith(_COUNTER) else 2 * shape.numel())
        entries[name] = {
            "dtype": "I64" if name.endswith(_COUNTER) else "BF16",
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields a tensor's values; matrices keep activations near unit variance, norms and variances are 1."""
    if name.endswith(_COUNTER):
        yield torch.zeros(1, dtype=torch.int64)
        return
    if len(shape) < 2:
        value = 1.0 if name.endswith(("weight", "running_var")) else 0.0
        yield torch.full((shape.numel(),), value, dtype=torch.bfloat16)
        return
    spread = math.prod(shape[1:]) ** -0.5
    for start in range(0, shape.numel(), _WRITTEN_AT_ONCE):
        count = min(_WRITTEN_AT_ONCE, shape.numel() - start)
        values = torch.randn(count, generator=generator, device=generator.device) * spread
        yield values.to("cpu", torch.bfloat16)


def _diffusers_config(module: Any) -> dict[str, Any]:
    return {**module.config, "_class_name": type(module).__name__}


def checkpoint_bytes(shape: Shape) -> int:
    """Returns about how many bytes `write_checkpoint` writes."""
    with torch.device("meta"):
        modules: list[nn.Module] = [
            _transformer(shape),
            Qwen3ForCausalLM(Qwen3Config(**shape.text_encoder.qwen3)),
            _autoencoder(shape),
        ]
    return sum(2 * parameter.numel() for module in modules for parameter in module.parameters())


def _transformer(shape: Shape) -> nn.Module:
    build: Callable[..., nn.Module] = Flux2Transformer2DModel  # type: ignore[assignment]
    return build(**asdict(shape.transformer), guidance_embeds=False)


def _autoencoder(shape: Shape) -> nn.Module:
    build: Callable[..., nn.Module] = AutoencoderKLFlux2  # type: ignore[assignment]
    return build(block_out_channels=shape.vae.block_out_channels)

"""Full-size checkpoint files without their gigabytes: real headers over a hole in the file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig
from tests.tiny.layouts import bfl_transformer, bfl_vae

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
Config = TransformerConfig | VaeConfig | TextEncoderConfig


def hollow_file(folder: Path, component: str, config: Config, style: str) -> Path:
    """Writes one component's file, all of whose values are zero and cost nothing."""
    tensors = meta_tensors(config)
    if style == "bfl":
        tensors = bfl_transformer(tensors) if component == "transformer" else bfl_vae(tensors)
    return write_hollow(folder / f"{component}.safetensors", tensors)


def write_hollow(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Writes the shapes of tensors that may be on `meta`, as zeros; bfloat16 unless `dtypes` lists them."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, "BF16")
        size = ITEM_BYTES[dtype] * prod(tensor.shape)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, path.stat().st_size + end)
    return path


def meta_tensors(config: Config) -> dict[str, Tensor]:
    """Returns a full-size component's tensors as diffusers names them, without values."""
    with torch.device("meta"):
        match config:
            case TransformerConfig():
                model = Flux2Transformer2DModel(
                    num_layers=config.num_layers,
                    num_single_layers=config.num_single_layers,
                    num_attention_heads=config.num_attention_heads,
                    joint_attention_dim=config.joint_attention_dim,
                    guidance_embeds=False,
                )
            case VaeConfig():
                model = AutoencoderKLFlux2(decoder_block_out_channels=config.decoder_block_out_channels)
            case TextEncoderConfig():
                model = Qwen3ForCausalLM(Qwen3Config(**config.qwen3))
    return dict(model.state_dict())

"""Whole tiny random klein checkpoints, made by diffusers and saved in its folder layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinKVPipeline, Flux2KleinPipeline

from tests.tiny.text_encoder import tiny_qwen3, tiny_tokenizer
from tests.tiny.transformer import tiny_oracle
from tests.tiny.vae import tiny_vae

_SHARD_SIZE = "200KB"


def tiny_pipeline(
    *,
    distilled: bool = True,
    reference_cache: bool = False,
    seed: int = 0,
    transformer: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> Flux2KleinPipeline | Flux2KleinKVPipeline:
    """Builds diffusers' pipeline; the dictionaries change the tiny shapes and must fit each other."""
    autoencoder = tiny_vae(seed, **(vae or {}))
    language_model = tiny_qwen3(seed, **(text_encoder or {}))
    taps = language_model.config.text_encoder_out_layers
    fitting = {
        "in_channels": 4 * autoencoder.config.latent_channels,
        "joint_attention_dim": len(taps) * language_model.config.hidden_size,
    }
    build = Flux2KleinKVPipeline if reference_cache else Flux2KleinPipeline
    return build(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=language_model,
        tokenizer=tiny_tokenizer(),
        transformer=tiny_oracle(seed, **{**fitting, **(transformer or {})}),
        is_distilled=distilled,
    )


def save_tiny_checkpoint(
    folder: Path,
    *,
    distilled: bool = True,
    reference_cache: bool = False,
    seed: int = 0,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    part_dtypes: Mapping[str, torch.dtype] | None = None,
    **shapes: Any,
) -> Flux2KleinPipeline | Flux2KleinKVPipeline:
    """Writes a whole checkpoint and returns the pipeline that made it.

    `part_dtypes` gives `text_encoder`, `transformer` or `vae` another dtype than `dtype`.
    `shapes` are `tiny_pipeline`'s dictionaries. When calling the pipeline, pass the text encoder's
    `text_encoder_out_layers` and `max_sequence_length`: diffusers' defaults are klein's.
    """
    pipeline = tiny_pipeline(distilled=distilled, reference_cache=reference_cache, seed=seed, **shapes).to(
        dtype
    )
    for part, own in (part_dtypes or {}).items():
        getattr(pipeline, part).to(own)
    pipeline.save_pretrained(folder, max_shard_size=_SHARD_SIZE if sharded else "10GB")
    return pipeline

"""Registry of the published klein models: shapes, defaults, licenses and repositories. Torch-free and frozen.

`klein pull` finds a model by name here, and a bare weights file, which has no configuration, can be declared to be one
of them. Code branches on the fields of a model, never on its name, and a checkpoint's own configuration always wins.

Models of other families are recognized by what each of their files has: names of classes, of header entries or of the
repository. No file of FLUX.3 was at hand.

Sources: the published `config.json` files and model cards; file listings of the repositories.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from klein_core.errors import CheckpointError
from klein_core.quantization.constants import FLOAT8, NVFP4_TILED
from klein_core.variants import (
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    default_guidance_scale,
    default_step_count,
)

_OWNER = "black-forest-labs"
FLUX_3 = "FLUX.3"
SERVED = "this suite serves FLUX.2 [klein] (4B and 9B, distilled, base and 9b-kv)"

_KLEIN_2 = re.compile(r"flux[\s._-]*2[\s._-]*klein", re.IGNORECASE)
_KLEIN = re.compile(r"klein", re.IGNORECASE)
# "flux-3d" is a subject of fine-tunes, not a version.
_FLUX_3 = re.compile(r"flux[\s._-]*3(?!\d|d(?![a-z]))", re.IGNORECASE)
_OTHERS = (
    (
        # The transformer and the VAE of [dev] have the classes of [klein].
        re.compile(
            r"flux[\s._-]*2[\s._-]*(dev|pro|flex|max)(?![a-z])|(?-i:^Flux2(Inpaint)?Pipeline$)", re.IGNORECASE
        ),
        "FLUX.2 [dev] or a larger FLUX.2, whose text encoder is Mistral Small",
    ),
    (re.compile(r"^Mistral3\w*$"), "a text encoder of FLUX.2 [dev], which is Mistral Small"),
    (
        re.compile(
            r"flux[\s._-]*1(?!\d)|(?<![a-z])flux[\s._-]*(dev|schnell|kontext)(?![a-z])"
            r"|(?-i:^Flux[A-Za-z]*(Pipeline|Transformer2DModel)$)",
            re.IGNORECASE,
        ),
        "FLUX.1, an earlier family, whose text encoders are CLIP and T5",
    ),
)
_NAMING_ENTRIES = (
    *("modelspec.architecture", "modelspec.title", "modelspec.implementation"),
    *("architecture", "model_type", "title", "name", "model_name", "base_model", "_class_name"),
)


@dataclass(frozen=True)
class License:
    """License of a model's weights."""

    identifier: str
    """The model card's identifier: SPDX where one exists."""
    name: str
    non_commercial: bool
    text_file: str = "LICENSE.md"
    """Name of the license file in the weights' repository."""


APACHE_2 = License("apache-2.0", "Apache License 2.0", non_commercial=False)
FLUX_NON_COMMERCIAL = License(
    "flux-non-commercial-license", "FLUX Non-Commercial License", non_commercial=True
)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    repository: str
    name: str


@dataclass(frozen=True)
class PublishedModel:
    """One published model."""

    name: str
    repository: str
    """Repository with all components in diffusers' folder layout."""
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    is_distilled: bool
    license: License
    gated: bool
    """Whether downloading needs an account that accepted the license."""
    transformer_file: HubFile
    """The transformer alone, as one file with BFL's names."""
    quantized: Mapping[str, HubFile]
    """Precision → the same file with quantized weights, for those that are published."""
    uses_reference_cache: bool = False
    """Whether its references attend only to each other, at timestep 0."""
    vae: VaeConfig = field(default_factory=VaeConfig)

    @property
    def default_step_count(self) -> int:
        return default_step_count(self.is_distilled)

    @property
    def default_guidance_scale(self) -> float:
        return default_guidance_scale(self.is_distilled)


@dataclass(frozen=True)
class PublishedVae:
    """An autoencoder that is published alone, for any klein model."""

    name: str
    repository: str
    """Repository with config.json and the weights at its root."""
    vae: VaeConfig
    license: License


SMALL_DECODER = PublishedVae(
    name="small-decoder",
    repository=f"{_OWNER}/FLUX.2-small-decoder",
    vae=VaeConfig(decoder_block_out_channels=(96, 192, 384, 384)),
    license=APACHE_2,
)


def _qwen3(hidden_size: int, intermediate_size: int, *, tied: bool) -> TextEncoderConfig:
    """Returns the `config.json` of Qwen3-4B or Qwen3-8B: the values that differ, and the others."""
    values: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "tie_word_embeddings": tied,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    return TextEncoderConfig(values)


@dataclass(frozen=True)
class _Size:
    """Values that all models of a size share."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    license: License


_4B = _Size(
    TransformerConfig(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680),
    _qwen3(2560, 9728, tied=True),
    APACHE_2,
)
_9B = _Size(
    TransformerConfig(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288),
    _qwen3(4096, 12288, tied=False),
    FLUX_NON_COMMERCIAL,
)


def _row(
    size: _Size,
    name: str,
    repository: str,
    *,
    is_distilled: bool,
    precisions: Iterable[str] = (FLOAT8, NVFP4_TILED),
    uses_reference_cache: bool = False,
) -> PublishedModel:
    stem = name.removeprefix("klein-")
    quantized = {
        precision: HubFile(
            f"{_OWNER}/FLUX.2-klein-{stem}-{precision}", f"flux-2-klein-{stem}-{precision}.safetensors"
        )
        for precision in precisions
    }
    return PublishedModel(
        name=name,
        repository=f"{_OWNER}/{repository}",
        transformer=size.transformer,
        text_encoder=size.text_encoder,
        is_distilled=is_distilled,
        license=size.license,
        gated=size.license.non_commercial,
        transformer_file=HubFile(f"{_OWNER}/{repository}", f"flux-2-klein-{stem}.safetensors"),
        quantized=MappingProxyType(quantized),
        uses_reference_cache=uses_reference_cache,
    )


_ROWS = (
    _row(_4B, "klein-4b", "FLUX.2-klein-4B", is_distilled=True),
    _row(_4B, "klein-base-4b", "FLUX.2-klein-base-4B", is_distilled=False),
    _row(_9B, "klein-9b", "FLUX.2-klein-9B", is_distilled=True),
    _row(_9B, "klein-base-9b", "FLUX.2-klein-base-9B", is_distilled=False),
    _row(
        _9B,
        "klein-9b-kv",
        "FLUX.2-klein-9b-kv",
        is_distilled=True,
        precisions=(FLOAT8,),
        uses_reference_cache=True,
    ),
)

PUBLISHED_MODELS: Mapping[str, PublishedModel] = MappingProxyType({row.name: row for row in _ROWS})
"""Every published model by its name."""


def published_model(name: str) -> PublishedModel:
    """Returns the model of that name, ignoring case.

    Raises:
        CheckpointError: there is none; the message lists all names, or describes the family that the name is of.
    """
    row = PUBLISHED_MODELS.get(name.lower())
    if row is None:
        family = other_family(name)
        if family is not None:
            raise CheckpointError(f"{name!r} is {family}")
        near = difflib.get_close_matches(name.lower(), PUBLISHED_MODELS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise CheckpointError(f"{name!r} is no known variant; known are {', '.join(PUBLISHED_MODELS)}.{hint}")
    return row


def variants_of_shape(transformer: TransformerConfig) -> tuple[PublishedModel, ...]:
    """Returns the models whose transformer has this shape: those that a bare file of it could be."""
    return tuple(row for row in _ROWS if row.transformer == transformer)


def variant_of_bare_file(transformer: TransformerConfig, name: str | None = None) -> PublishedModel:
    """Returns the model that a weights file without configuration belongs to.

    Distilled, base and reference-cache models have equal tensors, so the shape alone never decides.

    Args:
        transformer: the shape of its tensors.
        name: the model that the user declares it to be.

    Raises:
        CheckpointError: no model has this shape, the named one has another, or several have it and none is named.
    """
    fitting = variants_of_shape(transformer)
    listed = ", ".join(row.name for row in fitting)
    shape = (
        f"{transformer.num_layers} double and {transformer.num_single_layers} single blocks, "
        f"hidden size {transformer.hidden_size}"
    )
    if name is not None:
        row = published_model(name)
        if row in fitting:
            return row
        fits = f"it could be {listed}" if fitting else "no known variant has it"
        raise CheckpointError(f"{row.name} has another shape than the file ({shape}): {fits}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(f"several variants have these tensors ({shape}): name one of {listed}")
    raise CheckpointError(f"no known variant has this shape: {shape}; give a folder with configuration files")


def other_family(name: str) -> str | None:
    """Returns what a name of another family is and what this suite serves; `None` for every other name.

    Args:
        name: of a class, a repository, a model or a header entry.
    """
    if _KLEIN_2.search(name):
        return None
    if _FLUX_3.search(name):
        return f"{FLUX_3}, a later family (another text encoder, 16 steps, another license); {SERVED}"
    if not _KLEIN.search(name):
        for pattern, family in _OTHERS:
            if pattern.search(name):
                return f"{family}; {SERVED}"
    return None


def family_of_header(metadata: Mapping[str, str]) -> str | None:
    """Returns `other_family` of the first header entry that names one, with the entry; `None` when none does."""
    for key in _NAMING_ENTRIES:
        family = other_family(metadata.get(key, ""))
        if family is not None:
            return f"its header entry {key} is {metadata[key][:80]!r}: {family}"
    return None


def family_among(names: Iterable[str]) -> str | None:
    """Returns `other_family` of the first name, in order, that has one."""
    return next(filter(None, map(other_family, sorted(names))), None)

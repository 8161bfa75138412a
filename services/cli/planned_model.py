"""What `klein plan` is asked about, from a name, a folder or a file: by configurations and headers, no weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.layouts import TEXT_ENCODER, TRANSFORMER
from klein_core.checkpoint.model_files import ModelFiles
from klein_core.checkpoint_config import read_transformer_config, read_variant
from klein_core.errors import CheckpointError
from klein_core.known_variants import variants_of_shape
from klein_core.memory.plan import PlannedModel
from services.cli.errors import CliError, with_period
from services.cli.exit_codes import MISUSED
from services.cli.hub.choice import Choice, choose, is_known
from services.cli.local_model import PICO, find_place

_PRECISIONS = {"F32": "fp32", "F16": "bf16", "BF16": "bf16", "F8_E4M3": "fp8", "U8": "nvfp4", "I8": "int8"}
"""Dtype of most of a file's bytes → precision; two bytes are two bytes."""


def planned_model(model: str) -> PlannedModel:
    """Finds a model's shapes: of one on disk, or of a published one whether it was pulled or not.

    Raises:
        CliError: there is no such model, or its files are not a klein model's.
    """
    if model != PICO and is_known(model) and not Path(model).exists():
        return _published(choose(model))
    try:
        place = find_place(model)
        return _in_folder(model, place) if place.is_dir() else _bare_transformer(model, place)
    except CheckpointError as error:
        raise CliError(with_period(str(error)), "`klein inspect` tells what a file is.", MISUSED) from error


def _published(choice: Choice) -> PlannedModel:
    row = choice.variant
    if row is None:
        raise TypeError(f"{choice.name} is no row of the table")
    stored = next((name for name, file in row.quantised.items() if file == choice.transformer), "bf16")
    return PlannedModel(
        name=choice.name,
        text_encoder=row.text_encoder,
        transformer=row.transformer,
        vae=row.vae if choice.vae is None else choice.vae.vae,
        is_distilled=row.is_distilled,
        uses_reference_cache=row.uses_reference_cache,
        transformer_stored=stored,
        published=tuple(row.quantised) if stored == "bf16" else (),
    )


def _in_folder(name: str, folder: Path) -> PlannedModel:
    files = ModelFiles.of(folder)
    variant = read_variant(files)
    network = _stored_precision(files.open(TRANSFORMER))
    return PlannedModel(
        name=name,
        text_encoder=variant.text_encoder,
        transformer=variant.transformer,
        vae=variant.vae,
        is_distilled=variant.is_distilled,
        uses_reference_cache=variant.uses_reference_cache,
        plain=network if network in ("fp32", "bf16") else "bf16",
        text_stored=_stored_precision(files.open(TEXT_ENCODER)),
        transformer_stored=network,
    )


def _bare_transformer(name: str, path: Path) -> PlannedModel:
    """Takes the other parts from the published model of that size, of which there is one kind each.

    Raises:
        CheckpointError: it is no transformer's file, or of no published size.
    """
    files = ModelFiles.of(path)
    config, network = read_transformer_config(files), _stored_precision(files.open(TRANSFORMER))
    rows = variants_of_shape(config)
    if not rows:
        raise CheckpointError(f"{path} has the shape of no published model, so its other parts are not known")
    return PlannedModel(
        name=name,
        text_encoder=rows[0].text_encoder,
        transformer=config,
        vae=rows[0].vae,
        plain=network if network in ("fp32", "bf16") else "bf16",
        transformer_stored=network,
    )


def _stored_precision(checkpoint: Checkpoint) -> str:
    """Returns the precision of most of a checkpoint's bytes.

    Raises:
        CheckpointError: a header cannot be read, or the dtype is no weights'.
    """
    counts: Counter[str] = Counter()
    for name in checkpoint.files:
        entry = checkpoint.entry(name)
        counts[entry.dtype] += entry.byte_count
    dtype = counts.most_common(1)[0][0] if counts else "none"
    if dtype not in _PRECISIONS:
        raise CheckpointError(f"{checkpoint.place} has weights of dtype {dtype}, which are not klein's")
    return _PRECISIONS[dtype]

"""Finds what a checkpoint says of its own quantisation: in headers, in markers beside tensors, in files. Torch-free."""

from __future__ import annotations

from collections.abc import Collection

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, refuse
from klein_core.quantization.notes import LayerNote, Notes, comfy_notes, general_form, parsed_marker

MARKER = ".comfy_quant"
_MAXIMUM_MARKER_BYTES = 4096
# Prefixes that a header's table of layers may have or lack, whatever the file's own names do.
_TABLE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")


def read_notes(checkpoint: Checkpoint, names: Collection[str], prefix: str) -> Notes:
    """Reads all notes on the tensors `names`, which begin with `prefix`; no weights.

    Raises:
        CheckpointError: a note is malformed, unsupported, or contradicts another.
    """
    metadata: dict[str, str] = {}
    layers: dict[str, LayerNote] = {}
    for path in sorted({checkpoint.files[name] for name in names}):
        header = checkpoint.header(path)
        metadata |= header.metadata
        for layer, note in comfy_notes(path, header.metadata).items():
            own = _own_name(layer, checkpoint.files, prefix)
            # A file may hold other components, and layers that this network does not need.
            if own + ".weight" in names or own + ".weight" not in checkpoint.files:
                layers[own] = note
    for layer, note in _read_markers(checkpoint, names).items():
        if layers.setdefault(layer, note) != note:
            raise CheckpointError(f"{checkpoint.place}: {layer}{MARKER} contradicts the header: {note}")
    return Notes(layers, general_form(checkpoint.place, metadata))


def _own_name(layer: str, files: Collection[str], prefix: str) -> str:
    """Returns a layer of the header's table as the checkpoint's tensors name it."""
    bare = {layer.removeprefix(other) for other in _TABLE_PREFIXES}
    candidates = [layer, prefix + layer, *(prefix + name for name in bare), *bare]
    return next((name for name in candidates if name + ".weight" in files), layer)


def _read_markers(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, LayerNote]:
    markers = [name for name in names if name.endswith(MARKER)]
    entries = {name: checkpoint.entry(name) for name in markers}
    wrong = [
        name
        for name, entry in entries.items()
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.byte_count > _MAXIMUM_MARKER_BYTES
    ]
    refuse(checkpoint.place, [(f"not at most {_MAXIMUM_MARKER_BYTES} bytes of text:", wrong)])
    layers = {name: name.removesuffix(MARKER) for name in markers}
    return {
        layer: parsed_marker(checkpoint.place, layer, checkpoint.content(name))
        for name, layer in layers.items()
    }

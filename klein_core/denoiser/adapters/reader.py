"""Reads adapter files: LoRA, LoKr and LoHa in the namings of diffusers, PEFT, ai-toolkit, kohya, musubi and LyCORIS.

A file is rejected, with the names of the tensors at fault, unless every tensor in it is recognized and fits the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klein_core.checkpoint.header import DTYPES, FileState, Header, open_regular, read_header
from klein_core.denoiser.adapters.adapter import (
    Adapter,
    AdapterSummary,
    DeltaSlice,
    Kronecker,
    LoraDelta,
    LowRank,
    hadamard,
)
from klein_core.denoiser.adapters.key_mapping import Layers
from klein_core.denoiser.adapters.parse import (
    ParsedHeader,
    Problems,
)
from klein_core.errors import CheckpointError
from klein_core.params import ADAPTER_NAME, ADAPTER_NAME_RULE


def describe_adapter(path: Path, layers: Layers) -> AdapterSummary:
    """Describes a file from its header alone.

    Raises:
        CheckpointError: it cannot be applied to a model with these layers; lists all reasons.
    """
    header = _read_header(path)
    return _summary(header, ParsedHeader.of(header, layers))


def read_adapter(path: Path, layers: Layers, *, device: torch.device | str, dtype: torch.dtype) -> Adapter:
    """Reads a file. The adapter's name is the file's, without the suffix.

    Args:
        path: a safetensors file.
        layers: the model's, from `layer_targets`.
        device, dtype: the model's.

    Raises:
        CheckpointError: it cannot be applied to a model with these layers (lists all reasons), or its name is not a
            valid adapter name.
    """
    if not ADAPTER_NAME.fullmatch(path.stem):
        raise CheckpointError(
            f"{path.stem!r} cannot be an adapter's name; rename the file: {ADAPTER_NAME_RULE}"
        )
    file = AdapterFile.read(path)
    parsed = ParsedHeader.of(file.header, layers)
    problems = Problems()
    slices: dict[str, list[DeltaSlice]] = {}
    for layer in parsed.layers:
        tensors = {role: file.tensor(name) for role, name in layer.tensors.items()}
        for role, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                problems.add("holding NaN or infinity:", layer.tensors[role])
        delta = _delta(layer.kind, tensors)
        delta = type(delta)(*(tensor.to(device, dtype) for tensor in delta))
        # A Kronecker product of two whole factors has no rank and ignores alpha, as in LyCORIS.
        factor = 1.0
        if layer.rank:
            alpha = float(tensors["alpha"]) if "alpha" in tensors else None
            factor = parsed.alphas.factor(layer.name, layer.rank, alpha)
        for target, start, stop, first_row in layer.target.row_ranges:
            slices.setdefault(target, []).append(DeltaSlice(start, stop, delta, factor, first_row))
    problems.raise_if_any(path)
    return Adapter(
        name=path.stem,
        digest=file.digest,
        summary=_summary(file.header, parsed),
        slices={layer: tuple(found) for layer, found in slices.items()},
    )


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file in memory; independent of later changes on disk."""

    header: Header
    digest: str
    """SHA-256 of the whole file, in hexadecimal."""
    _data: bytes

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Reads a whole file.

        Raises:
            CheckpointError: it is not a valid safetensors file, or it changed during reading.
        """
        before = FileState.of(path)
        header = _read_header(path)
        with open_regular(path) as file:
            data = file.readall()
        if FileState.of(path) != before or len(data) != before.size_bytes:
            raise CheckpointError(f"{path.name} changed while it was read; try again")
        return cls(header, hashlib.sha256(data).hexdigest(), data)

    def tensor(self, name: str) -> Tensor:
        """Returns a copy of a tensor, in float32 on the CPU."""
        stored = self.header.tensors[name]
        data = bytearray(self._data[stored.start : stored.start + stored.byte_count])
        dtype = getattr(torch, DTYPES[stored.dtype].torch_name)
        return torch.frombuffer(data, dtype=dtype).view(stored.shape).float()


def _read_header(path: Path) -> Header:
    """Reads a file's header; errors show only the file name, because the text reaches remote clients."""
    try:
        return read_header(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), path.name)) from None


def _summary(header: Header, parsed: ParsedHeader) -> AdapterSummary:
    layers = parsed.layers
    return AdapterSummary(
        kind="+".join(sorted({layer.kind for layer in layers})),
        rank=max((layer.rank for layer in layers), default=0),
        layer_count=len(layers),
        size_bytes=sum(stored.byte_count for stored in header.tensors.values()),
        notes=parsed.notes,
    )


def _delta(kind: str, tensors: Mapping[str, Tensor]) -> LoraDelta:
    """Builds a layer's delta; products of factors are computed in float32."""
    if kind == "LoRA":
        return LowRank(tensors["down"], tensors["up"])
    if kind == "LoKr":
        left, right = (
            tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        )
        return Kronecker(left, right)
    first, second = (LowRank(tensors[f"hada_{w}_b"], tensors[f"hada_{w}_a"]) for w in ("w1", "w2"))
    return hadamard(first, second)

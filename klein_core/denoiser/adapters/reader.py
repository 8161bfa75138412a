"""Reads adapter files: LoRA, LoKr and LoHa in the namings of diffusers, PEFT, ai-toolkit, kohya, musubi and LyCORIS.

Everything that a file holds must be understood and fit the model; else it is refused with names, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from klein_core.checkpoint.header import Header
from klein_core.denoiser.adapters.adapter import (
    Adapter,
    AdapterSummary,
    Kronecker,
    LowRank,
    Segment,
    Term,
    hadamard,
)
from klein_core.denoiser.adapters.key_mapping import Layers
from klein_core.denoiser.adapters.parse import (
    AdapterFile,
    Alphas,
    LayerPlan,
    Problems,
    adapter_header,
    check_dtypes,
    plan_layers,
    summarized,
)
from klein_core.errors import CheckpointError
from klein_core.params import ADAPTER_NAME, ADAPTER_NAME_RULE


def describe_adapter(path: Path, layers: Layers) -> AdapterSummary:
    """Tells what a file is from its header alone.

    Raises:
        CheckpointError: it cannot be applied to a model with these layers; all reasons are named.
    """
    header = adapter_header(path)
    plans, _ = _planned(header, layers)
    return summarized(plans, _size_bytes(header))


def read_adapter(path: Path, layers: Layers, *, device: torch.device | str, dtype: torch.dtype) -> Adapter:
    """Reads a file; the adapter has its name without the suffix, which requests must be able to say.

    Args:
        path: a safetensors file.
        layers: what the model has, from `layer_targets`.
        device, dtype: the model's.

    Raises:
        CheckpointError: it cannot be applied to a model with these layers; all reasons are named. Or its name
            is none that an adapter may have.
    """
    if not ADAPTER_NAME.fullmatch(path.stem):
        raise CheckpointError(
            f"{path.stem!r} cannot be an adapter's name; rename the file: {ADAPTER_NAME_RULE}"
        )
    file = AdapterFile.read(path)
    plans, alphas = _planned(file.header, layers)
    problems = Problems()
    segments: dict[str, list[Segment]] = {}
    for plan in plans:
        tensors = {part: file.tensor(name) for part, name in plan.tensors.items()}
        for part, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                problems.add("holding NaN or infinity:", plan.tensors[part])
        term = _term(plan.kind, tensors, lambda tensor: tensor.to(device, dtype))
        factor = _factor(plan, tensors, alphas)
        for place in plan.layer.places:
            segment = Segment(place.start, place.stop, term, factor, place.first_row)
            segments.setdefault(place.layer, []).append(segment)
    problems.raise_if_any(path)
    return Adapter(
        name=path.stem,
        digest=file.digest,
        summary=summarized(plans, _size_bytes(file.header)),
        segments={layer: tuple(found) for layer, found in segments.items()},
    )


def _planned(header: Header, layers: Layers) -> tuple[list[LayerPlan], Alphas]:
    problems = Problems()
    check_dtypes(header, problems)
    shapes = {name: stored.shape for name, stored in header.tensors.items()}
    plans = plan_layers(shapes, layers, problems)
    alphas = Alphas.of(header.metadata, problems)
    problems.raise_if_any(header.path)
    return plans, alphas


def _term(kind: str, tensors: Mapping[str, Tensor], stored: Callable[[Tensor], Tensor]) -> Term:
    """Builds a layer's term; products of factors are computed in float32 before they are stored."""
    term: Term
    if kind == "LoRA":
        term = LowRank(tensors["down"], tensors["up"])
    elif kind == "LoKr":
        term = Kronecker(_whole(tensors, "lokr_w1"), _whole(tensors, "lokr_w2"))
    else:
        first, second = (LowRank(tensors[f"hada_{w}_b"], tensors[f"hada_{w}_a"]) for w in ("w1", "w2"))
        term = hadamard(first, second)
    return type(term)(*map(stored, term))


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns a Kronecker factor, multiplied out where it is a pair."""
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def _factor(plan: LayerPlan, tensors: Mapping[str, Tensor], alphas: Alphas) -> float:
    """Returns alpha / rank; a Kronecker product of whole factors has none."""
    if plan.rank == 0:
        return 1.0
    own = float(tensors["alpha"]) if "alpha" in tensors else None
    return alphas.factor(plan.name, plan.rank, own)


def _size_bytes(header: Header) -> int:
    return sum(stored.byte_count for stored in header.tensors.values())

"""Everything that is wrong with an adapter's file, told at once."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klein_core.checkpoint.header import FileState as FileState
from klein_core.checkpoint.header import Header, open_regular, read_header
from klein_core.denoiser.adapters.adapter import AdapterSummary
from klein_core.denoiser.adapters.key_mapping import (
    Layers,
    LayerTarget,
    is_of_dora,
    is_of_text_encoder,
    part_of,
    without_prefix,
)
from klein_core.errors import CheckpointError, raise_if_problems


class Problems:
    """Names by what is wrong with them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """QuantMetadata that `name` is `what`."""
        self._names.setdefault(what, []).append(name)

    def raise_if_any(self, file: Path) -> None:
        """Raises CheckpointError when something was noted; folders are nobody's business and not told."""
        raise_if_problems(Path(file.name), self._names.items())


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Element types that an adapter's factors may have."""
_NUMBER_DTYPES = {**_DTYPES, "F64": torch.float64, "I32": torch.int32, "I64": torch.int64}
"""Those that a single number may have: tools also store a whole alpha as such."""


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file in memory: whoever replaces the one on disk changes nothing here."""

    header: Header
    digest: str
    """SHA-256 of the whole file, in hexadecimal."""
    _data: bytes

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Reads all of a file.

        Raises:
            CheckpointError: it is not a sound safetensors file, or somebody wrote to it meanwhile.
        """
        before = FileState.of(path)
        header = adapter_header(path)
        with open_regular(path) as file:
            data = file.readall()
        if FileState.of(path) != before or len(data) != before.size_bytes:
            raise CheckpointError(f"{path.name} changed while it was read; try again")
        return cls(header, hashlib.sha256(data).hexdigest(), data)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor of its own in float32 on the CPU."""
        stored = self.header.tensors[name]
        data = bytearray(self._data[stored.start : stored.start + stored.byte_count])
        return torch.frombuffer(data, dtype=_NUMBER_DTYPES[stored.dtype]).view(stored.shape).float()


def adapter_header(path: Path) -> Header:
    """Reads a file's header.

    Raises:
        CheckpointError: it is not a sound safetensors file. The text is for callers from outside and has no folder.
    """
    try:
        return read_header(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), path.name)) from None


def check_dtypes(header: Header, problems: Problems) -> None:
    """QuantMetadata tensors of types that are not read."""
    for name, stored in header.tensors.items():
        allowed = _NUMBER_DTYPES if stored.element_count == 1 and name.endswith(".alpha") else _DTYPES
        if stored.dtype not in allowed:
            problems.add(f"not one of {', '.join(allowed)}:", f"{name} ({stored.dtype})")


PEFT_KEY = "lora_adapter_metadata"
"""Header entry of diffusers: PEFT's configuration as JSON, its keys after the component's name and a dot."""
_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_.]+\$?")
_COMPONENT = "transformer."


@dataclass(frozen=True)
class Alphas:
    """What the file's header says of alpha; a layer's own alpha tensor goes before it."""

    default: float | None = None
    """Of every layer; `None` means the layer's rank."""
    by_layer: Mapping[str, float] = field(default_factory=dict)
    """Ends of layer names → alpha."""
    is_stabilized: bool = False
    """Whether the divisor is the rank's square root (PEFT's `use_rslora`)."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], problems: Problems) -> Alphas:
        """Reads a header's metadata and notes what is wrong with it."""
        config = _configuration(metadata, problems)
        if config.get("use_dora"):
            problems.add("DoRA cannot be applied unmerged:", f"{PEFT_KEY}.use_dora")
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict) or not all(_PLAIN_NAME.fullmatch(name) for name in patterns):
            problems.add("not plain layer names:", f"{PEFT_KEY}.alpha_pattern")
            patterns = {}
        by_layer = {
            without_prefix(name.strip("^$")): _number(f"{PEFT_KEY}.alpha_pattern.{name}", value, problems)
            for name, value in patterns.items()
        }
        default = config.get("lora_alpha", metadata.get("lora_alpha"))
        return cls(
            None if default is None else _number("lora_alpha", default, problems),
            by_layer,
            bool(config.get("use_rslora")),
        )

    def factor(self, layer: str, rank: int, own: float | None) -> float:
        """Returns what a layer's product is multiplied with.

        Args:
            layer: its name in the file, without prefixes.
            rank: its rank.
            own: its alpha tensor's value, if it has one.
        """
        alpha = own
        if alpha is None:
            named = (value for name, value in self.by_layer.items() if f".{layer}".endswith(f".{name}"))
            alpha = next(named, self.default)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_stabilized else rank)


def _configuration(metadata: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    if PEFT_KEY not in metadata:
        return {}
    try:
        config = json.loads(metadata[PEFT_KEY])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        problems.add("not a JSON object:", PEFT_KEY)
        return {}
    return {key.removeprefix(_COMPONENT): value for key, value in config.items()}


def _number(name: str, value: object, problems: Problems) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        problems.add("not a finite number:", name)
    return number


Shape = tuple[int, ...]

_PAIR = ("down", "up")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True)
class LayerPlan:
    """One adapted layer."""

    name: str
    """As the file writes it, without prefixes."""
    layer: LayerTarget
    kind: str
    """LoRA, LoKr or LoHa."""
    tensors: Mapping[str, str]
    """Part → the tensor's name in the file."""
    rank: int
    """What alpha is divided by; 0 where nothing is of low rank, and alpha does not count."""


def plan_layers(shapes: Mapping[str, Shape], layers: Layers, problems: Problems) -> list[LayerPlan]:
    """Sorts a file's tensors by layer and notes everything that does not fit the model."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for tensor in shapes:
        part = part_of(tensor)
        if is_of_text_encoder(tensor):
            problems.add("for a text encoder, and only the transformer takes adapters:", tensor)
        elif is_of_dora(tensor):
            problems.add("DoRA cannot be applied unmerged:", tensor)
        elif part is None:
            problems.add("not part of a LoRA, LoKr or LoHa:", tensor)
        elif part.layer not in layers:
            problems.add("for layers that this model does not have:", tensor)
        elif part.role in found[part.layer]:
            problems.add("given twice:", tensor)
        else:
            found[part.layer][part.role] = tensor
    plans = [
        plan
        for name, tensors in found.items()
        if tensors and (plan := _planned(name, tensors, shapes, layers[name], problems))
    ]
    _refuse_overlaps(plans, problems)
    if not shapes:
        problems.add("without tensors:", "the file")
    return plans


def summarized(plans: list[LayerPlan], size_bytes: int) -> AdapterSummary:
    """Describes a file by its plans."""
    return AdapterSummary(
        kind="+".join(sorted({plan.kind for plan in plans})),
        rank=max((plan.rank for plan in plans), default=0),
        layer_count=len(plans),
        size_bytes=size_bytes,
    )


def _planned(
    name: str, tensors: dict[str, str], shapes: Mapping[str, Shape], layer: LayerTarget, problems: Problems
) -> LayerPlan | None:
    """Finds out what a layer's tensors are; `None` when they are nothing, which is noted."""
    parts = {role: shapes[tensor] for role, tensor in tensors.items() if role != "alpha"}
    kind, rank, fits = _kind(parts, layer)
    alpha = tensors.get("alpha")
    if alpha is not None and shapes[alpha] not in ((), (1,)):
        problems.add("not a single number:", f"{alpha} {shapes[alpha]}")
    if not kind:
        problems.add("incomplete:", f"{name} (has {', '.join(tensors)})")
    elif not fits:
        told = ", ".join(f"{role} {shape}" for role, shape in parts.items())
        problems.add(
            "of shapes that do not fit each other or the model:",
            f"{name} ({told}; the layer is {(layer.outputs, layer.inputs)})",
        )
    else:
        return LayerPlan(name, layer, kind, tensors, rank)
    return None


def _kind(parts: Mapping[str, Shape], layer: LayerTarget) -> tuple[str, int, bool]:
    """Returns the kind (empty: incomplete or mixed), the rank and whether the shapes fit."""
    if any(len(shape) != 2 or 0 in shape for shape in parts.values()):
        return "LoRA", 0, False
    roles = set(parts)
    if roles == set(_PAIR):
        return "LoRA", parts["down"][0], _is_pair(parts["up"], parts["down"], layer)
    if roles == set(_LOHA):
        fits = _is_pair(parts["hada_w1_a"], parts["hada_w1_b"], layer)
        fits &= _is_pair(parts["hada_w2_a"], parts["hada_w2_b"], layer)
        return "LoHa", parts["hada_w1_b"][0], fits
    factors = [_factor(parts, name) for name in _LOKR]
    named = {role for names, _, _ in filter(None, factors) for role in names}
    if None in factors or named != roles:
        return "", 0, False
    (_, left, left_rank), (_, right, right_rank) = (factor for factor in factors if factor)
    fits = 0 not in (*left, *right)
    fits &= (left[0] * right[0], left[1] * right[1]) == (layer.outputs, layer.inputs)
    return "LoKr", right_rank or left_rank, fits


def _is_pair(up: Shape, down: Shape, layer: LayerTarget) -> bool:
    return up[1] == down[0] and (up[0], down[1]) == (layer.outputs, layer.inputs)


def _factor(parts: Mapping[str, Shape], name: str) -> tuple[tuple[str, ...], Shape, int] | None:
    """Returns a Kronecker factor's parts, shape and rank (0: whole); `None` when it is not there."""
    if name in parts:
        return (name,), parts[name], 0
    up, down = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if up is None or down is None:
        return None
    shape = (up[0], down[1]) if up[1] == down[0] else (0, 0)
    return (f"{name}_a", f"{name}_b"), shape, down[0]


def _refuse_overlaps(plans: list[LayerPlan], problems: Problems) -> None:
    """QuantMetadata layers that the file names in two ways at once."""
    by_layer: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for plan in plans:
        for place in plan.layer.places:
            by_layer[place.layer].append((place.start, place.stop, plan.name))
    for first, second in _overlapping(by_layer):
        problems.add("given twice:", f"{first} and {second}")


def _overlapping(by_layer: Mapping[str, list[tuple[int, int, str]]]) -> Iterator[tuple[str, str]]:
    for ranges in by_layer.values():
        for (start, stop, name), (other_start, other_stop, other) in combinations(ranges, 2):
            if name != other and start < other_stop and other_start < stop:
                yield name, other

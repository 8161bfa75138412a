"""Parses an adapter file's header: which layers it changes, by which kind of delta, and with which alpha."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from klein_core.checkpoint.header import PLAIN_DTYPES, Header
from klein_core.denoiser.adapters.key_mapping import (
    Layers,
    LayerTarget,
    is_dora,
    is_text_encoder,
    parse_tensor_name,
    without_prefix,
)
from klein_core.errors import listed, raise_if_problems

_ALPHA_DTYPES = (*PLAIN_DTYPES, "F64", "I32", "I64")
"""Element types of alpha, which training tools also store as an integer."""
PEFT_KEY = "lora_adapter_metadata"
"""Header entry of diffusers: PEFT's configuration as JSON, with the component's name and a dot before each key."""
_IGNORED_ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")
_IGNORED_FLAGS = ("use_rslora", "rank_stabilized")
"""Header entries of some trainers that would change the factor, and that diffusers ignores."""
_PEFT_ALPHA = 8
"""Alpha of a PEFT configuration without one."""
_COMPONENT_PREFIX = "transformer."
_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_.]+\$?")
_LORA = ("down", "up")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w2")

Shape = tuple[int, ...]


class Problems:
    """Collects tensor names by what is wrong with them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Records one problem with one name."""
        self._names.setdefault(what, []).append(name)

    def raise_if_any(self, file: Path) -> None:
        """Raises CheckpointError listing all problems. Shows only the file name: the text reaches remote clients."""
        raise_if_problems(Path(file.name), self._names.items())


@dataclass(frozen=True)
class ParsedHeader:
    """Everything an adapter file's header determines."""

    layers: list[AdaptedLayer]
    alphas: Alphas
    notes: tuple[str, ...]
    """Sentences about header entries that are ignored and would change the result."""

    @classmethod
    def of(cls, header: Header, layers: Layers) -> ParsedHeader:
        """Parses a header for a model with these layers.

        Raises:
            CheckpointError: the adapter cannot be applied to the model; lists all reasons.
        """
        problems = Problems()
        for name, stored in header.tensors.items():
            is_number = stored.element_count == 1 and name.endswith(".alpha")
            allowed = _ALPHA_DTYPES if is_number else PLAIN_DTYPES
            if stored.dtype not in allowed:
                problems.add(f"not one of {', '.join(allowed)}:", f"{name} ({stored.dtype})")
        shapes = {name: stored.shape for name, stored in header.tensors.items()}
        adapted = _adapted_layers(shapes, layers, problems)
        alphas = Alphas.of(header.metadata, problems)
        if PEFT_KEY in header.metadata:
            # diffusers would multiply both factors, which no trainer means.
            for layer in adapted:
                if "alpha" in layer.tensors:
                    problems.add(f"alpha given twice, by {PEFT_KEY} too:", layer.tensors["alpha"])
        problems.raise_if_any(header.path)
        return cls(adapted, alphas, tuple(_ignored_entries(header.metadata, adapted)))


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer that an adapter file changes."""

    name: str
    """As the file writes it, without prefixes."""
    target: LayerTarget
    kind: str
    """LoRA, LoKr or LoHa."""
    tensors: Mapping[str, str]
    """Role → the tensor's name in the file."""
    rank: int
    """Divisor of alpha; 0 where no factor is of low rank, and alpha has no effect."""


@dataclass(frozen=True)
class Alphas:
    """Alpha values from the file's header, of files without alpha tensors."""

    default: float | None = None
    """Alpha of every other layer; `None` means the layer's rank."""
    by_layer: Mapping[str, float] = field(default_factory=dict)
    """Last parts of layer names → alpha."""
    is_stabilized: bool = False
    """Whether the divisor is the rank's square root (PEFT's `use_rslora`)."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], problems: Problems) -> Alphas:
        """Parses a header's metadata and adds what is wrong with it to `problems`."""
        config = _peft_config(metadata, problems)
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
        # A bare entry `lora_alpha` is ignored, as by diffusers.
        default = config.get("lora_alpha", _PEFT_ALPHA if config else None)
        return cls(
            None if default is None else _number("lora_alpha", default, problems),
            by_layer,
            bool(config.get("use_rslora")),
        )

    def factor(self, layer: str, rank: int, stored: float | None) -> float:
        """Returns alpha / rank, the factor of a layer's delta.

        Args:
            layer: its name in the file, without prefixes.
            rank: the delta's.
            stored: the value of the layer's alpha tensor, if it has one.
        """
        alpha = stored
        if alpha is None:
            named = (value for name, value in self.by_layer.items() if f".{layer}".endswith(f".{name}"))
            alpha = next(named, self.default)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.is_stabilized else rank)


def _ignored_entries(metadata: Mapping[str, str], layers: Iterable[AdaptedLayer]) -> Iterator[str]:
    """Yields a note for each bare header entry that would change the factor of a layer if it were obeyed."""
    ranks = sorted({layer.rank for layer in layers if layer.rank and "alpha" not in layer.tensors})
    if not ranks or PEFT_KEY in metadata:
        return
    shown = " or ".join(map(str, ranks))
    for key in _IGNORED_ALPHAS:
        if key in metadata and [metadata[key].removesuffix(".0")] != [str(rank) for rank in ranks]:
            value = listed([metadata[key]])
            yield (
                f"header entry {key} ({value}) is ignored, as by diffusers: alpha is the rank, {shown}; "
                f"for alpha {value}, multiply the scale by alpha / rank"
            )
    for key in _IGNORED_FLAGS:
        if metadata.get(key, "").lower() in ("true", "1"):
            yield f"header entry {key} is ignored, as by diffusers: alpha is the rank, {shown}"


def _peft_config(metadata: Mapping[str, str], problems: Problems) -> dict[str, Any]:
    if PEFT_KEY not in metadata:
        return {}
    try:
        config = json.loads(metadata[PEFT_KEY])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        problems.add("not a JSON object:", PEFT_KEY)
        return {}
    return {key.removeprefix(_COMPONENT_PREFIX): value for key, value in config.items()}


def _number(name: str, value: object, problems: Problems) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        problems.add("not a finite number:", name)
    return number


def _adapted_layers(shapes: Mapping[str, Shape], layers: Layers, problems: Problems) -> list[AdaptedLayer]:
    """Groups a file's tensors by layer and adds everything that does not fit the model to `problems`."""
    by_layer: dict[str, dict[str, str]] = defaultdict(dict)
    for tensor in shapes:
        parsed = parse_tensor_name(tensor)
        if is_text_encoder(tensor):
            problems.add("for a text encoder, and only the transformer takes adapters:", tensor)
        elif is_dora(tensor):
            problems.add("DoRA cannot be applied unmerged:", tensor)
        elif parsed is None:
            problems.add("not part of a LoRA, LoKr or LoHa:", tensor)
        elif parsed.layer not in layers:
            problems.add("for layers that this model does not have:", tensor)
        elif parsed.role in by_layer[parsed.layer]:
            problems.add("given twice:", tensor)
        else:
            by_layer[parsed.layer][parsed.role] = tensor
    adapted = [
        layer
        for name, tensors in by_layer.items()
        if tensors and (layer := _adapted_layer(name, tensors, shapes, layers[name], problems))
    ]
    _check_overlaps(adapted, problems)
    if not shapes:
        problems.add("without tensors:", "the file")
    return adapted


def _adapted_layer(
    name: str, tensors: dict[str, str], shapes: Mapping[str, Shape], target: LayerTarget, problems: Problems
) -> AdaptedLayer | None:
    """Determines the kind of one layer's tensors; returns `None` and adds a problem if they form no delta."""
    factors = {role: shapes[tensor] for role, tensor in tensors.items() if role != "alpha"}
    kind, rank, fits = _kind(factors, target)
    alpha = tensors.get("alpha")
    if alpha is not None and shapes[alpha] not in ((), (1,)):
        problems.add("not a single number:", f"{alpha} {shapes[alpha]}")
    if not kind:
        problems.add("incomplete:", f"{name} (has {', '.join(tensors)})")
    elif not fits:
        found = ", ".join(f"{role} {shape}" for role, shape in factors.items())
        problems.add(
            "of shapes that do not fit each other or the model:",
            f"{name} ({found}; the layer is {(target.outputs, target.inputs)})",
        )
    else:
        return AdaptedLayer(name, target, kind, tensors, rank)
    return None


def _kind(factors: Mapping[str, Shape], target: LayerTarget) -> tuple[str, int, bool]:
    """Returns the kind (empty: incomplete or mixed), the rank and whether the shapes fit."""
    if any(len(shape) != 2 or 0 in shape for shape in factors.values()):
        return "LoRA", 0, False
    roles = set(factors)
    if roles == set(_LORA):
        return "LoRA", factors["down"][0], _is_low_rank(factors["up"], factors["down"], target)
    if roles == set(_LOHA):
        fits = _is_low_rank(factors["hada_w1_a"], factors["hada_w1_b"], target)
        fits &= _is_low_rank(factors["hada_w2_a"], factors["hada_w2_b"], target)
        return "LoHa", factors["hada_w1_b"][0], fits
    kronecker = [_kronecker_factor(factors, name) for name in _LOKR]
    named = {role for names, _, _ in filter(None, kronecker) for role in names}
    if None in kronecker or named != roles:
        return "", 0, False
    (_, left, left_rank), (_, right, right_rank) = (factor for factor in kronecker if factor)
    fits = 0 not in (*left, *right)
    fits &= (left[0] * right[0], left[1] * right[1]) == (target.outputs, target.inputs)
    return "LoKr", right_rank or left_rank, fits


def _is_low_rank(up: Shape, down: Shape, target: LayerTarget) -> bool:
    return up[1] == down[0] and (up[0], down[1]) == (target.outputs, target.inputs)


def _kronecker_factor(factors: Mapping[str, Shape], name: str) -> tuple[tuple[str, ...], Shape, int] | None:
    """Returns a Kronecker factor's roles, shape and rank (0: not factorized); `None` if it is missing."""
    if name in factors:
        return (name,), factors[name], 0
    up, down = factors.get(f"{name}_a"), factors.get(f"{name}_b")
    if up is None or down is None:
        return None
    shape = (up[0], down[1]) if up[1] == down[0] else (0, 0)
    return (f"{name}_a", f"{name}_b"), shape, down[0]


def _check_overlaps(layers: Iterable[AdaptedLayer], problems: Problems) -> None:
    """Adds pairs of names that stand for the same rows of one of our layers to `problems`."""
    by_layer: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for layer in layers:
        for row_range in layer.target.row_ranges:
            by_layer[row_range.layer].append((row_range.start, row_range.stop, layer.name))
    for ranges in by_layer.values():
        for (start, stop, name), (other_start, other_stop, other) in combinations(ranges, 2):
            if name != other and start < other_stop and other_start < stop:
                problems.add("given twice:", f"{name} and {other}")

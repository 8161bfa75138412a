"""What a file's names and shapes say that each adapted layer is, before any value is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from klein_core.denoiser.adapters.adapter import AdapterSummary
from klein_core.denoiser.adapters.layers import Layers, NamedLayer
from klein_core.denoiser.adapters.names import is_of_dora, is_of_text_encoder, part_of
from klein_core.denoiser.adapters.problems import Problems

Shape = tuple[int, ...]

_PAIR = ("down", "up")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True)
class LayerPlan:
    """One adapted layer."""

    name: str
    """As the file writes it, without prefixes."""
    layer: NamedLayer
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


def summarised(plans: list[LayerPlan], size_bytes: int) -> AdapterSummary:
    """Describes a file by its plans."""
    return AdapterSummary(
        kind="+".join(sorted({plan.kind for plan in plans})),
        rank=max((plan.rank for plan in plans), default=0),
        layer_count=len(plans),
        size_bytes=size_bytes,
    )


def _planned(
    name: str, tensors: dict[str, str], shapes: Mapping[str, Shape], layer: NamedLayer, problems: Problems
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


def _kind(parts: Mapping[str, Shape], layer: NamedLayer) -> tuple[str, int, bool]:
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


def _is_pair(up: Shape, down: Shape, layer: NamedLayer) -> bool:
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
    """Notes layers that the file names in two ways at once."""
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

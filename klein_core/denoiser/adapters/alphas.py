"""What an adapter's product is divided and multiplied with: alpha / rank, from wherever the file says it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klein_core.denoiser.adapters.names import without_prefix
from klein_core.denoiser.adapters.problems import Problems

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
    is_stabilised: bool = False
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
        return alpha / (math.sqrt(rank) if self.is_stabilised else rank)


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

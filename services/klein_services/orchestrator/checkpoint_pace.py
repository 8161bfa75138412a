"""CheckpointPace: steps between the checkpoints of a request, from their measured cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_COST_SHARE = 0.05
"""Most share of the denoising time that receiving checkpoints may take."""
_WEIGHT = 0.2
"""Weight of the newest measurement in the average."""


@dataclass
class CheckpointPace:
    """Measures what checkpoints cost in steps, for each model, and spaces them so that they take a small share.

    A checkpoint and a step both grow with the image, so their ratio holds for all sizes of a model.
    """

    _steps_each: dict[str, float] = field(default_factory=dict)

    def interval_steps(self, model: str) -> int:
        """Returns after how many steps a checkpoint is worth its cost; 1 until one was measured."""
        return max(1, math.ceil(self._steps_each.get(model, 0.0) / _COST_SHARE))

    def record(self, model: str, checkpoint_seconds: float, step_seconds: float) -> None:
        """Adds a measurement.

        Args:
            model: name of the route.
            checkpoint_seconds: time to receive one checkpoint of all images.
            step_seconds: time of the step before it.
        """
        if step_seconds <= 0:
            return
        ratio = min(checkpoint_seconds / step_seconds, 1.0)
        before = self._steps_each.get(model, ratio)
        self._steps_each[model] = before + _WEIGHT * (ratio - before)

"""What a request brings to the step loop, and what the loop asks of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.sampler import Trajectory

Step = Callable[[Sequence[Trajectory]], None]
"""Does one step of every trajectory and returns when the device is done."""
CacheReferences = Callable[[Sequence[Tensor], tuple[ScaledAdapter, ...]], ReferenceCache]
"""Computes what images with some adapters attend to of their references, and returns when the device is done."""


@dataclass(eq=False, kw_only=True)
class Run:
    """A request's tensors and wishes."""

    trajectories: list[Trajectory]
    """One for each image; their state is all that a paused request needs."""
    cached_references: tuple[Tensor, ...] = ()
    """References whose cache the trajectories get before their first step, where the model takes them so."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Those of the trajectories."""
    preview_interval_steps: int = 0
    checkpoint_interval_steps: int = 0

"""The real denoiser on a slower device: each step takes at least KLEIN_BENCHMARK_STEP_SECONDS for each of its images.

Replicas of a benchmark compete for few processors; a device that waits instead of computing keeps them independent.
Importing this module installs the delay.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from benchmarks.replica_processes import STEP_SECONDS
from klein_core.denoiser.sampler import Trajectory
from klein_core.denoiser.transformer import FlowTransformer
from klein_services.denoiser import application
from klein_services.denoiser.request_state import Step


def delayed_step_of(transformer: FlowTransformer) -> Step:
    """Returns the denoiser's own step function with the delay."""
    step, seconds = _step_of(transformer), float(os.environ.get(STEP_SECONDS, "0"))

    def delayed(trajectories: Sequence[Trajectory]) -> None:
        begun = time.monotonic()
        step(trajectories)
        time.sleep(max(0.0, begun + seconds * len(trajectories) - time.monotonic()))

    return delayed


_step_of = application.step_of
application.step_of = delayed_step_of

"""Warm-up: steps of synthetic requests before the first real one, which also measure the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from klein_core.denoiser.sampler import Trajectory
from klein_services.denoiser.estimates import StepTimes
from klein_services.denoiser.request_state import Step
from klein_services.runtime.errors import DeviceOutOfMemory, as_device_fault

BUDGET_SIDE_PX = 512
"""Size of the images that the token budget is measured with: typical, and small enough to resolve it."""
GAIN = 1.05
"""Least gain in tokens per second for which a step of twice the tokens is worth its latency."""
ROUNDS = 2
"""Timed steps of one kind; the fastest counts, since interference only ever slows a step down."""
STEPS_NEEDED = ROUNDS + 1
"""Steps that a warm-up trajectory must have."""
_log = logging.getLogger("klein.denoiser")

Make = Callable[[int, int], Trajectory]
"""Creates a trajectory of a width and a height in pixels."""


def warm_up(
    step: Step,
    make: Make,
    tokens: Callable[[int, int], int],
    sizes_px: Sequence[tuple[int, int]],
    times: StepTimes,
) -> None:
    """Steps one image of each size and records how long it takes.

    Args:
        step: does one step of some trajectories.
        make: creates a trajectory of a width and a height.
        tokens: returns the tokens of such a trajectory's step.
        sizes_px: (width, height) pairs.
        times: where the times are recorded.
    """
    for width_px, height_px in sizes_px:
        seconds = step_seconds(step, [make(width_px, height_px)])
        times.observe([tokens(width_px, height_px)], seconds)
        _log.info("warmed up", extra={"width_px": width_px, "height_px": height_px, "step_seconds": seconds})


def measure_budget(step: Step, make: Make, image_tokens: int, image_limit: int, times: StepTimes) -> int:
    """Returns the tokens of the largest step that pays: doubles the images until throughput stops growing.

    Args:
        step: does one step of some trajectories.
        make: creates a trajectory of a width and a height.
        image_tokens: tokens of one image of `BUDGET_SIDE_PX` squared.
        image_limit: most images in a step.
        times: where the times are recorded.
    """
    best_count, best_rate = 1, 0.0
    for count in (2**power for power in range(int(math.log2(image_limit)) + 1)):
        try:
            images = [make(BUDGET_SIDE_PX, BUDGET_SIDE_PX) for _ in range(count)]
            seconds = step_seconds(step, images)
        except Exception as error:
            if not isinstance(as_device_fault(error), DeviceOutOfMemory):
                raise
            # The step before did fit; half of it leaves room for memory that the allocator cannot reuse.
            best_count = max(1, best_count // 2)
            break
        times.observe([image_tokens] * count, seconds)
        rate = count * image_tokens / seconds
        _log.info("measured", extra={"step_tokens": count * image_tokens, "tokens_per_second": round(rate)})
        if rate < best_rate * GAIN:
            break
        best_count, best_rate = count, rate
    return best_count * image_tokens


def step_seconds(step: Step, trajectories: Sequence[Trajectory]) -> float:
    """Returns the fastest of `ROUNDS` steps, after one that does not count."""
    step(trajectories)
    fastest = math.inf
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        step(trajectories)
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()

"""Warm-up: steps of synthetic requests before the first real one, which also measure the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch

from klein_core.denoiser.sampler import Trajectory
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.memory.activation_bytes import StepShape, step_activations
from klein_core.memory.precision import PRECISIONS
from klein_core.params import SIZE_MULTIPLE_PX
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


def compile_steps(step: Step, make: Make, *, packs: bool) -> None:
    """Runs each kind of step that compiles a program: of one image; if requests share steps, of equal and unequal ones.

    From here on nothing is compiled: a program takes seconds, and all requests of the step would wait for it.
    """
    shared = ((512, 512), (512, 512, 512), (512, 256), (512, 256, 1024)) if packs else ()
    for sides_px in ((512,), *shared):
        step([make(side_px, side_px) for side_px in sides_px])
    torch.compiler.set_stance("eager_on_recompile")


def measure_budget(
    step: Step,
    make: Make,
    image_tokens: int,
    image_limit: int,
    times: StepTimes,
    fits: Callable[[int], bool] = lambda count: True,
) -> int:
    """Returns the tokens of the largest step that pays: doubles the images until throughput stops growing.

    Args:
        step: does one step of some trajectories.
        make: creates a trajectory of a width and a height.
        image_tokens: tokens of one image of `BUDGET_SIDE_PX` squared.
        image_limit: most images in a step.
        times: where the times are recorded.
        fits: returns whether memory is expected to suffice for a number of images; more are not tried.
    """
    best_count, best_rate = 1, 0.0
    for count in (2**power for power in range(int(math.log2(image_limit)) + 1)):
        if count > 1 and not fits(count):
            break
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


def expected_to_fit(transformer: FlowTransformer, text_tokens: int) -> Callable[[int], bool]:
    """Returns a function that returns whether a step of so many images of `BUDGET_SIDE_PX` takes half of free memory.

    The other half is for the stages that share the device and for references. Without CUDA everything fits.
    """
    device, config = transformer.device, transformer.config
    if device.type != "cuda":
        return lambda count: True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    precision = PRECISIONS["fp32" if transformer.dtype.itemsize == 4 else "bf16"]
    target = (BUDGET_SIDE_PX // SIZE_MULTIPLE_PX) ** 2

    def fits(count: int) -> bool:
        shape = StepShape(spans=count, text=text_tokens, target=target)
        return 2 * step_activations(config, precision, shape).byte_count <= free_bytes

    return fits


def release_memory(device: torch.device) -> None:
    """Gives memory that torch keeps for reuse back to a CUDA device: other stages may share it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

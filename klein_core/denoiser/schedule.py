"""Which noise levels a trajectory passes: a straight line, shifted by how many tokens the image has."""

from __future__ import annotations

import math

import numpy as np

from klein_core.errors import InvalidInput

LARGE_IMAGE_TOKENS = 4300
"""Above this many target tokens the shift no longer depends on the step count and drops sharply."""


def empirical_mu(token_count: int, step_count: int) -> float:
    """Returns the logarithm of the shift for `token_count` target tokens (references do not count).

    Two lines fitted at 10 and 200 steps, interpolated in the step count. Source of the constants:
    `compute_empirical_mu` in black-forest-labs/flux2 and diffusers.
    """
    many_steps = 0.00016927 * token_count + 0.45666666
    if token_count > LARGE_IMAGE_TOKENS:
        return many_steps
    few_steps = 8.73809524e-05 * token_count + 1.89833333
    slope = (many_steps - few_steps) / 190.0
    return slope * step_count + (many_steps - 200.0 * slope)


def sigmas(token_count: int, step_count: int) -> list[float]:
    """Returns `step_count` + 1 noise levels from 1 down to 0; each is exactly a float32.

    Raises:
        InvalidInput: no tokens or no steps.
    """
    if token_count < 1:
        raise InvalidInput.of("token_count", f"is {token_count}; at least 1")
    if step_count < 1:
        raise InvalidInput.of("step_count", f"is {step_count}; at least 1")
    line = np.linspace(1.0, 1 / step_count, step_count).astype(np.float32)
    shift = math.exp(empirical_mu(token_count, step_count))
    shifted = (shift / (shift + (1 / line - 1))).astype(np.float32)
    return [*shifted.tolist(), 0.0]

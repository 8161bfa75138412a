"""Device model of the scheduling benchmark: the time of a step by the tokens of its images."""

from __future__ import annotations

from collections.abc import Sequence

from klein_services.denoiser.warmup import BUDGET_SIDE_PX, GAIN

TEXT_TOKENS = 512
LEAST_SECONDS = 0.017
"""Time to launch a step's kernels, below which no step ends."""
SECONDS_PER_STEP = 0.004
SECONDS_PER_TOKEN = 1e-5
SECONDS_PER_SQUARE_TOKEN = 3.5e-10
"""Attention, for each image by itself. With these numbers a step of 1024² takes 57 ms, as published for klein-4B on
one H200, and a step of 2048² 273 ms."""
IMAGE_LIMIT = 64


def image_tokens(side_px: int) -> int:
    """Returns the tokens of one step of a square image."""
    return TEXT_TOKENS + (side_px // 16) ** 2


def step_seconds(tokens: Sequence[int]) -> float:
    """Returns the time of one step of images with these token counts."""
    linear = SECONDS_PER_TOKEN * sum(tokens)
    attention = SECONDS_PER_SQUARE_TOKEN * sum(count**2 for count in tokens)
    return max(LEAST_SECONDS, SECONDS_PER_STEP + linear + attention)


def measured_steps() -> list[list[int]]:
    """Returns the steps that a denoiser's warm-up measures to find its token budget; the last gains too little."""
    steps, best_rate, count = list[list[int]](), 0.0, 1
    while count <= IMAGE_LIMIT:
        tokens = [image_tokens(BUDGET_SIDE_PX)] * count
        steps.append(tokens)
        rate = sum(tokens) / step_seconds(tokens)
        if rate < best_rate * GAIN:
            break
        best_rate, count = rate, 2 * count
    return steps


def token_budget() -> int:
    """Returns the tokens of the largest step that pays."""
    return sum(measured_steps()[-2])

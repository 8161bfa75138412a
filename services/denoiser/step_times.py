"""How long a step takes, from steps that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence


class StepTimes:
    """Seconds a token, averaged exponentially, for each size class of images.

    A class spans half an octave of tokens, so that attention's quadratic part stays within it.
    """

    def __init__(self, weight: float = 0.25) -> None:
        """`weight` is the newest measurement's share, in (0, 1]."""
        self._weight = weight
        self._seconds_per_token: dict[int, float] = {}

    def observe(self, image_tokens: Sequence[int], seconds: float) -> None:
        """Learns from a step that took `seconds` for images of these many tokens."""
        measured = seconds / sum(image_tokens)
        for size_class in {_size_class(tokens) for tokens in image_tokens}:
            known = self._seconds_per_token.get(size_class, measured)
            self._seconds_per_token[size_class] = known + self._weight * (measured - known)

    def seconds(self, image_tokens: int) -> float | None:
        """Returns the expected seconds of one image's step; `None` when its class was never measured."""
        rate = self._seconds_per_token.get(_size_class(image_tokens))
        return None if rate is None else rate * image_tokens


def _size_class(tokens: int) -> int:
    return round(2 * math.log2(tokens))

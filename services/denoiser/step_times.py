"""How long a step takes, from steps that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence


class StepTimes:
    """Seconds a token, averaged exponentially, by the size of an image and by that of the step that it is in.

    A class spans half an octave of tokens, so that attention's quadratic part stays within one of images. Classes of
    steps tell what packing gains: nothing on a device that one image fills, several times the throughput on others.
    """

    def __init__(self, weight: float = 0.25) -> None:
        """`weight` is the newest measurement's share, in (0, 1]."""
        self._weight = weight
        self._seconds_per_token: defaultdict[int, dict[int, float]] = defaultdict(dict)

    def observe(self, image_tokens: Sequence[int], seconds: float) -> None:
        """Learns from a step that took `seconds` for images of these many tokens."""
        step_tokens = sum(image_tokens)
        measured, step_class = seconds / step_tokens, _size_class(step_tokens)
        for image_class in {_size_class(tokens) for tokens in image_tokens}:
            rates = self._seconds_per_token[image_class]
            known = rates.get(step_class, measured)
            rates[step_class] = known + self._weight * (measured - known)

    def seconds(self, image_tokens: int, step_tokens: float = 0) -> float | None:
        """Returns the expected seconds of one image's share of a step; `None` when no such image was ever measured.

        Args:
            image_tokens: of the image.
            step_tokens: of all that is in the step, where the image is not alone. If no such step was measured, the
                one nearest in size counts, the larger of two.
        """
        rates = self._seconds_per_token.get(_size_class(image_tokens))
        if not rates:
            return None
        wanted = _size_class(max(image_tokens, step_tokens))
        nearest = min(rates, key=lambda step_class: (abs(step_class - wanted), -step_class))
        return rates[nearest] * image_tokens


def _size_class(tokens: float) -> int:
    return round(2 * math.log2(tokens))

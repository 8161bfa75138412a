"""Estimates of waiting and computing times from measured steps, and the token budget of a step. Torch-free."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduled_request import ScheduledRequest

GROWTH_STEPS = 256
"""Full steps that must succeed before a reduced budget is doubled again.

Where memory stays short, each growth costs one failed step that is repeated image by image: a few percent of this many.
"""


class StepTimes:
    """Measured seconds per token, averaged exponentially, by image size and by step size.

    Size classes span half an octave of tokens, narrow enough for attention's quadratic cost. Times are kept per step
    size because packing gains nothing on a device that one image fills, and several times the throughput on others.
    """

    def __init__(self, weight: float = 0.25) -> None:
        """`weight` is the share of the newest measurement, in (0, 1]."""
        self._weight = weight
        self._seconds_per_token: defaultdict[int, dict[int, float]] = defaultdict(dict)

    def observe(self, image_tokens: Sequence[int], seconds: float) -> None:
        """Records a step that took `seconds` for images of these token counts."""
        step_tokens = sum(image_tokens)
        measured, step_class = seconds / step_tokens, _size_class(step_tokens)
        for image_class in {_size_class(tokens) for tokens in image_tokens}:
            rates = self._seconds_per_token[image_class]
            average = rates.get(step_class, measured)
            rates[step_class] = average + self._weight * (measured - average)

    def seconds(self, image_tokens: int, step_tokens: float = 0) -> float | None:
        """Returns one image's share of a step in seconds; `None` before an image of its size class was measured.

        Args:
            image_tokens: tokens of the image.
            step_tokens: tokens of the whole step, when the image shares it. If no step of that size was measured,
                the nearest size is used, and of two equally near the larger.
        """
        rates = self._seconds_per_token.get(_size_class(image_tokens))
        if not rates:
            return None
        wanted = _size_class(max(image_tokens, step_tokens))
        nearest = min(rates, key=lambda step_class: (abs(step_class - wanted), -step_class))
        return rates[nearest] * image_tokens


def _size_class(tokens: float) -> int:
    return round(2 * math.log2(tokens))


class StepBudget:
    """Limit of images and tokens in one step; shrinks when memory runs out and grows back when steps succeed."""

    def __init__(self, tokens: int, image_limit: int) -> None:
        """`tokens` is 0 where each image steps alone."""
        self.tokens = tokens
        """Most tokens of a step now. A larger single image runs alone."""
        self._full_tokens = tokens
        self._image_limit = image_limit
        self._good_steps = 0

    def measured(self, tokens: int) -> None:
        """Sets the full budget to what the warm-up measured."""
        self.tokens = self._full_tokens = tokens

    def room(self, image_tokens: int, images: int = 0, tokens: int = 0) -> int:
        """Returns how many more images of `image_tokens` fit into a step that holds `images` of `tokens` in total.

        An empty step has room for one image of any size.
        """
        free = min((self.tokens - tokens) // image_tokens, self._image_limit - images)
        return max(free, 1 if images == 0 else 0)

    def cut(self, failed_tokens: int) -> None:
        """Reduces the budget to half of a step that ran out of memory."""
        self.tokens = min(self.tokens, failed_tokens // 2)
        self._good_steps = 0

    def record_success(self, step_tokens: int) -> bool:
        """Counts a step that succeeded; returns whether the budget has grown.

        Only steps of more than half the budget count: smaller ones say nothing about memory, and need no growth.
        """
        if self.tokens == self._full_tokens or 2 * step_tokens <= self.tokens:
            return False
        self._good_steps += 1
        if self._good_steps < GROWTH_STEPS:
            return False
        self.tokens = min(2 * self.tokens, self._full_tokens)
        self._good_steps = 0
        return True


class Estimates:
    """Estimates from measured step times; `None` for sizes not yet measured."""

    def __init__(self, times: StepTimes, budget: StepBudget, caches: ReferenceCaches[Any]) -> None:
        self._times = times
        self._budget = budget
        self._caches = caches

    def wait(self, request: ScheduledRequest, ahead: Sequence[ScheduledRequest]) -> float | None:
        """Returns the seconds until a request starts, given those that are served before it."""
        if self._fits_with(request, ahead):
            return 0.0
        total = 0.0
        for other in ahead:
            seconds = self.seconds_left(other)
            if seconds is None:
                return None
            total += seconds
        return total

    def needed(
        self,
        request: ScheduledRequest,
        ahead: Sequence[ScheduledRequest],
        behind: Sequence[ScheduledRequest],
    ) -> float | None:
        """Returns the seconds until a request that has not started ends; `None` if its own size was never measured.

        Unmeasured times of other requests count as 0, so that no request is refused on a guess.

        Args:
            request: the request.
            ahead: requests served before it, in the order of service.
            behind: requests served after it, which share its steps where they fit.
        """
        companions = [*(ahead if self._fits_with(request, ahead) else ()), *behind]
        image_tokens = request.image_tokens
        images = min(request.image_count, self._budget.room(image_tokens))
        steps = -(-request.items_left // images)
        tokens = request.items_left * image_tokens
        tokens += self._shared_tokens(image_tokens, images, steps, companions)
        seconds = self._times.seconds(image_tokens, tokens / steps)
        if seconds is None:
            return None
        own = seconds * tokens / image_tokens + (self._caching_seconds(request) or 0.0)
        return own + (self.wait(request, ahead) or 0.0)

    def seconds_left(self, request: ScheduledRequest) -> float | None:
        """Returns the device seconds that a request still needs when its steps are filled to the budget."""
        seconds = self._times.seconds(request.image_tokens, self._budget.tokens)
        caching = self._caching_seconds(request)
        return None if seconds is None or caching is None else seconds * request.items_left + caching

    def _fits_with(self, request: ScheduledRequest, ahead: Sequence[ScheduledRequest]) -> bool:
        """Returns whether a step that holds all requests ahead has room for this one."""
        images = sum(other.images_left_in_step for other in ahead)
        tokens = sum(other.image_tokens * other.images_left_in_step for other in ahead)
        return self._budget.room(request.image_tokens, images, tokens) > 0

    def _shared_tokens(
        self, image_tokens: int, images: int, steps: int, companions: Sequence[ScheduledRequest]
    ) -> int:
        """Returns the tokens that companions add to `steps` steps, each with `images` images of a request.

        Companions fill a step in order until the budget is reached, and add no more than their remaining work.
        """
        own_tokens = images * image_tokens
        step_images, step_tokens, left = images, own_tokens, 0
        for other in companions:
            count, tokens = other.image_count, other.image_tokens
            left += tokens * min(
                other.items_left, steps * min(count, self._budget.room(tokens, images, own_tokens))
            )
            taken = min(count, self._budget.room(tokens, step_images, step_tokens))
            step_images, step_tokens = step_images + taken, step_tokens + taken * tokens
        return min(steps * (step_tokens - own_tokens), left)

    def _caching_seconds(self, request: ScheduledRequest) -> float | None:
        """Returns the seconds to compute the request's reference cache; 0 if it exists or is not needed."""
        cache = request.cache
        if cache is None or request.has_cache or cache.key in self._caches:
            return 0.0
        return self._times.seconds(cache.tokens)

"""How long a step takes, from steps that were measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from klein_services.denoiser.job import Job
from klein_services.denoiser.reference_kv_cache import ReferenceCaches


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


GROWTH_STEPS = 256
"""Full steps that must go well before a budget that was cut is doubled again.

Where memory stays short, the step that fails then and is repeated image by image costs a few percent of so many.
"""


class StepBudget:
    """A bound of images and one of tokens, which is cut where memory runs out and grows back when it suffices."""

    def __init__(self, tokens: int, image_limit: int) -> None:
        """`tokens` is 0 where each image steps alone."""
        self.tokens = tokens
        """What a step may have now. A larger single image runs alone."""
        self._full_tokens = tokens
        self._image_limit = image_limit
        self._good_steps = 0

    def room(self, image_tokens: int, images: int = 0, tokens: int = 0) -> int:
        """Returns how many more such images go into a step that has some; into an empty one goes one of any size."""
        free = min((self.tokens - tokens) // image_tokens, self._image_limit - images)
        return max(free, 1 if images == 0 else 0)

    def cut(self, failed_tokens: int) -> None:
        """Halves a step for which the device had no memory."""
        self.tokens = min(self.tokens, failed_tokens // 2)
        self._good_steps = 0

    def book_success(self, step_tokens: int) -> bool:
        """Counts a step that went well; returns whether the budget has grown.

        A step of at most half the budget says nothing about a larger one, and where no step is fuller none is wanted.
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
    """Reckons with measured step times; what depends on sizes that were never measured is `None`."""

    def __init__(self, times: StepTimes, budget: StepBudget, caches: ReferenceCaches[Any]) -> None:
        self._times = times
        self._budget = budget
        self._caches = caches

    def wait(self, job: Job, ahead: Sequence[Job]) -> float | None:
        """Returns the seconds until a job starts, given those that go before it."""
        if self._goes_with(job, ahead):
            return 0.0
        waits = [self.seconds_left(other) for other in ahead]
        known = [seconds for seconds in waits if seconds is not None]
        return sum(known) if len(known) == len(waits) else None

    def needed(self, job: Job, ahead: Sequence[Job], behind: Sequence[Job]) -> float | None:
        """Returns the seconds until a job that has not begun ends; `None` where its own steps were never measured.

        Whatever else was not measured counts as none, so that nothing is refused on a guess.

        Args:
            job: the one.
            ahead: those that go before it, in the order of service.
            behind: those that go after it, and still share its steps where they fit.
        """
        companions = [*(ahead if self._goes_with(job, ahead) else ()), *behind]
        own = self._seconds_in_company(job, companions)
        return None if own is None else own + (self.wait(job, ahead) or 0.0)

    def seconds_left(self, job: Job) -> float | None:
        """Returns the device's seconds that a job still needs where steps are as full as they may be."""
        seconds = self._times.seconds(job.spec.image_tokens, self._budget.tokens)
        caching = self._caching_seconds(job)
        return None if seconds is None or caching is None else seconds * job.units_left + caching

    def _goes_with(self, job: Job, ahead: Sequence[Job]) -> bool:
        """Whether a step that has all those before it has room for the job."""
        images = sum(other.units_left_in_step for other in ahead)
        tokens = sum(other.spec.image_tokens * other.units_left_in_step for other in ahead)
        return self._budget.room(job.spec.image_tokens, images, tokens) > 0

    def _seconds_in_company(self, job: Job, companions: Sequence[Job]) -> float | None:
        """Returns the seconds of a job's steps, all that shares them included."""
        image_tokens = job.spec.image_tokens
        images = min(job.spec.image_count, self._budget.room(image_tokens))
        steps = -(-job.units_left // images)
        tokens = job.units_left * image_tokens + self._shared_tokens(image_tokens, images, steps, companions)
        seconds, caching = self._times.seconds(image_tokens, tokens / steps), self._caching_seconds(job)
        return None if seconds is None else seconds * tokens / image_tokens + (caching or 0.0)

    def _shared_tokens(self, image_tokens: int, images: int, steps: int, companions: Sequence[Job]) -> int:
        """Returns the tokens of companions in so many steps that have so many images of a job.

        They fill each step as far as it goes, and do no more than they have left.
        """
        own_tokens = images * image_tokens
        step_images, step_tokens, left = images, own_tokens, 0
        for other in companions:
            count, tokens = other.spec.image_count, other.spec.image_tokens
            left += tokens * min(
                other.units_left, steps * min(count, self._budget.room(tokens, images, own_tokens))
            )
            taken = min(count, self._budget.room(tokens, step_images, step_tokens))
            step_images, step_tokens = step_images + taken, step_tokens + taken * tokens
        return min(steps * (step_tokens - own_tokens), left)

    def _caching_seconds(self, job: Job) -> float | None:
        cache = job.spec.cache
        if cache is None or job.has_cache or cache.key in self._caches:
            return 0.0
        return self._times.seconds(cache.tokens)

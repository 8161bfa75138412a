"""How long requests will wait and take, if nobody else comes and nobody leaves early."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.denoiser.job import Job
from services.denoiser.reference_caches import ReferenceCaches
from services.denoiser.step_budget import StepBudget
from services.denoiser.step_times import StepTimes


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

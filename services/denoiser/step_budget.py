"""How much one step may hold."""

from __future__ import annotations

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

"""Watermark: an operator's callable that marks the pixels of every image before it is encoded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

from klein_services.runtime.settings import SettingsError

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "klein_suite.watermarks"
"""Group of the entry points that `KLEIN_WATERMARK` may name."""


class WatermarkFailed(Exception):
    """The watermark raised an error or returned no image: a fault of the server, and the image is not sent."""


class Watermark:
    """The callable that a setting names.

    It gets the pixels as a NumPy array of uint8 (height, width, 3), which it may change, and returns an array or a
    tensor of the same shape and type. It runs on the thread that writes image files, one image at a time.

    Args:
        name: `module:callable`, or the name of an entry point of the group `klein_suite.watermarks`.

    Raises:
        SettingsError: there is no such callable, or it cannot be imported.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            mark = _resolved(name)
        except Exception as error:
            # Importing an operator's module may raise anything.
            raise SettingsError(f"KLEIN_WATERMARK is {name!r}, which cannot be imported: {error}") from error
        if not callable(mark):
            raise SettingsError(
                f"KLEIN_WATERMARK is {name!r}, which is a {type(mark).__name__} and not callable"
            )
        self._mark: Callable[[Any], Any] = mark

    def applied(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns marked pixels.

        Args:
            pixels: uint8 (height, width, 3) on the CPU; may be changed.

        Raises:
            WatermarkFailed: the callable failed, or returned something else.
        """
        import numpy as np
        import torch

        try:
            made = self._mark(pixels.contiguous().numpy())
        except Exception as error:
            raise WatermarkFailed(f"the watermark {self.name} failed") from error
        if isinstance(made, torch.Tensor):
            made = made.detach().cpu().numpy()
        if not isinstance(made, np.ndarray) or made.dtype != np.uint8 or made.shape != tuple(pixels.shape):
            got = f"{made.dtype} {made.shape}" if isinstance(made, np.ndarray) else type(made).__name__
            raise WatermarkFailed(
                f"the watermark {self.name} returned {got}; it must return uint8 {tuple(pixels.shape)}"
            )
        # Not every array can become a tensor: one may be read-only or have negative strides.
        return torch.from_numpy(np.array(made, order="C"))


def _resolved(name: str) -> object:
    module, colon, attributes = name.partition(":")
    if not colon:
        found = metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not found:
            raise LookupError(f"no entry point of the group {ENTRY_POINT_GROUP} has this name")
        return next(iter(found)).load()
    value: object = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value

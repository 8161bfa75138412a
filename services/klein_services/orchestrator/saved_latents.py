"""Saved latents of one request: what another replica need not compute again when a stage is lost."""

from __future__ import annotations

from collections.abc import Sequence

from klein_services.runtime.protowire import is_last_frame

_LARGEST_ELEMENT_BYTES = 4
_Frames = tuple[bytes, ...]


def latents_bytes(image_count: int, width_px: int, height_px: int, channels: int) -> int:
    """Returns the most bytes that the latents of a request's images take, whatever their element type."""
    return image_count * (width_px // 16) * (height_px // 16) * channels * _LARGEST_ELEMENT_BYTES


class SavedLatents:
    """Serialized frames of the last checkpoint of all images, and of the final latents of each image.

    A checkpoint is used only once it has all frames of all images; until then the one before it stays.
    """

    def __init__(self) -> None:
        self.step = 0
        """Steps done in the checkpoint; 0 without one."""
        self._checkpoint: dict[int, _Frames] = {}
        self._arriving_step = 0
        self._arriving: dict[int, list[bytes]] = {}
        self._arrived: set[int] = set()
        self._final: dict[int, list[bytes]] = {}
        self._finished: set[int] = set()

    def add_checkpoint(self, image: int, frame: bytes, step: int, images: Sequence[int]) -> bool:
        """Adds a frame of an image's latents after `step` steps; returns whether it made the checkpoint complete.

        Args:
            image: index of the image in the request.
            frame: the serialized frame, as `protowire` moves it.
            step: steps done in these latents.
            images: the images of which the denoiser sends checkpoints.
        """
        if step != self._arriving_step:
            self._arriving_step = step
            self._arriving.clear()
            self._arrived.clear()
        self._arriving.setdefault(image, []).append(frame)
        if is_last_frame(frame):
            self._arrived.add(image)
        if not self._arrived.issuperset(images):
            return False
        self._checkpoint = {each: tuple(self._arriving[each]) for each in images}
        self.step = step
        self._arriving_step = 0
        self._arriving.clear()
        self._arrived.clear()
        return True

    def add_final(self, image: int, frame: bytes) -> None:
        """Adds a frame of an image's final latents."""
        self._final.setdefault(image, []).append(frame)
        if is_last_frame(frame):
            self._finished.add(image)

    def checkpoint(self, image: int) -> _Frames:
        """Returns the frames of an image's latents after `step` steps."""
        return self._checkpoint[image]

    def final(self, image: int) -> _Frames | None:
        """Returns the frames of an image's final latents, `None` unless all of them are here."""
        return tuple(self._final[image]) if image in self._finished else None

    def delivered(self, image: int) -> None:
        """Drops an image's latents, unneeded once its client has the image."""
        for by_image in (self._checkpoint, self._arriving, self._final):
            by_image.pop(image, None)
        self._finished.discard(image)

    def drop_incomplete(self) -> None:
        """Drops what a lost call sent in part, so that frames of two calls never mix."""
        self._arriving_step = 0
        self._arriving.clear()
        self._arrived.clear()
        for image in self._final.keys() - self._finished:
            del self._final[image]

    def clear(self) -> None:
        """Drops everything: the stages' weights have changed."""
        self.drop_incomplete()
        self._checkpoint.clear()
        self._final.clear()
        self._finished.clear()
        self.step = 0

"""Settings of the vae-decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from klein_core.params import DEFAULT_LIMITS, SIZE_MULTIPLE_PX
from klein_services.runtime.batching import BatchingSettings
from klein_services.runtime.settings import SettingsError, metrics_port_setting, setting
from klein_services.vae_decoder.watermark import Watermark


@dataclass(frozen=True, kw_only=True)
class VaeDecoderSettings(BatchingSettings):
    """Settings of `klein_services.vae_decoder`."""

    port: int = setting(50053, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9466)
    reference_bytes: int = setting(
        20 << 20,
        help="Most bytes of the file of a reference, an initial image or a mask",
        minimum=1,
        maximum=1 << 30,
    )
    maximum_pixel_count: int = setting(
        DEFAULT_LIMITS.pixel_count, help="Most pixels of a decoded image", minimum=4096, maximum=1 << 30
    )
    file_threads: int = setting(
        2,
        help="Image files that are read or written at once; with more than 1, only one of them may be a large image",
        minimum=1,
        maximum=256,
    )
    queue_pixel_count: int = setting(
        1 << 30,
        help="Most pixels of large images (more than 4 Mi pixels) whose files wait or are read; more are refused",
        minimum=1 << 26,
        maximum=1 << 40,
    )
    queue_bytes: int = setting(
        256 << 20,
        help="Most bytes of image files and pixels that requests hold while they wait; more are refused, those to be "
        "encoded at three quarters of it",
        minimum=1 << 20,
        maximum=1 << 40,
    )
    warm_up_size_px: int = setting(
        0,
        help="Width and height of the image that is encoded and decoded before serving; 0 is 1024, then 512 on CUDA, "
        "64 elsewhere",
        minimum=0,
        maximum=2048,
    )
    tiling: str = setting(
        "auto",
        help="Whether images larger than a tile are decoded in tiles, which takes less memory and changes some pixels; "
        "auto tiles images that need more than the limit in one piece",
        choices=("auto", "on", "off"),
    )
    tiling_limit_mib: int = setting(
        0,
        help="MiB of memory that one image may take before auto tiles it; 0 is a quarter of the device's memory",
        minimum=0,
        maximum=10**7,
    )
    watermark: str = setting(
        "",
        help="Callable that marks the pixels of every image, as module:callable or the name of an entry point; empty "
        "marks none",
    )

    def warm_up_sizes_px(self, on_gpu: bool) -> tuple[int, ...]:
        """Returns the sides of the images of the warm-up, multiples of 16."""
        if self.warm_up_size_px:
            return (max(self.warm_up_size_px // SIZE_MULTIPLE_PX, 4) * SIZE_MULTIPLE_PX,)
        return (1024, 512) if on_gpu else (64,)

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with paths and names, the watermark's included."""
        yield from super().problems()
        if self.watermark:
            try:
                Watermark(self.watermark)
            except SettingsError as error:
                yield str(error)

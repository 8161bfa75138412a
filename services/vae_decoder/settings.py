"""Settings of the vae-decoder."""

from __future__ import annotations

from dataclasses import dataclass

from klein_core.params import DEFAULT_LIMITS
from services.runtime.settings import StageSettings, setting


@dataclass(frozen=True, kw_only=True)
class VaeDecoderSettings(StageSettings):
    """What the vae-decoder can be told beside what all stages can."""

    port: int = setting(50053, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    reference_bytes: int = setting(
        20 << 20, help="Most bytes of a reference's file", minimum=1, maximum=1 << 30
    )
    maximum_pixel_count: int = setting(
        DEFAULT_LIMITS.pixel_count, help="Most pixels of a decoded image", minimum=4096, maximum=1 << 30
    )
    warm_up_size_px: int = setting(
        64,
        help="Width and height of the image that is encoded and decoded before serving",
        minimum=64,
        maximum=2048,
    )

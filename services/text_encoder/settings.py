"""Settings of the text-encoder."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.settings import StageSettings, setting


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(StageSettings):
    """What the text-encoder can be told; all of it is common to stages."""

    port: int = setting(50051, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)

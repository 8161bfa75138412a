"""Settings of the text-encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from klein_core.checkpoint.files import ModelFiles
from klein_services.runtime.settings import StageSettings, quantization_setting, require_place, setting


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(StageSettings):
    """What the text-encoder can be told."""

    port: int = setting(50051, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    quantization: str = quantization_setting()
    tokenizer_path: str = setting(
        "", help="Folder of the tokenizer, instead of the model's; needed where the weights are a bare file"
    )

    def check(self) -> None:
        super().check()
        if self.tokenizer_path:
            require_place("tokenizer_path", self.tokenizer_path)

    def model_files(self, component: str) -> ModelFiles:
        files = super().model_files(component)
        return replace(files, tokenizer=Path(self.tokenizer_path)) if self.tokenizer_path else files

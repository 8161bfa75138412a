"""Settings of the text-encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from klein_core.checkpoint.files import ModelFiles
from klein_services.runtime.batching import BatchingSettings
from klein_services.runtime.settings import metrics_port_setting, path_problems, setting
from klein_services.runtime.stage_settings import quantization_setting


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(BatchingSettings):
    """Settings of `klein_services.text_encoder`."""

    port: int = setting(50051, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9464)
    quantization: str = quantization_setting()
    tokenizer_path: str = setting(
        "", help="Folder of the tokenizer, instead of the model's; needed where the weights are a bare file"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from path_problems("tokenizer_path", self.tokenizer_path)

    def model_files(self, component: str) -> ModelFiles:
        files = super().model_files(component)
        return replace(files, tokenizer=Path(self.tokenizer_path)) if self.tokenizer_path else files

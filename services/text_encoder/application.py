"""The text-encoder as a server's application: loading the model, and the service around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from klein_api.v1 import stage_service_pb2, text_encoder_service_pb2_grpc
from klein_core.checkpoint.layouts import TEXT_ENCODER
from services.runtime.devices import report_memory, resolve_device, resolve_dtype, set_threads
from services.runtime.errors import StageUnavailable
from services.runtime.stage_application import Loaded, StageApplication
from services.runtime.tensors import dtype_name
from services.text_encoder.servicer import OPERATION, TextEncoderServicer
from services.text_encoder.settings import TextEncoderSettings

if TYPE_CHECKING:
    from klein_core.text_encoder.encoder import TextEncoder


class TextEncoderApplication(StageApplication):
    """One text encoder behind one worker."""

    name = "text-encoder"
    service_names = ("klein_api.v1.TextEncoderService",)
    operations = (OPERATION,)

    def __init__(self, settings: TextEncoderSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._encoder: TextEncoder | None = None

    @property
    def encoder(self) -> TextEncoder:
        """The loaded model.

        Raises:
            StageUnavailable: it is not loaded yet.
        """
        if self._encoder is None:
            raise StageUnavailable("the model is not loaded")
        return self._encoder

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        servicer = TextEncoderServicer(self.worker, self._settings.model_name, lambda: self.encoder)
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(servicer, server)

    def load_model(self) -> Loaded:
        # transformers takes seconds to import; health must answer meanwhile.
        from klein_core.text_encoder.encoder import TextEncoder

        set_threads(self._settings.threads)
        device = resolve_device(self._settings.device)
        report_memory(self.name, device)
        dtype = resolve_dtype(self._settings.dtype)
        encoder = TextEncoder.from_folder(
            self._settings.model_files(TEXT_ENCODER), device, dtype, self._settings.quantization
        )
        warm = encoder.encode([""])[0]
        self._encoder = encoder
        facts = stage_service_pb2.TextEncoderFacts(
            sequence_length=encoder.config.sequence_length,
            embedding_channels=encoder.config.embedding_channels,
        )
        return Loaded(
            device=str(device),
            dtype=dtype_name(warm.embedding.dtype),
            weights_digest=encoder.digest(),
            facts=facts,
        )

"""The text-encoder: its gRPC service and the stage that loads its model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc

from klein_api.v1 import stage_service_pb2, text_encoder_service_pb2_grpc
from klein_api.v1 import text_encoder_service_pb2 as pb
from klein_core.checkpoint.key_mapping import TEXT_ENCODER
from klein_core.errors import InvalidInput
from klein_core.params import prompt_violations
from klein_services.runtime.batching import BatchLimits, batch_limits
from klein_services.runtime.frames import FrameEnvelope
from klein_services.runtime.load_phases import IMPORT, READ_WEIGHTS, WARM_UP, phase
from klein_services.runtime.stage import Loaded, ModelService, deadline_of, duration, require_model
from klein_services.runtime.tensors import (
    dtype_name,
    host_tensor,
    report_memory,
    resolve_device,
    resolve_dtype,
    serialized_tensor_frames,
    set_threads,
)
from klein_services.runtime.urgency import urgency_of
from klein_services.runtime.watchdog import watched
from klein_services.text_encoder.settings import TextEncoderSettings

if TYPE_CHECKING:
    from klein_core.text_encoder.encoder import EncodedPrompt, TextEncoder


OPERATION = "encode-prompt"
_ENVELOPE = FrameEnvelope(pb.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)


class TextEncoderServicer(text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Implements TextEncoderService; called only while the stage serves, so its model is loaded."""

    def __init__(self, stage: TextEncoderStage) -> None:
        self._stage = stage

    async def EncodePrompt(
        self, request: pb.EncodePromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        require_model(request.model, self._stage.settings.model_name)
        urgency = urgency_of(request.priority)
        violations = list(prompt_violations("prompt", request.prompt))
        if violations:
            raise InvalidInput(violations)
        completed = await self._stage.worker.run_together(
            self._stage.encode,
            request.prompt,
            # Prompts are padded to one length, so that all have one shape.
            self._stage.batches.batch(None),
            operation=OPERATION,
            deadline=deadline_of(context),
            urgency=urgency,
        )
        summary = pb.PromptSummary(
            token_count=completed.value.token_count,
            truncated=completed.value.truncated,
            queue_duration=duration(completed.queue_seconds),
            compute_duration=duration(completed.compute_seconds),
        )
        yield pb.EncodePromptResponse(summary=summary)
        for message in serialized_tensor_frames(completed.value.embedding, _ENVELOPE):
            yield message


class TextEncoderStage(ModelService):
    """The stage: one text encoder behind one worker."""

    name = "text-encoder"
    service_names = ("klein_api.v1.TextEncoderService",)
    operations = (OPERATION,)

    def __init__(self, settings: TextEncoderSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.batches = BatchLimits()
        """Prompts that are encoded together; set by `load_model`."""
        self.encoder: TextEncoder
        """The model; set by `load_model`."""

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(
            TextEncoderServicer(self), server
        )

    def encode(self, prompts: Sequence[str]) -> list[EncodedPrompt]:
        """Returns each prompt's embedding, on the CPU."""
        with watched(OPERATION, len(prompts)):
            encoded = self.encoder.encode(prompts)
            return [replace(each, embedding=host_tensor(each.embedding)) for each in encoded]

    def load_model(self) -> Loaded:
        # transformers takes seconds to import; health must answer meanwhile.
        with phase(IMPORT):
            from klein_core.text_encoder.encoder import TextEncoder

        set_threads(self.settings.threads)
        device = resolve_device(self.settings.device)
        report_memory(self.name, device)
        dtype = resolve_dtype(self.settings.dtype)
        with phase(READ_WEIGHTS):
            encoder = TextEncoder.from_folder(
                self.settings.model_files(TEXT_ENCODER), device, dtype, self.settings.quantization
            )
        with phase(WARM_UP):
            warm = encoder.encode([""])[0]
            self.batches = batch_limits(
                self.settings,
                device.type,
                lambda count, _: host_tensor(encoder.encode([""] * count)[0].embedding),
            )
        self.encoder = encoder
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

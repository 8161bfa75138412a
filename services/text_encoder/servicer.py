"""Prompts in, embeddings out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc

from klein_api.v1 import text_encoder_service_pb2 as pb
from klein_api.v1 import text_encoder_service_pb2_grpc
from klein_core.errors import InvalidInput
from klein_core.params import prompt_violations
from services.runtime.frames import FrameEnvelope
from services.runtime.stage_application import deadline_of
from services.runtime.stages import duration, require_model
from services.runtime.tensors import host_tensor, serialised_tensor_frames
from services.runtime.worker import Completed, Worker

if TYPE_CHECKING:
    from klein_core.text_encoder.encoder import EncodedPrompt, TextEncoder

OPERATION = "encode-prompt"
_ENVELOPE = FrameEnvelope(pb.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)


class TextEncoderServicer(text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Implements TextEncoderService.

    Args:
        worker: computes.
        model_name: the name that requests may give.
        encoder: returns the loaded model.
    """

    def __init__(self, worker: Worker, model_name: str, encoder: Callable[[], TextEncoder]) -> None:
        self._worker = worker
        self._model_name = model_name
        self._encoder = encoder

    async def EncodePrompt(
        self, request: pb.EncodePromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        require_model(request.model, self._model_name)
        violations = list(prompt_violations("prompt", request.prompt))
        if violations:
            raise InvalidInput(violations)
        completed = await self._worker.run(
            lambda: self._encode(request.prompt), operation=OPERATION, deadline=deadline_of(context)
        )
        yield pb.EncodePromptResponse(summary=_summary(completed))
        for message in serialised_tensor_frames(completed.value.embedding, _ENVELOPE):
            yield message

    def _encode(self, prompt: str) -> EncodedPrompt:
        encoded = self._encoder().encode([prompt])[0]
        return replace(encoded, embedding=host_tensor(encoded.embedding))


def _summary(completed: Completed[EncodedPrompt]) -> pb.PromptSummary:
    return pb.PromptSummary(
        token_count=completed.value.token_count,
        truncated=completed.value.truncated,
        queue_duration=duration(completed.queue_seconds),
        compute_duration=duration(completed.compute_seconds),
    )

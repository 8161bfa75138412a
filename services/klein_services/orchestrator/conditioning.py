"""What an image is made from: prompts and references, encoded and relayed into the denoiser."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from klein_api.v1.text_encoder_service_pb2 import EncodePromptRequest, EncodePromptResponse, PromptSummary
from klein_api.v1.vae_decoder_service_pb2 import (
    EncodeReferenceRequest,
    EncodeReferenceResponse,
    ReferenceSpec,
    ReferenceSummary,
)
from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.cache import PROMPT_EMBEDDING, REFERENCE_LATENTS, CacheKey, TensorCache
from klein_services.orchestrator.relay import Hop
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER, StageAddress
from klein_services.orchestrator.stage_client import (
    ENCODE_PROMPT,
    ENCODE_REFERENCE,
    PUBLIC_FIELDS,
    BidiStream,
    ServerStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.timings import StageSummary, Timings
from klein_services.runtime.metrics import CACHE_REQUESTS
from klein_services.runtime.protowire import (
    as_negative_prompt_embedding,
    as_reference_latents,
    field_number,
    frame_field,
)

_CHUNK_BYTES = 1 << 20
_SUMMARY_FIELD = 1
_NEGATIVE_FIELDS = {"prompt": "negative_prompt"}


class DenoiseInput:
    """The way into the denoiser, which opens once the images' size is known."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._call: BidiStream | None = None

    def open(self, call: BidiStream) -> None:
        """Lets writers through to `call`, whose spec has been sent."""
        self._call = call
        self._opened.set()

    async def write(self, message: bytes) -> None:
        """Sends a serialized `DenoiseLatentsRequest`, once the way is open and the denoiser has room."""
        await (await self._wait()).write(message)

    async def finish(self) -> None:
        """Tells the denoiser that it has everything."""
        await (await self._wait()).done_writing()

    async def _wait(self) -> BidiStream:
        await self._opened.wait()
        if self._call is None:
            raise RuntimeError("the way into the denoiser was opened without a call")
        return self._call


@dataclass(frozen=True)
class Encoding:
    """One encoder call: how it is made and what becomes of its answer, a summary and a tensor."""

    address: StageAddress
    operation: str
    key: CacheKey
    ask: Callable[[], AbstractAsyncContextManager[ServerStream]]
    """Makes the call."""
    accept_summary: Callable[[bytes], StageSummary]
    """Takes the answer's first message."""
    forward: Callable[[bytes], bytes]
    """Turns a frame into a `DenoiseLatentsRequest`."""


class Conditioning:
    """Encodes a request's prompts and references concurrently and relays every frame as it arrives."""

    def __init__(
        self,
        request: ImageRequest,
        calls: StageClient,
        cache: TensorCache,
        timings: Timings,
        denoise_input: DenoiseInput,
    ) -> None:
        self._request = request
        self._calls = calls
        self._cache = cache
        self._timings = timings
        self._denoise_input = denoise_input
        self._undecided = len(request.references)
        self._violations: list[Violation] = []
        self._decided = asyncio.Event()
        self._first_size = asyncio.Event()
        self._keys: list[CacheKey] = []
        self.prompt_summary = PromptSummary()
        self.reference_sizes: dict[int, tuple[int, int]] = {}
        """Width and height in pixels of each reference as the model sees it, once known."""

    async def run(self) -> None:
        """Relays everything into the denoiser and closes its input."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._encode(self._prompt_encoding()))
            if self._request.params.uses_guidance:
                group.create_task(self._encode(self._negative_prompt_encoding()))
            for index, data in enumerate(self._request.references):
                group.create_task(self._encode_reference(index, data))
        await self._denoise_input.finish()

    async def first_reference_size(self) -> tuple[int, int]:
        """Waits for the first reference's processed width and height in pixels."""
        await self._first_size.wait()
        return self.reference_sizes[0]

    def forget(self) -> None:
        """Drops this request's tensors from the cache, because the denoiser would not have one of them."""
        for key in self._keys:
            self._cache.discard(key)

    def _prompt_encoding(self) -> Encoding:
        def accept(message: bytes) -> PromptSummary:
            self.prompt_summary = EncodePromptResponse.FromString(message).summary
            return self.prompt_summary

        return self._text_encoding(self._request.params.prompt, accept, lambda frame: frame, PUBLIC_FIELDS)

    def _negative_prompt_encoding(self) -> Encoding:
        return self._text_encoding(
            self._request.params.negative_prompt or "",
            lambda message: EncodePromptResponse.FromString(message).summary,
            as_negative_prompt_embedding,
            _NEGATIVE_FIELDS,
        )

    def _text_encoding(
        self,
        text: str,
        accept: Callable[[bytes], StageSummary],
        forward: Callable[[bytes], bytes],
        fields: Mapping[str, str],
    ) -> Encoding:
        address = self._request.route.text_encoder
        request = EncodePromptRequest(model=address.model, prompt=text).SerializeToString()
        version = self._request.facts.text_encoder_version
        return Encoding(
            address,
            "encode-prompt",
            CacheKey.of(PROMPT_EMBEDDING, version, text.encode()),
            lambda: self._calls.ask(address, ENCODE_PROMPT, request, fields),
            accept,
            forward,
        )

    async def _encode_reference(self, index: int, data: bytes) -> None:
        """Encodes one reference; what is wrong with it is told together with what is wrong with others."""
        try:
            version = self._request.facts.vae_decoder_version
            # Files have up to many megabytes, and hashing one must not hold up the event loop.
            key = await asyncio.to_thread(CacheKey.of, REFERENCE_LATENTS, version, data)
            await self._encode(self._reference_encoding(index, data, key))
        except InvalidInput as error:
            self._violations += error.violations
            self._decide()
            await self._decided.wait()
            raise InvalidInput(self._violations) from None

    def _reference_encoding(self, index: int, data: bytes, key: CacheKey) -> Encoding:
        address = self._request.route.vae_decoder

        def accept(message: bytes) -> ReferenceSummary:
            summary = EncodeReferenceResponse.FromString(message).summary
            self.reference_sizes[index] = (summary.width_px, summary.height_px)
            if index == 0:
                self._first_size.set()
            self._decide()
            return summary

        return Encoding(
            address,
            "encode-reference",
            key,
            lambda: self._ask_for_reference(address, f"references[{index}]", data),
            accept,
            lambda frame: as_reference_latents(index, frame),
        )

    @asynccontextmanager
    async def _ask_for_reference(
        self, address: StageAddress, field_name: str, data: bytes
    ) -> AsyncIterator[ServerStream]:
        """Sends a reference's file and gives the answer."""
        async with self._calls.open(address, ENCODE_REFERENCE) as call:
            for request in _reference_requests(address.model, field_name, data):
                await call.write(request)
            await call.done_writing()
            yield call

    def _decide(self) -> None:
        """Counts a reference that was accepted or refused; refusals are told when all are decided."""
        self._undecided -= 1
        if not self._undecided:
            self._decided.set()

    async def _encode(self, encoding: Encoding) -> None:
        self._keys.append(encoding.key)
        timing = self._timings.of(encoding.address.stage, encoding.operation)
        cached = self._cache.get(encoding.key)
        CACHE_REQUESTS.labels(encoding.key.kind, "hit" if cached else "miss").inc()
        if cached is not None:
            encoding.accept_summary(cached.summary)
            for frame in cached.frames:
                await self._denoise_input.write(encoding.forward(frame))
            return
        with timing.call():
            async with encoding.ask() as answer:
                timing.report(await self._relay(answer, encoding))

    async def _relay(self, answer: ServerStream, encoding: Encoding) -> StageSummary:
        """Passes an answer's frames on and keeps a copy for the cache."""
        summary: StageSummary | None = None
        recording = self._cache.record()
        hop = Hop(encoding.address.stage, DENOISER)
        async for message in answer.messages():
            if summary is None and field_number(message) == _SUMMARY_FIELD:
                summary = encoding.accept_summary(message)
                recording.summary = message
                continue
            frame = frame_field(message)
            if frame is None or summary is None:
                break
            hop.add(frame)
            recording.add(frame)
            await self._denoise_input.write(encoding.forward(frame))
        else:
            if summary is not None:
                hop.finish()
                self._cache.put(encoding.key, recording.finish())
                return summary
        raise StageDisagreement(
            f"{encoding.address.stage} at {encoding.address.target} did not answer with a summary and frames"
        )


def _reference_requests(model: str, field_name: str, data: bytes) -> Iterator[bytes]:
    spec = ReferenceSpec(model=model, field_name=field_name)
    yield EncodeReferenceRequest(spec=spec).SerializeToString()
    for start in range(0, len(data), _CHUNK_BYTES):
        yield EncodeReferenceRequest(image_chunk=data[start : start + _CHUNK_BYTES]).SerializeToString()

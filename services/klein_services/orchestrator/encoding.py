"""Encoder of a request's inputs, whose tensors are relayed into the denoiser, and the cache of those tensors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from itertools import chain

from klein_api.v1.text_encoder_service_pb2 import EncodePromptRequest, EncodePromptResponse, PromptSummary
from klein_api.v1.vae_decoder_service_pb2 import (
    EncodeInitialImageRequest,
    EncodeInitialImageResponse,
    EncodeReferenceRequest,
    EncodeReferenceResponse,
    InitialImageSpec,
    ReferenceSpec,
)
from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER, StageAddress
from klein_services.orchestrator.stage_client import (
    ENCODE_INITIAL_IMAGE,
    ENCODE_PROMPT,
    ENCODE_REFERENCE,
    PUBLIC_FIELDS,
    BidiStream,
    ServerStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.tensor_cache import (
    INITIAL_IMAGE,
    PROMPT_EMBEDDING,
    REFERENCE_LATENTS,
    CacheKey,
    TensorCache,
)
from klein_services.orchestrator.timings import Timings, TransferMetrics
from klein_services.runtime import semantic_conventions as names
from klein_services.runtime import tracing
from klein_services.runtime.metrics import CACHE_REQUESTS
from klein_services.runtime.protowire import (
    FileChunks,
    as_initial_image_part,
    as_negative_prompt_embedding,
    as_reference_latents,
    field_number,
    frame_field,
)

_SUMMARY_FIELD = 1
_TENSOR_FIELDS = (2,)
_INITIAL_IMAGE_FIELDS = (
    EncodeInitialImageResponse.INITIAL_LATENTS_FIELD_NUMBER,
    EncodeInitialImageResponse.MASK_FIELD_NUMBER,
)
_NEGATIVE_FIELDS = {"prompt": "negative_prompt"}
_INITIAL_IMAGE_NAMES = {name: name for name in ("initial_image", "mask", "mask_padding_px", "expand")}
"""Public names of the fields of an initial image's encoding."""
_REFERENCE_CHUNKS = FileChunks(EncodeReferenceRequest.IMAGE_CHUNK_FIELD_NUMBER)
_IMAGE_CHUNKS = FileChunks(EncodeInitialImageRequest.IMAGE_CHUNK_FIELD_NUMBER)
_MASK_CHUNKS = FileChunks(EncodeInitialImageRequest.MASK_CHUNK_FIELD_NUMBER)
_INITIAL_INDEX = -1
"""Index of the initial image among a request's input images; the model sees it before the first reference."""

_OpenCall = Callable[[], AbstractAsyncContextManager[ServerStream]]
_ImageResponseClass = type[EncodeReferenceResponse] | type[EncodeInitialImageResponse]
_ResponseClass = type[EncodePromptResponse] | _ImageResponseClass


class InputEncoder:
    """Encodes a request's prompts and images concurrently and relays every frame as it arrives.

    Begins when the denoiser has admitted the request, so that a request that is refused costs no other stage anything.
    Only the image that decides an unknown size is encoded before, because the denoiser admits requests by their size.

    Args:
        request: the validated request.
        stages: makes the calls.
        cache: responses that are reused, and where new ones are kept.
        timings: where calls are counted.
        denoiser: the denoiser's call, set once it has admitted the request.
        size_is_known: whether the size of the images needs no input image.
    """

    def __init__(
        self,
        request: ImageRequest,
        stages: StageClient,
        cache: TensorCache,
        timings: Timings,
        denoiser: asyncio.Future[BidiStream],
        *,
        size_is_known: bool,
    ) -> None:
        self._request = request
        self._stages = stages
        self._cache = cache
        self._timings = timings
        self._denoiser = denoiser
        self._size_is_known = size_is_known
        self._undecided = len(request.references) + (request.masked_edit is not None)
        self._sizes: dict[int, tuple[int, int]] = {}
        """Width and height in pixels of each input image as the model sees it, once known."""
        self._violations: list[Violation] = []
        self._all_decided = asyncio.Event()
        self._size_decided = asyncio.Event()
        """Set when the image that decides the size is accepted or refused."""
        self._keys: list[CacheKey] = []
        self.prompt_summary = PromptSummary()

    async def run(self) -> None:
        """Relays everything into the denoiser and closes its input."""
        params, images = self._request.params, list(range(len(self._request.references)))
        if self._request.masked_edit is not None:
            images.append(_INITIAL_INDEX)
        async with asyncio.TaskGroup() as group:
            if not self._size_is_known:
                images.remove(self._deciding_index)
                group.create_task(self._encode_image(self._deciding_index))
                await self._size_decided.wait()
            # A request whose first image is refused ends here; the others are encoded to find all that are bad.
            if not self._violations:
                await asyncio.shield(self._denoiser)
                group.create_task(self._encode_prompt(params.prompt))
                if params.uses_guidance:
                    group.create_task(self._encode_prompt(params.negative_prompt or "", is_negative=True))
            for index in images:
                group.create_task(self._encode_image(index))
        await (await asyncio.shield(self._denoiser)).done_writing()

    async def image_size(self) -> tuple[int, int]:
        """Waits for the processed width and height in pixels of the input image that decides the size.

        Never returns when that image is refused: then `run` raises.
        """
        await self._size_decided.wait()
        if self._deciding_index not in self._sizes:
            await asyncio.Event().wait()
        return self._sizes[self._deciding_index]

    @property
    def pixel_count(self) -> int:
        """Pixels of all input images as the model sees them, so far."""
        return sum(width_px * height_px for width_px, height_px in self._sizes.values())

    @property
    def _deciding_index(self) -> int:
        return 0 if self._request.masked_edit is None else _INITIAL_INDEX

    def discard_cached(self) -> None:
        """Drops this request's tensors from the cache, because the denoiser refused one of them."""
        for key in self._keys:
            self._cache.discard(key)

    async def _encode_prompt(self, text: str, *, is_negative: bool = False) -> None:
        address = self._request.route.text_encoder
        request = EncodePromptRequest(
            model=address.model, prompt=text, priority=self._request.priority
        ).SerializeToString()
        fields = _NEGATIVE_FIELDS if is_negative else PUBLIC_FIELDS
        messages = self._response(
            CacheKey.of(PROMPT_EMBEDDING, self._request.info.text_encoder_version, text.encode()),
            address,
            "encode-prompt",
            EncodePromptResponse,
            lambda: self._stages.unary_stream(address, ENCODE_PROMPT, request, fields),
        )
        async with aclosing(messages):
            summary = EncodePromptResponse.FromString(await anext(messages)).summary
            if not is_negative:
                self.prompt_summary = summary
            async for frame in messages:
                await self._send(as_negative_prompt_embedding(frame) if is_negative else frame)

    async def _encode_image(self, index: int) -> None:
        if index == _INITIAL_INDEX and self._request.masked_edit is not None:
            await self._encode_initial_image(self._request.masked_edit)
        else:
            await self._encode_reference(index, self._request.references[index])

    async def _encode_reference(self, index: int, data: bytes) -> None:
        address = self._request.route.vae_decoder
        # Files have up to many megabytes, and hashing one must not hold up the event loop.
        version = self._request.info.vae_decoder_version
        key = await asyncio.to_thread(CacheKey.of, REFERENCE_LATENTS, version, data)
        spec = EncodeReferenceRequest(
            spec=ReferenceSpec(
                model=address.model,
                field_name=f"references[{index}]",
                priority=self._request.priority,
            )
        ).SerializeToString()
        messages = self._response(
            key,
            address,
            "encode-reference",
            EncodeReferenceResponse,
            lambda: self._upload(address, ENCODE_REFERENCE, chain([spec], _REFERENCE_CHUNKS.messages(data))),
        )
        await self._relay_image(
            index, EncodeReferenceResponse, messages, lambda frame: as_reference_latents(index, frame)
        )

    async def _encode_initial_image(self, edit: MaskedEdit) -> None:
        address = self._request.route.vae_decoder
        options = edit.inpainting.SerializeToString(deterministic=True)
        files = [edit.initial_image] if edit.mask is None else [edit.initial_image, edit.mask]
        version = self._request.info.vae_decoder_version
        key = await asyncio.to_thread(CacheKey.of, INITIAL_IMAGE, version, options, *files)
        spec = EncodeInitialImageRequest(
            spec=InitialImageSpec(
                model=address.model, inpainting=edit.inpainting, priority=self._request.priority
            )
        ).SerializeToString()
        messages = self._response(
            key,
            address,
            "encode-initial-image",
            EncodeInitialImageResponse,
            lambda: self._upload(
                address,
                ENCODE_INITIAL_IMAGE,
                chain([spec], edit.files(_IMAGE_CHUNKS, _MASK_CHUNKS)),
                _INITIAL_IMAGE_NAMES,
            ),
            _INITIAL_IMAGE_FIELDS,
        )
        await self._relay_image(_INITIAL_INDEX, EncodeInitialImageResponse, messages, as_initial_image_part)

    async def _relay_image(
        self,
        index: int,
        response_class: _ImageResponseClass,
        messages: AsyncGenerator[bytes, None],
        denoiser_message: Callable[[bytes], bytes],
    ) -> None:
        """Relays an image's tensors. If it is refused, waits for the others so that the error names every bad one."""
        try:
            async with aclosing(messages):
                summary = response_class.FromString(await anext(messages)).summary
                self._sizes[index] = (summary.width_px, summary.height_px)
                if index == self._deciding_index:
                    self._size_decided.set()
                self._decide()
                async for frame in messages:
                    await self._send(denoiser_message(frame))
        except InvalidInput as error:
            self._violations += error.violations
            self._size_decided.set()
            self._decide()
            await self._all_decided.wait()
            raise InvalidInput(self._violations) from None

    def _decide(self) -> None:
        """Counts an input image that was accepted or refused."""
        self._undecided -= 1
        if not self._undecided:
            self._all_decided.set()

    async def _send(self, message: bytes) -> None:
        """Sends a serialized `DenoiseLatentsRequest`, once the denoiser's call is open and it has room."""
        # Without the shield, cancelling one of the waiting tasks would cancel the future for all of them.
        await (await asyncio.shield(self._denoiser)).write_frame(message)

    def _response(
        self,
        key: CacheKey,
        address: StageAddress,
        operation: str,
        response_class: _ResponseClass,
        open_call: _OpenCall,
        tensor_fields: tuple[int, ...] = _TENSOR_FIELDS,
    ) -> AsyncGenerator[bytes, None]:
        """Yields an encoder's summary message and then its frames; shares the call with requests for the same tensor.

        Only with those of the same priority: an urgent request must not wait where others do.
        """
        self._keys.append(key)
        flights, shared_key = self._cache.flights, (key, self._request.priority)
        if flights.is_running(shared_key):
            _count_lookup(key, "hit")
        return flights.messages(
            shared_key,
            lambda: self._own_response(key, address, operation, response_class, open_call, tensor_fields),
        )

    async def _own_response(
        self,
        key: CacheKey,
        address: StageAddress,
        operation: str,
        response_class: _ResponseClass,
        open_call: _OpenCall,
        tensor_fields: tuple[int, ...],
    ) -> AsyncGenerator[bytes, None]:
        """Yields an encoder's summary message and then its frames, from the cache or from a call."""
        timing = self._timings.of(address.stage, operation)
        cached = self._cache.get(key)
        _count_lookup(key, "hit" if cached else "miss")
        if cached is not None:
            yield cached.summary
            for frame in cached.frames:
                yield frame
            return
        summary: bytes | None = None
        writer = self._cache.writer(key)
        transfer = TransferMetrics(address.stage, DENOISER)
        with timing.call(), self._stages.backlog.call(address, operation) as work:
            work.begin()
            async with open_call() as call:
                async for message in call.messages():
                    if summary is None and field_number(message) == _SUMMARY_FIELD:
                        yield (summary := message)
                        continue
                    received = frame_field(message, tensor_fields)
                    if received is None or summary is None:
                        raise _no_tensor(address)
                    transfer.add(received)
                    writer.add(received)
                    yield received
        if summary is None:
            raise _no_tensor(address)
        transfer.finish()
        writer.commit(summary)
        work.measured(timing.report(response_class.FromString(summary).summary))

    @asynccontextmanager
    async def _upload(
        self,
        address: StageAddress,
        method: str,
        messages: Iterable[bytes],
        fields: Mapping[str, str] = PUBLIC_FIELDS,
    ) -> AsyncIterator[ServerStream]:
        """Opens a call and sends its serialized messages: the spec, then the files."""
        async with self._stages.stream_stream(address, method, fields) as call:
            for message in messages:
                await call.write(message)
            await call.done_writing()
            yield call


def _no_tensor(address: StageAddress) -> StageDisagreement:
    return StageDisagreement(f"{address.stage} at {address.target} did not answer with a summary and frames")


def _count_lookup(key: CacheKey, outcome: str) -> None:
    CACHE_REQUESTS.labels(key.kind, outcome).inc()
    attributes = {names.KLEIN_CACHE_KIND: key.kind, names.KLEIN_CACHE_OUTCOME: outcome}
    tracing.add_event(names.CACHE_LOOKUP, attributes)

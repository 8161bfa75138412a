"""Takes the frames of several tensors, in any order of tensors, and refuses what was not expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klein_api.v1 import denoiser_service_pb2, image_pb2, tensor_pb2
from klein_core.errors import InvalidInput, Violation
from klein_core.params import DEFAULT_LIMITS, AdapterChoice, GenerationParams, Limits
from klein_core.variants import default_step_count
from klein_services.denoiser.job import Urgency
from klein_services.runtime.frames import FrameReader
from klein_services.runtime.stage import require_model
from klein_services.runtime.tensors import check_spec, frames_tensor

WIDEST_ELEMENT_BYTES = 4
"""So that a wrong element type is refused for what it is and not for its size."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One tensor that must come."""

    field: str
    shape: tuple[int | None, ...]
    """Extents, `None` for any; the last is channels."""
    rows_limit: int
    """Most vectors of channels, the product of all other extents; shared by all of a `pool`."""
    dtype: torch.dtype
    pool: str = ""
    like: str = ""
    """Another tensor that must have the same shape."""


class TensorIntake:
    """The tensors of one request while they arrive."""

    def __init__(self, expectations: Sequence[Expectation]) -> None:
        self._expected = {expectation.field: expectation for expectation in expectations}
        self._readers = {
            field: FrameReader(field, limit_bytes=_limit_bytes(expectation))
            for field, expectation in self._expected.items()
        }

    def add(self, field: str, frame: tensor_pb2.TensorFrame) -> None:
        """Takes a frame of the tensor `field`.

        Raises:
            InvalidInput: nobody asked for that tensor, or the frame does not fit.
        """
        reader = self._readers.get(field)
        if reader is None:
            raise InvalidInput.of(
                field, f"is not expected with this spec; expected: {', '.join(self._expected)}"
            )
        reader.add(frame)
        if frame.HasField("spec"):
            self._check_shape(self._expected[field], reader)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns all tensors by field. Reads every element, so call it off the event loop.

        Raises:
            InvalidInput: tensors are missing, incomplete or hold NaN or infinity; names all of them.
        """
        violations: list[Violation] = []
        made: dict[str, Tensor] = {}
        for field, reader in self._readers.items():
            try:
                made[field] = _finite_tensor(reader, dtype)
            except InvalidInput as error:
                violations += error.violations
        if violations:
            raise InvalidInput(violations)
        return made

    def _check_shape(self, expectation: Expectation, reader: FrameReader) -> None:
        check_spec(reader, shape=expectation.shape, dtypes=(expectation.dtype,))
        others = [
            self._readers[field].spec.shape
            for field, other in self._expected.items()
            if expectation.pool and other.pool == expectation.pool and self._has_spec(field)
        ]
        rows = sum(math.prod(shape[:-1]) for shape in others or [reader.spec.shape])
        if rows > expectation.rows_limit:
            name = expectation.pool or expectation.field
            raise InvalidInput.of(name, f"has {rows} tokens; at most {expectation.rows_limit} are allowed")
        self._check_likeness(expectation)

    def _check_likeness(self, arrived: Expectation) -> None:
        """Compares the pair that the new tensor completes, whichever of the two came first."""
        for field, expectation in self._expected.items():
            pair = (field, expectation.like)
            if expectation.like and arrived.field in pair and all(self._has_spec(name) for name in pair):
                own, other = (self._readers[name].spec.shape for name in pair)
                if own != other:
                    raise InvalidInput.of(
                        field, f"has shape {list(own)}; {expectation.like} has {list(other)}"
                    )

    def _has_spec(self, field: str) -> bool:
        return self._readers[field].has_spec


def _limit_bytes(expectation: Expectation) -> int:
    return expectation.rows_limit * (expectation.shape[-1] or 1) * WIDEST_ELEMENT_BYTES


def _finite_tensor(reader: FrameReader, dtype: torch.dtype) -> Tensor:
    tensor = frames_tensor(reader, dtypes=(dtype,))
    if not torch.isfinite(tensor).all():
        raise InvalidInput.of(reader.field, "holds NaN or infinity; all elements must be finite")
    return tensor


_PROTO_NAMES = {"seed": "seeds", "image_count": "seeds", "references": "reference_count"}
"""Names of `GenerationParams`' violations → fields of DenoiseSpec."""
_URGENCIES = {
    image_pb2.PRIORITY_UNSPECIFIED: Urgency.STANDARD,
    image_pb2.PRIORITY_INTERACTIVE: Urgency.INTERACTIVE,
    image_pb2.PRIORITY_STANDARD: Urgency.STANDARD,
    image_pb2.PRIORITY_BATCH: Urgency.BATCH,
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What requests are checked against."""

    name: str
    is_distilled: bool
    embedding_channels: int
    latent_channels: int
    dtype: torch.dtype
    weights_digest: str = ""
    """See `klein_core.checkpoint.weights`."""
    cached_token_bytes: int = 0
    """What a reference token's cached keys and values take; 0 where the model takes references as tokens."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask."""

    image_count: int
    reference_count: int
    reference_tokens: int
    text_tokens: int
    adapter_count: int = DEFAULT_LIMITS.adapter_count


@dataclass(frozen=True, kw_only=True)
class Order:
    """A valid DenoiseSpec, defaults filled in."""

    params: GenerationParams
    urgency: Urgency
    preview_interval_steps: int
    checkpoint_interval_steps: int
    resume_step: int


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """A request's tensors, in the model's dtype."""

    prompt_embedding: Tensor
    """(text tokens, embedding channels)"""
    negative_prompt_embedding: Tensor | None
    references: tuple[Tensor, ...]
    """(rows, columns, latent channels) each"""
    resume_latents: tuple[Tensor, ...]
    """(rows, columns, latent channels) for each seed; empty without a resume step"""


def read_order(spec: denoiser_service_pb2.DenoiseSpec, model: Model, limits: RequestLimits) -> Order:
    """Checks a whole spec.

    Raises:
        UnknownModel: it names another model.
        InvalidInput: fields are outside their limits; names all of them.
    """
    require_model(spec.model, model.name)
    violations: list[Violation] = []
    try:
        params = _params(spec, model, limits)
    except InvalidInput as error:
        violations += [Violation(_PROTO_NAMES.get(v.field, v.field), v.description) for v in error.violations]
    violations += _own_violations(spec, model)
    if violations:
        raise InvalidInput(violations)
    return Order(
        params=params,
        urgency=_URGENCIES[spec.priority],
        preview_interval_steps=spec.preview_interval_steps,
        checkpoint_interval_steps=spec.checkpoint_interval_steps,
        resume_step=spec.resume_step,
    )


class RequestReader:
    """Takes the parts of one request in any order that the API allows.

    Args:
        model: what the tensors must fit.
        limits: what a request may ask.
        on_order: called with the valid spec before any tensor is taken; may refuse by raising.
    """

    def __init__(self, model: Model, limits: RequestLimits, on_order: Callable[[Order], None]) -> None:
        self._model = model
        self._limits = limits
        self._on_order = on_order
        self._order: Order | None = None
        self._intake = TensorIntake([])

    def accept(self, request: denoiser_service_pb2.DenoiseLatentsRequest) -> None:
        """Takes the next part.

        Raises:
            UnknownModel, InvalidInput: the part is wrong or not expected.
        """
        part = request.WhichOneof("part")
        if part == "spec":
            self._begin(request.spec)
        elif self._order is None:
            raise InvalidInput.of("spec", f"must come first, before {part or 'an empty part'}")
        elif part is None:
            raise InvalidInput.of("part", "is not set; this server knows no other part than those of its API")
        else:
            self._intake.add(*_named_frame(request, part))

    def finish(self) -> Conditioning:
        """Returns the tensors; checks and copies them, so call it off the event loop.

        Raises:
            InvalidInput: tensors are missing, incomplete or hold NaN or infinity; names all of them.
        """
        if self._order is None:
            raise InvalidInput.of("spec", "is missing: the stream ended before its first part")
        params, resume_step = self._order.params, self._order.resume_step
        tensors = self._intake.tensors(self._model.dtype)
        # They are copies; the frames would be held, and counted nowhere, for as long as the call lasts.
        self._intake = TensorIntake([])
        return Conditioning(
            prompt_embedding=tensors["prompt_embedding"],
            negative_prompt_embedding=tensors.get("negative_prompt_embedding"),
            references=tuple(tensors[f"reference_latents[{i}]"] for i in range(params.reference_count)),
            resume_latents=tuple(
                tensors[f"resume_latents[{i}]"] for i in range(len(params.seeds) if resume_step else 0)
            ),
        )

    def _begin(self, spec: denoiser_service_pb2.DenoiseSpec) -> None:
        if self._order is not None:
            raise InvalidInput.of("spec", "comes twice; a request has one")
        order = read_order(spec, self._model, self._limits)
        self._on_order(order)
        self._order = order
        self._intake = TensorIntake(list(_expectations(order, self._model, self._limits)))


def _params(spec: denoiser_service_pb2.DenoiseSpec, model: Model, limits: RequestLimits) -> GenerationParams:
    return GenerationParams(
        width_px=spec.width_px,
        height_px=spec.height_px,
        is_distilled=model.is_distilled,
        seeds=tuple(spec.seeds),
        step_count=spec.step_count if spec.HasField("step_count") else None,
        guidance_scale=spec.guidance_scale if spec.HasField("guidance_scale") else None,
        reference_count=spec.reference_count,
        adapters=tuple(
            AdapterChoice(adapter.name, adapter.scale if adapter.HasField("scale") else 1.0)
            for adapter in spec.adapters
        ),
        limits=Limits(
            reference_count=limits.reference_count,
            image_count=limits.image_count,
            adapter_count=limits.adapter_count,
        ),
    )


def _own_violations(spec: denoiser_service_pb2.DenoiseSpec, model: Model) -> Iterator[Violation]:
    """What `GenerationParams` does not know of."""
    for name in ("preview_interval_steps", "checkpoint_interval_steps"):
        if getattr(spec, name) < 0:
            yield Violation(name, f"is {getattr(spec, name)}; must be at least 0, and 0 means none")
    default = default_step_count(model.is_distilled)
    step_count = spec.step_count if spec.HasField("step_count") else default
    if spec.resume_step and not 0 < spec.resume_step < step_count:
        yield Violation("resume_step", f"is {spec.resume_step}; must be in [0, {step_count - 1}]")
    if spec.priority not in _URGENCIES:
        known = ", ".join(image_pb2.Priority.Name(number) for number in _URGENCIES)
        yield Violation("priority", f"is {spec.priority}; must be one of {known}")


def _expectations(order: Order, model: Model, limits: RequestLimits) -> Iterator[Expectation]:
    params = order.params
    embedding = (None, model.embedding_channels)
    image = (params.rows, params.columns, model.latent_channels)
    prompt = Expectation(
        field="prompt_embedding", shape=embedding, rows_limit=limits.text_tokens, dtype=model.dtype
    )
    yield prompt
    if params.uses_guidance:
        yield replace(prompt, field="negative_prompt_embedding", like="prompt_embedding")
    for index in range(params.reference_count):
        yield Expectation(
            field=f"reference_latents[{index}]",
            shape=(None, None, model.latent_channels),
            rows_limit=limits.reference_tokens,
            dtype=model.dtype,
            pool="reference_latents",
        )
    for index in range(len(params.seeds) if order.resume_step else 0):
        yield Expectation(
            field=f"resume_latents[{index}]",
            shape=image,
            rows_limit=params.rows * params.columns,
            dtype=model.dtype,
        )


def _named_frame(
    request: denoiser_service_pb2.DenoiseLatentsRequest, part: str
) -> tuple[str, tensor_pb2.TensorFrame]:
    value = getattr(request, part)
    if isinstance(value, denoiser_service_pb2.IndexedTensorFrame):
        return f"{part}[{value.index}]", value.frame
    return part, value

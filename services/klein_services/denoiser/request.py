"""Request: validation of the spec to `DenoiseParams`, and assembly of the tensors that follow it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klein_api.v1 import denoiser_service_pb2, image_pb2
from klein_core.denoiser.inpainting import first_step
from klein_core.denoiser.sampler import received
from klein_core.errors import InvalidInput, Violation
from klein_core.params import DEFAULT_LIMITS, AdapterChoice, GenerationParams, Limits
from klein_core.variants import PUBLISHED_SCHEDULE, NoiseSchedule, default_step_count
from klein_services.runtime.frames import FrameReader
from klein_services.runtime.stage import require_model
from klein_services.runtime.tensors import check_spec, frames_tensor
from klein_services.runtime.urgency import URGENCIES, Urgency

_LARGEST_ELEMENT_BYTES = 4
"""Size of the largest element that is sent, float32, for limits that hold before a tensor's type is known."""
_PROTO_NAMES = {"seed": "seeds", "image_count": "seeds", "references": "reference_count"}
"""Fields in `GenerationParams`' violations → fields of DenoiseSpec."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Facts of the loaded model that requests are validated against."""

    name: str
    is_distilled: bool
    embedding_channels: int
    latent_channels: int
    dtype: torch.dtype
    weights_digest: str = ""
    """See `klein_core.checkpoint.weights`."""
    cached_token_bytes: int = 0
    """Bytes of one reference token's cached keys and values; 0 if the model does not cache references."""
    schedule: NoiseSchedule = PUBLISHED_SCHEDULE


@dataclass(frozen=True, kw_only=True)
class DenoiseLimits:
    """Limits of a single request."""

    image_count: int
    reference_count: int
    reference_tokens: int
    text_tokens: int
    adapter_count: int = DEFAULT_LIMITS.adapter_count


@dataclass(frozen=True, kw_only=True)
class DenoiseParams:
    """A validated DenoiseSpec with defaults filled in."""

    generation: GenerationParams
    urgency: Urgency
    preview_interval_steps: int
    checkpoint_interval_steps: int
    resume_step: int
    strength: float | None
    """Share of the steps that are run on an initial image; `None` without one."""
    first_step: int
    """Steps of the schedule that are not run: those before `resume_step`, or those that `strength` leaves out."""

    @property
    def initial_tokens(self) -> int:
        """Tokens of the initial image, which is as large as the images that are made."""
        return 0 if self.strength is None else self.generation.rows * self.generation.columns


@dataclass(frozen=True, kw_only=True)
class RequestTensors:
    """A request's tensors in host memory, cast to the model's dtype."""

    prompt_embedding: Tensor
    """(text tokens, embedding channels)"""
    negative_prompt_embedding: Tensor | None
    references: tuple[Tensor, ...]
    """(rows, columns, latent channels) each; those of the initial image, if there is one, come first"""
    mask: Tensor | None
    """(rows, columns, 1), in [0, 1]: 1 is made anew. `None` without an initial image."""
    resume_latents: tuple[Tensor, ...]
    """(rows, columns, latent channels) for each seed; empty without a resume step"""


def parse_spec(
    spec: denoiser_service_pb2.DenoiseSpec, model: ServedModel, limits: DenoiseLimits
) -> DenoiseParams:
    """Validates a spec and returns its parameters.

    Raises:
        UnknownModel: the spec names a model other than the served one.
        InvalidInput: fields are outside their limits; lists all violations.
    """
    require_model(spec.model, model.name)
    violations: list[Violation] = []
    try:
        generation = GenerationParams(
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
    except InvalidInput as error:
        violations += [Violation(_PROTO_NAMES.get(v.field, v.field), v.description) for v in error.violations]
    violations += _denoiser_violations(spec, model)
    if violations:
        raise InvalidInput(violations)
    strength = spec.strength if spec.HasField("strength") else None
    left_out = 0 if strength is None else first_step(generation.steps, strength)
    return DenoiseParams(
        generation=generation,
        urgency=URGENCIES[spec.priority],
        preview_interval_steps=spec.preview_interval_steps,
        checkpoint_interval_steps=spec.checkpoint_interval_steps,
        resume_step=spec.resume_step,
        strength=strength,
        first_step=spec.resume_step or left_out,
    )


def _denoiser_violations(spec: denoiser_service_pb2.DenoiseSpec, model: ServedModel) -> Iterator[Violation]:
    """Yields violations of the fields that are not in `GenerationParams`."""
    for name in ("preview_interval_steps", "checkpoint_interval_steps"):
        if getattr(spec, name) < 0:
            yield Violation(name, f"is {getattr(spec, name)}; must be at least 0, and 0 means none")
    default = default_step_count(model.is_distilled)
    step_count = spec.step_count if spec.HasField("step_count") else default
    left_out = 0
    if spec.HasField("strength"):
        try:
            left_out = first_step(max(step_count, 1), spec.strength)
        except InvalidInput as error:
            yield from error.violations
    if spec.resume_step and not max(left_out, 1) <= spec.resume_step < step_count:
        allowed = f"0 or in [{left_out}, {step_count - 1}]" if left_out else f"in [0, {step_count - 1}]"
        yield Violation("resume_step", f"is {spec.resume_step}; must be {allowed}")
    if spec.priority not in URGENCIES:
        known = ", ".join(image_pb2.Priority.Name(number) for number in URGENCIES)
        yield Violation("priority", f"is {spec.priority}; must be one of {known}")


@dataclass(frozen=True, kw_only=True)
class ExpectedTensor:
    """One tensor that a request must send."""

    field: str
    shape: tuple[int | None, ...]
    """Extents; `None` allows any, except for the last, which is channels."""
    token_limit: int
    """Most vectors of channels (product of the other extents), in total over all tensors of one `pool`."""
    pool: str = ""
    same_shape_as: str = ""
    """Field of another tensor that must have the same shape."""


class TensorReader:
    """Assembles a request's tensors from their frames.

    Tensors may have any element type that is sent; they are cast to the model's. The frames of different tensors may be
    interleaved in any order. Shapes are checked as soon as a tensor's first
    frame arrives, so a request that is too large is refused before it takes memory.
    """

    def __init__(self, params: DenoiseParams, model: ServedModel, limits: DenoiseLimits) -> None:
        self._params = params
        self._dtype = model.dtype
        self._expected = {tensor.field: tensor for tensor in _expected_tensors(params, model, limits)}
        self._readers = {
            field: FrameReader(
                field, limit_bytes=tensor.token_limit * (tensor.shape[-1] or 1) * _LARGEST_ELEMENT_BYTES
            )
            for field, tensor in self._expected.items()
        }

    def add(self, part: denoiser_service_pb2.DenoiseLatentsRequest) -> None:
        """Adds a part that carries a frame.

        Raises:
            InvalidInput: the request has no such tensor, or the frame does not fit it.
        """
        field = str(part.WhichOneof("part"))
        frame = getattr(part, field)
        if isinstance(frame, denoiser_service_pb2.IndexedTensorFrame):
            field, frame = f"{field}[{frame.index}]", frame.frame
        reader = self._readers.get(field)
        if reader is None:
            raise InvalidInput.of(
                field, f"is not expected with this spec; expected: {', '.join(self._expected)}"
            )
        reader.add(frame)
        if frame.HasField("spec"):
            self._check_shape(self._expected[field], reader)

    def require_complete(self) -> None:
        """Checks that every tensor has arrived; cheap, unlike `tensors`.

        Raises:
            InvalidInput: tensors are missing or incomplete, as also when the call was cancelled; lists all of them.
        """
        violations: list[Violation] = []
        for reader in self._readers.values():
            try:
                reader.require_finished()
            except InvalidInput as error:
                violations += error.violations
        if violations:
            raise InvalidInput(violations)

    def tensors(self) -> RequestTensors:
        """Returns all tensors. Copies, casts and checks every element: call it off the event loop.

        Raises:
            InvalidInput: tensors are missing, incomplete, or hold NaN, infinity or values that the model's dtype
                cannot hold; lists all violations.
        """
        violations: list[Violation] = []
        tensors: dict[str, Tensor] = {}
        for field, reader in self._readers.items():
            try:
                tensors[field] = received(frames_tensor(reader), self._dtype, field)
            except InvalidInput as error:
                violations += error.violations
                continue
            if field == "mask" and not 0 <= tensors[field].min() <= tensors[field].max() <= 1:
                violations.append(Violation(field, "holds elements outside [0, 1]"))
        if violations:
            raise InvalidInput(violations)
        generation = self._params.generation
        resume_count = len(generation.seeds) if self._params.resume_step else 0
        references = [tensors[f"reference_latents[{i}]"] for i in range(generation.reference_count)]
        if self._params.strength is not None:
            references.insert(0, tensors["initial_latents"])
        return RequestTensors(
            prompt_embedding=tensors["prompt_embedding"],
            negative_prompt_embedding=tensors.get("negative_prompt_embedding"),
            references=tuple(references),
            mask=tensors.get("mask"),
            resume_latents=tuple(tensors[f"resume_latents[{i}]"] for i in range(resume_count)),
        )

    def _check_shape(self, expected: ExpectedTensor, reader: FrameReader) -> None:
        """Checks a tensor whose spec has just arrived."""
        check_spec(reader, shape=expected.shape)
        shapes = {field: each.spec.shape for field, each in self._readers.items() if each.has_spec}
        pooled = [
            shape
            for field, shape in shapes.items()
            if field == expected.field or (expected.pool and self._expected[field].pool == expected.pool)
        ]
        tokens = sum(math.prod(shape[:-1]) for shape in pooled)
        if tokens > expected.token_limit:
            name = expected.pool or expected.field
            included = ", those of initial_latents included" if "initial_latents" in self._expected else ""
            description = f"has {tokens} tokens{included}; at most {expected.token_limit} are allowed"
            raise InvalidInput.of(name, description)
        # Compared when the second of the two arrives, whichever that is.
        for field, tensor in self._expected.items():
            other = tensor.same_shape_as
            if other and field in shapes and other in shapes and shapes[field] != shapes[other]:
                raise InvalidInput.of(
                    field, f"has shape {list(shapes[field])}; {other} has {list(shapes[other])}"
                )


def _expected_tensors(
    params: DenoiseParams, model: ServedModel, limits: DenoiseLimits
) -> Iterator[ExpectedTensor]:
    generation = params.generation
    prompt = ExpectedTensor(
        field="prompt_embedding",
        shape=(None, model.embedding_channels),
        token_limit=limits.text_tokens,
    )
    yield prompt
    if generation.uses_guidance:
        yield replace(prompt, field="negative_prompt_embedding", same_shape_as="prompt_embedding")
    reference = ExpectedTensor(
        field="reference_latents",
        shape=(None, None, model.latent_channels),
        token_limit=limits.reference_tokens,
        pool="reference_latents",
    )
    for index in range(generation.reference_count):
        yield replace(reference, field=f"reference_latents[{index}]")
    image = ExpectedTensor(
        field="resume_latents",
        shape=(generation.rows, generation.columns, model.latent_channels),
        token_limit=generation.rows * generation.columns,
    )
    for index in range(len(generation.seeds) if params.resume_step else 0):
        yield replace(image, field=f"resume_latents[{index}]")
    if params.strength is not None:
        # The initial image is the first reference, too.
        yield replace(reference, field="initial_latents", shape=image.shape)
        mask_shape = (generation.rows, generation.columns, 1)
        yield replace(image, field="mask", shape=mask_shape)

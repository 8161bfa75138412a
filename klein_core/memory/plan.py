"""Which parts of a model fit a device, in which precision, at given sizes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from klein_core.memory import autoencoder, text_encoder, transformer
from klein_core.memory.precision import PRECISIONS, Precision
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

TEXT_ENCODER, DENOISER, VAE_DECODER = STAGES = ("text-encoder", "denoiser", "vae-decoder")
REFERENCE_PX = 1024 * 1024
"""Pixels of the largest reference after it was fitted."""
PROCESS_BYTES = 512 << 20
"""What a process takes on a GPU before any tensor: the driver's context, kernels, the libraries' workspaces."""


@dataclass(frozen=True)
class PlannedModel:
    """What a plan has to know of a model."""

    name: str
    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig
    is_distilled: bool = True
    uses_reference_cache: bool = False
    plain: str = "bf16"
    """What it computes in, and what is never quantized is kept in: bf16 or fp32."""
    text_stored: str = "bf16"
    """Precision of the text encoder's matrices as its files have them."""
    transformer_stored: str = "bf16"
    """The same of the transformer's blocks."""
    published: Sequence[str] = ()
    """Other precisions in which the transformer is published as a file."""

    def in_precision(self, name: str) -> Precision:
        """Returns a precision of this model's weights, with what it computes in."""
        return replace(PRECISIONS[name], value_bytes=PRECISIONS[self.plain].value_bytes)

    def has_file(self, precision: str) -> bool:
        """Whether the transformer is had in this precision by its file, not by quantizing at load."""
        return precision == self.transformer_stored or precision in self.published


@dataclass(frozen=True)
class Workload:
    """The largest that is asked for at once."""

    sizes_px: tuple[tuple[int, int], ...] = ((1024, 1024),)
    """(width, height) of images; the largest counts."""
    references: int = 0
    """Of each image, each of a megapixel."""
    batch: int = 1
    """Images in one step."""

    @property
    def largest_px(self) -> tuple[int, int]:
        return max(self.sizes_px, key=lambda size: size[0] * size[1])


@dataclass(frozen=True)
class Need:
    """What one stage takes on its device."""

    stage: str
    precision: str
    weight_bytes: int
    activation_bytes: int
    host_bytes: int = 0
    """Weights kept in the machine's memory, where blocks are streamed."""
    is_offloaded: bool = False
    is_tiled: bool = False

    @property
    def device_bytes(self) -> int:
        """Returns all that the stage's process takes on a GPU."""
        return self.weight_bytes + self.activation_bytes + PROCESS_BYTES

    @property
    def name(self) -> str:
        extras = ["offload"] * self.is_offloaded + ["tiled"] * self.is_tiled
        return ", ".join([self.precision, *extras])


@dataclass(frozen=True)
class Plan:
    """All ways to run each stage, and the first that fits, together and each on a device of its own."""

    needs: tuple[Need, ...]
    together: tuple[Need, ...] | None
    """One for each stage, all on one device; `None` if nothing fits."""
    apart: dict[str, Need | None]
    """The same where each stage has such a device to itself."""


def make_plan(
    model: PlannedModel, workload: Workload, device_bytes: int, precisions: Sequence[str] = ()
) -> Plan:
    """Counts every way and picks.

    Args:
        model: shapes and stored precision.
        workload: the largest that is asked for at once.
        device_bytes: memory of one device.
        precisions: those that the denoiser may have; empty means all that the model can be had in.
    """
    denoiser = _denoiser_needs(model, workload, list(precisions) or _transformer_precisions(model))
    text = [_text_need(model, name) for name in _with_int8(_precisions(model.text_stored))]
    images = _vae_needs(model, workload)
    together = next(
        (
            group
            for group in _groups(model, text, denoiser, images)
            if sum(need.device_bytes for need in group) <= device_bytes
        ),
        None,
    )
    needs = (*text, *denoiser, *images)
    apart = {
        stage: next(
            (need for need in needs if need.stage == stage and need.device_bytes <= device_bytes), None
        )
        for stage in STAGES
    }
    return Plan(needs, together, apart)


def _precisions(stored: str) -> list[str]:
    """Returns what matrices can be: as they are, or quantized at load if they are plain."""
    return [stored] if PRECISIONS[stored].is_quantized else [stored, "fp8"]


def _transformer_precisions(model: PlannedModel) -> list[str]:
    if PRECISIONS[model.transformer_stored].is_quantized:
        return [model.transformer_stored]
    return _with_int8(list(dict.fromkeys((*_precisions(model.transformer_stored), *model.published))))


def _with_int8(names: list[str]) -> list[str]:
    """Adds what plain matrices can be made into as well, last: no smaller than fp8, and slower."""
    return names if PRECISIONS[names[0]].is_quantized else [*names, "int8"]


def _denoiser_needs(model: PlannedModel, workload: Workload, names: Sequence[str]) -> list[Need]:
    """All weights on the device first, then streamed; each from the best precision to the smallest."""
    resident = [
        _denoiser_need(model, workload, model.in_precision(name), is_offloaded=False) for name in names
    ]
    return resident + [
        _denoiser_need(model, workload, model.in_precision(name), is_offloaded=True) for name in names
    ]


def _denoiser_need(
    model: PlannedModel, workload: Workload, precision: Precision, *, is_offloaded: bool
) -> Need:
    config, value_bytes = model.transformer, precision.value_bytes
    whole = transformer.weight_bytes(config, precision)
    kept = transformer.offloaded_bytes(config, precision) if is_offloaded else whole
    references = workload.references * REFERENCE_PX // SIZE_MULTIPLE_PX**2
    cached = 0
    if model.uses_reference_cache:
        cached = transformer.reference_cache_bytes(config, workload.batch * references, value_bytes)
    shape = _step_shape(model, workload, references)
    activations = transformer.step_bytes(config, precision, shape) + cached
    host = transformer.parked_bytes(config, precision) if is_offloaded else 0
    return Need(DENOISER, precision.name, kept, activations, host, is_offloaded=is_offloaded)


def _step_shape(model: PlannedModel, workload: Workload, references: int) -> transformer.StepShape:
    width, height = workload.largest_px
    return transformer.StepShape(
        spans=workload.batch * (1 if model.is_distilled else 2),
        text=model.text_encoder.sequence_length,
        target=width * height // SIZE_MULTIPLE_PX**2,
        references=references,
    )


def _text_need(model: PlannedModel, name: str) -> Need:
    config, precision = model.text_encoder, model.in_precision(name)
    weights = text_encoder.weight_bytes(config, precision)
    return Need(TEXT_ENCODER, name, weights, text_encoder.encode_bytes(config, precision))


def _vae_needs(model: PlannedModel, workload: Workload) -> list[Need]:
    whole = _vae_need(model, workload, is_tiled=False)
    tiled = _vae_need(model, workload, is_tiled=True)
    return [whole] if tiled.activation_bytes == whole.activation_bytes else [whole, tiled]


def _vae_need(model: PlannedModel, workload: Workload, *, is_tiled: bool) -> Need:
    config, precision = model.vae, PRECISIONS[model.plain]
    size, reference = workload.largest_px, (1024, 1024)
    if is_tiled:
        size, reference = (autoencoder.tiled_size_px(config, *each) for each in (size, reference))
    activations = autoencoder.decode_bytes(config, *size, precision.value_bytes)
    if workload.references:
        activations = max(activations, autoencoder.encode_bytes(config, *reference, precision.value_bytes))
    weights = autoencoder.weight_bytes(config, precision.value_bytes)
    return Need(VAE_DECODER, precision.name, weights, activations, is_tiled=is_tiled)


def _groups(
    model: PlannedModel, text: Sequence[Need], denoiser: Sequence[Need], images: Sequence[Need]
) -> Iterator[tuple[Need, ...]]:
    """Yields one need for each stage, from what changes pictures and speed least to what fits most."""
    for transform in denoiser:
        for words in text:
            if _go_together(model, words, transform):
                yield from ((words, transform, picture) for picture in images)


def _go_together(model: PlannedModel, words: Need, transform: Need) -> bool:
    """Whether one command starts both: quantizing at load concerns whatever is plain in either."""
    if words.precision != model.text_stored:
        has_quantized_file = (
            model.has_file(transform.precision) and PRECISIONS[transform.precision].is_quantized
        )
        return transform.precision == words.precision or has_quantized_file
    return model.has_file(transform.precision) or PRECISIONS[model.text_stored].is_quantized

"""Memory plan: which stages of a model fit a device, in which precision, at given image sizes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from klein_core.memory import weight_bytes
from klein_core.memory.activation_bytes import (
    StepShape,
    decode_bytes,
    encode_bytes,
    prompt_activations,
    reference_cache_bytes,
    step_activations,
    tile_size_px,
)
from klein_core.memory.precision import PRECISIONS, Precision
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

TEXT_ENCODER, DENOISER, VAE_DECODER = STAGES = ("text-encoder", "denoiser", "vae-decoder")
REFERENCE_SIZE_PX = (1024, 1024)
"""(width, height) of the largest reference after it was scaled."""
PROCESS_BYTES = 512 << 20
"""GPU memory of a process before any tensor: the driver's context, kernels, workspaces of libraries."""
_ON_CPU = ((), (TEXT_ENCODER,), (TEXT_ENCODER, VAE_DECODER))
"""Stages that may run on the CPU, in the order that they are moved there."""


@dataclass(frozen=True)
class PlannedModel:
    """Shapes and precisions of a model."""

    name: str
    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig
    is_distilled: bool = True
    uses_reference_cache: bool = False
    plain: str = "bf16"
    """Precision of activations and of weights that are never quantized: bf16 or fp32."""
    text_stored: str = "bf16"
    """Precision of the text encoder's matrices in its files."""
    transformer_stored: str = "bf16"
    """Precision of the transformer's blocks in its files."""
    published: Sequence[str] = ()
    """Other precisions in which the transformer is published."""
    transformer_file: str = ""
    """The transformer's own file, when `name` provides only the other parts."""

    def in_precision(self, name: str) -> Precision:
        """Returns the precision `name` of weights, with this model's activations."""
        return replace(PRECISIONS[name], value_bytes=PRECISIONS[self.plain].value_bytes)

    def has_file(self, precision: str) -> bool:
        """Whether a file holds the transformer in this precision, so that nothing is quantized at load."""
        return precision == self.transformer_stored or precision in self.published


@dataclass(frozen=True)
class Workload:
    """The largest work that must be possible."""

    sizes_px: tuple[tuple[int, int], ...] = ((1024, 1024),)
    """(width, height) of images; the largest counts."""
    references: int = 0
    """References of each image, of a megapixel each."""
    batch: int = 1
    """Images in one step."""

    @property
    def largest_px(self) -> tuple[int, int]:
        return max(self.sizes_px, key=lambda size: size[0] * size[1])


@dataclass(frozen=True)
class StageMemory:
    """Memory of one stage, run in one way."""

    stage: str
    precision: str
    weight_bytes: int
    activation_bytes: int
    host_bytes: int = 0
    """Memory of the machine, not of the device."""
    is_offloaded: bool = False
    is_tiled: bool = False
    is_on_cpu: bool = False

    @property
    def device_bytes(self) -> int:
        """All memory of the device that the stage's process takes; 0 on the CPU."""
        return 0 if self.is_on_cpu else self.weight_bytes + self.activation_bytes + PROCESS_BYTES

    @property
    def name(self) -> str:
        extras = ["offload"] * self.is_offloaded + ["tiled"] * self.is_tiled + ["on the CPU"] * self.is_on_cpu
        return ", ".join([self.precision, *extras])

    def on_cpu(self) -> StageMemory:
        """Returns the same stage on the CPU."""
        return replace(self, is_on_cpu=True, host_bytes=self.weight_bytes + self.activation_bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """All ways to run each stage, and the first ways that fit."""

    ways: tuple[StageMemory, ...]
    on_one_device: tuple[StageMemory, ...] | None
    """A way for each stage with one device, some on the CPU if they have to; `None` if nothing fits."""
    on_own_devices: dict[str, StageMemory | None]
    """Stage → its way when it has a whole device; `None` if it does not fit."""

    @property
    def is_all_on_device(self) -> bool:
        """Whether one device holds all stages."""
        return self.on_one_device is not None and not any(way.is_on_cpu for way in self.on_one_device)


def make_plan(
    model: PlannedModel, workload: Workload, device_bytes: int, precisions: Sequence[str] = ()
) -> MemoryPlan:
    """Computes the memory of every way to run the stages, and picks the first that fits.

    Args:
        model: shapes and stored precisions.
        workload: the largest work that must be possible.
        device_bytes: memory of one device.
        precisions: allowed precisions of the denoiser's weights; empty allows all that the model can have.
    """
    possible = _precisions(model.transformer_stored)
    if not PRECISIONS[model.transformer_stored].is_quantized:
        possible = _with_int8(list(dict.fromkeys((*possible, *model.published))))
    denoiser = _denoiser_ways(model, workload, list(precisions) or possible)
    text = []
    for precision in map(model.in_precision, _with_int8(_precisions(model.text_stored))):
        weights = weight_bytes.text_encoder_bytes(model.text_encoder, precision)
        activations = prompt_activations(model.text_encoder, precision).byte_count
        text.append(StageMemory(TEXT_ENCODER, precision.name, weights, activations))
    vae = _vae_ways(model, workload)
    ways = (*text, *denoiser, *vae)
    combinations = _combinations(model, text, denoiser, vae)
    together = (group for group in combinations if sum(way.device_bytes for way in group) <= device_bytes)
    alone = [way for way in reversed(ways) if way.device_bytes <= device_bytes]
    own: dict[str, StageMemory | None] = dict.fromkeys(STAGES)
    return MemoryPlan(ways, next(together, None), own | {way.stage: way for way in alone})


def _precisions(stored: str) -> list[str]:
    """Returns the stored precision, and what plain matrices can be quantized to at load."""
    return [stored] if PRECISIONS[stored].is_quantized else [stored, "fp8"]


def _with_int8(names: list[str]) -> list[str]:
    """Appends int8 to the precisions of plain matrices: last, as it is as large as fp8 and slower."""
    return names if PRECISIONS[names[0]].is_quantized else [*names, "int8"]


def _denoiser_ways(model: PlannedModel, workload: Workload, names: Sequence[str]) -> list[StageMemory]:
    """Returns the ways with all weights on the device, then those with offloaded blocks; best precision first."""
    config = model.transformer
    width, height = workload.largest_px
    reference_width, reference_height = REFERENCE_SIZE_PX
    references = workload.references * reference_width * reference_height // SIZE_MULTIPLE_PX**2
    shape = StepShape(
        spans=workload.batch * (1 if model.is_distilled else 2),
        text=model.text_encoder.sequence_length,
        target=width * height // SIZE_MULTIPLE_PX**2,
        references=references,
    )
    resident, offloaded = [], []
    for precision in map(model.in_precision, names):
        activations = step_activations(config, precision, shape).byte_count
        if model.uses_reference_cache:
            activations += reference_cache_bytes(config, workload.batch * references, precision.value_bytes)
        whole = weight_bytes.transformer_bytes(config, precision)
        kept = weight_bytes.offloaded_bytes(config, precision)
        pinned = weight_bytes.pinned_bytes(config, precision)
        resident.append(StageMemory(DENOISER, precision.name, whole, activations))
        offloaded.append(StageMemory(DENOISER, precision.name, kept, activations, pinned, is_offloaded=True))
    return resident + offloaded


def _vae_ways(model: PlannedModel, workload: Workload) -> list[StageMemory]:
    """Returns the way with images in one piece, and the way in tiles when that takes less."""
    config, value_bytes = model.vae, PRECISIONS[model.plain].value_bytes
    weights = weight_bytes.vae_bytes(config, value_bytes)

    def way(size: tuple[int, int], reference: tuple[int, int], *, is_tiled: bool) -> StageMemory:
        activations = decode_bytes(config, *size, value_bytes)
        if workload.references:
            activations = max(activations, encode_bytes(config, *reference, value_bytes))
        return StageMemory(VAE_DECODER, model.plain, weights, activations, is_tiled=is_tiled)

    whole = way(workload.largest_px, REFERENCE_SIZE_PX, is_tiled=False)
    tiles = (tile_size_px(config, *size) for size in (workload.largest_px, REFERENCE_SIZE_PX))
    tiled = way(*tiles, is_tiled=True)
    return [whole] if tiled.activation_bytes == whole.activation_bytes else [whole, tiled]


def _combinations(
    model: PlannedModel,
    text: Sequence[StageMemory],
    denoiser: Sequence[StageMemory],
    vae: Sequence[StageMemory],
) -> Iterator[tuple[StageMemory, StageMemory, StageMemory]]:
    """Yields a way for each stage: the best images and speed first, the least device memory last."""
    for on_cpu in _ON_CPU:
        # On the CPU, quantization and tiles only cost time.
        texts = [text[0].on_cpu()] if TEXT_ENCODER in on_cpu else text
        vaes = [vae[0].on_cpu()] if VAE_DECODER in on_cpu else vae
        for network in denoiser:
            for words in texts:
                # One `klein up` starts both stages, and its --quantization applies to every plain matrix of either.
                # Stages on different devices have a command each, and any mix of precisions.
                has_file = model.has_file(network.precision)
                if words.precision == model.text_stored:
                    fits = has_file or PRECISIONS[model.text_stored].is_quantized
                else:
                    has_quantized_file = has_file and PRECISIONS[network.precision].is_quantized
                    fits = network.precision == words.precision or has_quantized_file
                if on_cpu or fits:
                    yield from ((words, network, images) for images in vaes)

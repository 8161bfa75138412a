"""Pipeline of all three stages in one process: the library's entry point, and the oracle of the services' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klein_core.checkpoint.config import read_variant
from klein_core.checkpoint.files import ModelFiles
from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.key_mapping import layer_targets
from klein_core.denoiser.adapters.reader import read_adapter
from klein_core.denoiser.inpainting import Inpainting
from klein_core.denoiser.sampler import Trajectory, initial_noise, packed_step, received
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import InvalidInput, Violation
from klein_core.model_description import ModelDescription, read_description
from klein_core.params import (
    DEFAULT_LIMITS,
    DEFAULT_STRENGTH,
    NO_EXPANSION,
    AdapterChoice,
    Expansion,
    GenerationParams,
    Limits,
    default_side_px,
    fitted_size,
    inpainting_violations,
)
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_core.text_encoder.encoder import TextEncoder
from klein_core.vae_decoder.decoder import EncodedReference, VaeDecoder, image_tensor
from klein_core.vae_decoder.image_io import check_encoding, encode_image
from klein_core.vae_decoder.initial_image import InitialImage, prepare_initial_image
from klein_core.vae_decoder.tiling import AUTOMATIC_TILING, TilingPolicy
from klein_core.variants import PUBLISHED_SCHEDULE, NoiseSchedule

DEFAULT_SIDE_PX = 1024
"""Width and height when neither they, a reference nor the model's description give one."""

_EMBEDDING_FIELDS = ("prompt_embedding", "negative_prompt_embedding")

StepCallback = Callable[[int, int, int], None]
"""Called after each step with the image's index, the steps done and the steps in all."""


@dataclass(frozen=True)
class Pipeline:
    """A whole klein model. Its parts may have different dtypes: the transformer and the VAE cast what they receive."""

    text_encoder: TextEncoder
    transformer: FlowTransformer
    vae_decoder: VaeDecoder
    is_distilled: bool
    uses_reference_cache: bool = False
    """Whether references enter as cached keys and values, which are computed once a call."""
    description: ModelDescription | None = None
    """The model's own description, if it has one; its sizes are the default size and a limit of `generate`."""
    schedule: NoiseSchedule = PUBLISHED_SCHEDULE
    """Shift of the noise levels."""

    @classmethod
    def from_folder(
        cls,
        files: ModelFiles | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        quantization: str = NO_QUANTIZATION,
        tiling: TilingPolicy = AUTOMATIC_TILING,
    ) -> Pipeline:
        """Loads a model.

        Args:
            files: its folder in diffusers' layout, or the path of each part.
            device: holds the weights and computes.
            dtype: `None` keeps each part's own.
            quantization: format into which plain weights of text encoder and transformer are converted.
            tiling: when the autoencoder works in tiles.

        Raises:
            CheckpointError: a file is missing or does not fit its configuration.
        """
        variant = read_variant(files)
        return cls(
            TextEncoder.from_folder(files, device=device, dtype=dtype, quantization=quantization),
            FlowTransformer.from_folder(files, device=device, dtype=dtype, quantization=quantization),
            VaeDecoder.from_folder(files, device=device, dtype=dtype, tiling=tiling),
            variant.is_distilled,
            variant.uses_reference_cache,
            read_description(files),
            variant.schedule,
        )

    def read_adapter(self, path: Path) -> Adapter:
        """Reads an adapter's file for `generate`; the model is not changed.

        Raises:
            CheckpointError: the adapter cannot be applied to this model; all reasons are named.
        """
        transformer = self.transformer
        layers = layer_targets(transformer)
        return read_adapter(path, layers, device=transformer.device, dtype=transformer.dtype)

    def generate(
        self,
        prompt: str,
        *,
        references: Sequence[bytes] = (),
        initial_image: bytes | None = None,
        mask: bytes | None = None,
        mask_is_alpha: bool = False,
        mask_padding_px: int | None = None,
        expand: Expansion = NO_EXPANSION,
        strength: float | None = None,
        preserve_unmasked: bool = True,
        width_px: int | None = None,
        height_px: int | None = None,
        negative_prompt: str | None = None,
        seeds: Sequence[int] = (0,),
        step_count: int | None = None,
        guidance_scale: float | None = None,
        adapters: Sequence[ScaledAdapter] = (),
        limits: Limits = DEFAULT_LIMITS,
        on_step: StepCallback | None = None,
    ) -> Iterator[Tensor]:
        """Yields one image for each seed: uint8, (height, width, 3).

        No reference makes a text-to-image flow, one an edit, more a multi-reference flow. Arguments are checked and
        the conditioning is computed at the first image, not at the call.

        Args:
            references: image files.
            initial_image: an image file that is painted over; its prepared size is the result's.
            mask, mask_is_alpha, mask_padding_px, expand: see `prepare_initial_image`.
            strength: share of the steps that are run on the initial image, above 0 and up to 1; unset means 0.8.
            preserve_unmasked: whether the initial image's own pixels stand outside the mask; always with a padding.
            width_px, height_px: unset means the first reference's processed size, scaled to fit where it is larger
                than the limit, or without references the model's default size.
            step_count, guidance_scale: unset means the model's default.
            adapters: from `read_adapter`, each with its scale; for this call alone.
            limits: the pixel limit of the model's description holds too.

        Raises:
            InvalidInput: an argument is outside its limits; every violation is named.
        """
        violations = list(
            inpainting_violations(
                has_initial_image=initial_image is not None,
                has_mask=mask is not None,
                strength=strength,
                mask_padding_px=mask_padding_px,
                expand=expand,
                has_size=width_px is not None or height_px is not None,
            )
        )
        if violations:
            raise InvalidInput(violations)
        described = self.description or ModelDescription("", DEFAULT_SIDE_PX, limits.pixel_count)
        limits = replace(limits, pixel_count=min(limits.pixel_count, described.pixel_count))
        painted = None
        if initial_image is not None:
            painted = prepare_initial_image(
                initial_image,
                mask,
                mask_is_alpha=mask_is_alpha,
                mask_padding_px=mask_padding_px,
                expand=expand,
                pixel_count=limits.pixel_count,
                limits=self.vae_decoder.reference_limits,
            )
            width_px, height_px = painted.width_px, painted.height_px
        too_many = len(references) > limits.reference_count
        encoded = [] if too_many else self._encode_references(references)
        side_px = default_side_px(described.default_size_px, limits.pixel_count)
        default_width_px, default_height_px = (
            fitted_size(encoded[0].width_px, encoded[0].height_px, limits) if encoded else (side_px, side_px)
        )
        params = GenerationParams(
            width_px=default_width_px if width_px is None else width_px,
            height_px=default_height_px if height_px is None else height_px,
            is_distilled=self.is_distilled,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seeds=tuple(seeds),
            step_count=step_count,
            guidance_scale=guidance_scale,
            reference_count=len(references),
            adapters=tuple(AdapterChoice(adapter.name, scale) for adapter, scale in adapters),
            limits=limits,
        )
        strength = DEFAULT_STRENGTH if strength is None else strength
        trajectories = self._trajectories(params, encoded, tuple(adapters), painted, strength)
        for index, trajectory in enumerate(trajectories):
            made = self.vae_decoder.decode(self._denoise(trajectory, index, on_step))
            is_laid_over = painted is not None and (preserve_unmasked or painted.crop is not None)
            yield painted.laid_over(made) if painted is not None and is_laid_over else made

    def generate_files(
        self,
        prompt: str,
        *,
        image_format: str = "png",
        quality: int | None = None,
        metadata: Mapping[str, str] | None = None,
        width_px: int | None = None,
        height_px: int | None = None,
        **arguments: object,
    ) -> list[bytes]:
        """Calls `generate`, with the arguments that are not named here, and returns encoded files.

        Raises:
            InvalidInput: as `generate` raises; or, before anything is computed, as `encode_image` raises.
        """
        # Sides that come from a reference are below every format's end, and so is this one.
        width, height = (DEFAULT_SIDE_PX if side is None else side for side in (width_px, height_px))
        check_encoding(width, height, image_format, quality, metadata)
        images = self.generate(prompt, width_px=width_px, height_px=height_px, **arguments)  # type: ignore[arg-type]
        return [encode_image(image, image_format, quality, metadata) for image in images]

    def _encode_references(self, references: Sequence[bytes]) -> list[EncodedReference]:
        encoded: list[EncodedReference] = []
        violations: list[Violation] = []
        for index, data in enumerate(references):
            try:
                encoded.append(self.vae_decoder.encode_reference(data, field=f"references[{index}]"))
            except InvalidInput as error:
                violations += error.violations
        if violations:
            raise InvalidInput(violations)
        return encoded

    def _trajectories(
        self,
        params: GenerationParams,
        references: Sequence[EncodedReference],
        adapters: tuple[ScaledAdapter, ...],
        painted: InitialImage | None,
        strength: float,
    ) -> Iterator[Trajectory]:
        prompts = [params.prompt, params.negative_prompt or ""] if params.uses_guidance else [params.prompt]
        dtype = self.transformer.dtype
        # One prompt a call, as the services do: the row count of a matrix product may change its last bit.
        embeddings = [
            received(self.text_encoder.encode([prompt], params.limits)[0].embedding, dtype, field)
            for prompt, field in zip(prompts, _EMBEDDING_FIELDS, strict=False)
        ]
        latents = tuple(
            received(reference.latents, dtype, f"reference_latents[{index}]")
            for index, reference in enumerate(references)
        )
        like = embeddings[0]
        if painted is not None:
            # The initial image is the first reference, too.
            encoded = self.vae_decoder.encode(image_tensor(painted.pixels()))
            initial = received(encoded, dtype, "initial_image").to(like.device)
            mask = painted.token_mask().to(like.device, dtype)
            latents = (initial, *latents)
        is_cached = self.uses_reference_cache and bool(latents)
        cache = self.transformer.reference_cache(latents, adapters) if is_cached else None
        conditioning: dict[str, Any] = {
            "step_count": params.steps,
            "prompt_embedding": embeddings[0],
            "negative_prompt_embedding": embeddings[1] if params.uses_guidance else None,
            "guidance_scale": params.guidance,
            "references": () if is_cached else latents,
            "reference_cache": cache,
            "adapters": adapters,
            "schedule": self.schedule,
        }
        shape = params.rows, params.columns, self.transformer.config.in_channels
        for seed in params.seeds:
            noise = initial_noise(seed, *shape, like.dtype, like.device)
            if painted is None:
                yield Trajectory(latents=noise, **conditioning)
            else:
                inpainting = Inpainting(initial, mask, noise)
                yield Trajectory.from_image(inpainting=inpainting, strength=strength, **conditioning)

    def _denoise(self, trajectory: Trajectory, index: int, on_step: StepCallback | None) -> Tensor:
        """Runs all steps of one image. Images are not packed, so each has the same bytes as when made alone."""
        while not trajectory.finished:
            packed_step(self.transformer, [trajectory])
            if on_step is not None:
                on_step(index, trajectory.step_index, trajectory.step_count)
        return trajectory.latents

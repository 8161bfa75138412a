"""Remote text encoder and autoencoder for diffusers' `Flux2KleinPipeline`. Needs diffusers and Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image

from klein_client.endpoint import Tls
from klein_client.stages import TextEncoder, VaeDecoder
from klein_client.torch_tensors import decoded, to_torch

_PATCH = 2
"""Side of the patches that diffusers packs latents in."""


def remote_prompt_embeds(
    target: str,
    prompts: str | Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: str = "",
    tls: Tls | bool = False,
    timeout_seconds: float = 600.0,
) -> torch.Tensor:
    """Encodes prompts at a text-encoder; the result is the pipeline's argument `prompt_embeds`.

    Args:
        target: `HOST:PORT` of a text-encoder.
        prompts: one prompt or several.
        device: device of the result.
        dtype: element type of the result; `None` keeps that of the text-encoder.
        model: name that the stage must serve the model under; empty means any.
        tls: True for TLS with public authorities, or `Tls` with files.
        timeout_seconds: longest time for each prompt.

    Returns:
        (prompts, sequence length, channels).

    Raises:
        KleinError: a call failed.
        ValueError: there are no prompts, or an argument cannot be used.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise ValueError("prompts is empty; give at least one")
    with TextEncoder(target, model=model, tls=tls, timeout_seconds=timeout_seconds) as stage:
        embeddings = [to_torch(stage.encode(prompt)) for prompt in listed]
    return torch.stack(embeddings).to(device=device, dtype=dtype)


class RemoteVae(ModelMixin):
    """Autoencoder of diffusers' pipelines that computes at a vae-decoder.

    The pipeline denormalizes latents with the statistics in `bn` before it decodes, and the stage does the same with
    those of its checkpoint. So `bn` has mean 0 and variance 1 here, and latents reach the stage as the transformer
    made them; with `output_type="latent"` they are what the pipeline returns.

    Args:
        target: `HOST:PORT` of a vae-decoder.
        dtype: of references' pixels and of decoded images.
        model: name that the stage must serve the model under; empty means any.
        tls: True for TLS with public authorities, or `Tls` with files.
        timeout_seconds: longest time of a call.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        target: str,
        *,
        dtype: torch.dtype = torch.float32,
        model: str = "",
        tls: Tls | bool = False,
        timeout_seconds: float = 600.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = VaeDecoder(target, model=model, tls=tls, timeout_seconds=timeout_seconds)
        self.config = SimpleNamespace(
            # Its length alone counts: each level but one halves the image's sides.
            block_out_channels=(0, 0, 0, 0),
            batch_norm_eps=0.0,
        )
        self.bn = torch.nn.BatchNorm2d(1, eps=0.0, affine=False, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of pixels that come and go."""
        mean: Any = self.bn.running_mean
        return mean.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Device of the pixels that the pipeline gets."""
        mean: Any = self.bn.running_mean
        return mean.device  # type: ignore[no-any-return]

    def close(self) -> None:
        """Closes the connection to the stage."""
        self.stage.close()

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> Any:
        """Decodes unpacked latents, (batch, channels, 2 rows, 2 columns), to images, (batch, 3, height, width), -1…1.

        The stage computes whole levels of 255, so that the pipeline's own rounding changes nothing.

        Raises:
            KleinError: a call failed.
        """
        packed = torch.nn.functional.pixel_unshuffle(latents, _PATCH)
        levels = decoded(self.stage, packed).permute(0, 3, 1, 2)
        image = (levels.to(torch.float32) / 127.5 - 1).to(self.device, self.dtype)
        return SimpleNamespace(sample=image) if return_dict else (image,)

    def encode(self, image: torch.Tensor, return_dict: bool = True) -> Any:
        """Encodes images, (batch, 3, height, width), -1…1, to unpacked latents.

        They are sent as PNG, of 255 levels: exactly what the pipeline reads from image files.

        Raises:
            KleinError: a call failed.
        """
        levels = ((image.to("cpu", torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        tensors = []
        for each in levels:
            file = BytesIO()
            Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", compress_level=1)
            tensors.append(to_torch(self.stage.encode(file.getvalue())).permute(2, 0, 1))
        packed = torch.stack(tensors).to(image.device)
        latents = torch.nn.functional.pixel_shuffle(packed, _PATCH)
        return SimpleNamespace(latents=latents) if return_dict else (latents,)

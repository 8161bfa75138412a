"""VAE decoder: decodes latents to pixels, and encodes reference images to latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klein_core.checkpoint.component import open_component
from klein_core.checkpoint.config import read_vae_config
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.weights import load_weights
from klein_core.errors import InvalidInput
from klein_core.linear import needs_fp32_fallback
from klein_core.memory.activation_bytes import decode_bytes, encode_bytes
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.vae_decoder.image_io import (
    DEFAULT_REFERENCE_LIMITS,
    ReferenceLimits,
    check_encoding,
    encode_image,
    prepare_reference,
    to_rgb_bytes,
)
from klein_core.vae_decoder.tiling import AUTOMATIC_TILING, TilingPolicy
from klein_core.variants import VaeConfig

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""Files of the limit in cgroup 2 and 1; without a limit the second holds a number above any machine's memory."""


class VaeDecoder:
    """A checkpoint's autoencoder on one device.

    Args:
        autoencoder: on its device, without gradients.
        reference_limits: bounds of the files that `encode_reference` accepts.
        tiling: when to decode and encode in tiles; a limit that it leaves open is set here, from the device's memory.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        reference_limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS,
        tiling: TilingPolicy = AUTOMATIC_TILING,
    ) -> None:
        self.autoencoder = autoencoder
        self.reference_limits = reference_limits
        self.tiling = tiling.for_memory(lambda: memory_bytes(self.device))
        """Fixed from here on, so that equal requests give equal bytes."""

    @classmethod
    def from_folder(
        cls,
        files: ModelFiles | Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        reference_limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS,
        tiling: TilingPolicy = AUTOMATIC_TILING,
    ) -> VaeDecoder:
        """Loads a model's autoencoder.

        Args:
            files: a model's folder in diffusers' layout, or the path of each part.
            device: device of the weights.
            dtype: of weights and activations; `None` is the checkpoint's.
            reference_limits, tiling: as for the constructor.

        Raises:
            CheckpointError: files are missing, corrupt or do not fit the configuration.
        """
        files = ModelFiles.of(files)
        config = read_vae_config(files)
        with torch.device("meta"):
            autoencoder = Autoencoder(config)
        load_weights(autoencoder, open_component(files, config), device=device, dtype=dtype)
        autoencoder.requires_grad_(False).eval()
        if autoencoder.encoder.conv_in.weight.device.type == "cpu":
            lay_channels_last(autoencoder)
        return cls(autoencoder, reference_limits, tiling)

    @property
    def config(self) -> VaeConfig:
        return self.autoencoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and of encoded references."""
        return self.autoencoder.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved to it."""
        return self.autoencoder.encoder.conv_in.weight.device

    def encode_reference(self, data: bytes, field: str = "reference") -> EncodedReference:
        """Prepares and encodes one image file.

        Args:
            data: the file's bytes.
            field: the file's name in errors, for example `references[1]`.

        Raises:
            InvalidInput: the file is not an acceptable image.
        """
        image = prepare_reference(data, field=field, limits=self.reference_limits)
        latents = self.encode(image_tensor(image))
        return EncodedReference(latents, width_px=image.width, height_px=image.height)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encodes one image (H, W, 3) in −1…1 to latents (rows, columns, packed_channels)."""
        height_px, width_px, _ = image.shape
        tiled = self._needs_tiles(encode_bytes, width_px, height_px)
        pixels = image.to(self.device, self.dtype).unsqueeze(0).permute(0, 3, 1, 2)
        latents = self.autoencoder.encode(pixels, tiled=tiled)
        return latents[0].permute(1, 2, 0).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (rows, columns, packed_channels) of any dtype to pixels: uint8 (H, W, 3), on the CPU.

        Raises:
            InvalidInput: the latents have another shape, are not numbers of at least 16 bits, or have values that do
                not decode to finite pixels.
        """
        return self.decode_batch([latents])[0]

    @torch.no_grad()
    def decode_batch(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Decodes latents of one shape and dtype, as `decode` does each; pixels may be rounded differently than alone.

        Images that one by one need no tiles and together would are decoded one by one.
        """
        sizes_px = [self._image_size(each) for each in latents]
        height_px, width_px = sizes_px[0]
        if len(latents) > 1 and self._needs_tiles(decode_bytes, width_px, height_px, len(latents)):
            return [self.decode(each) for each in latents]
        packed = torch.stack([each.to(self.device) for each in latents]).permute(0, 3, 1, 2).contiguous()
        tiled = self._needs_tiles(decode_bytes, width_px, height_px)
        images = self.autoencoder.decode(packed, tiled=tiled)
        if not bool(images.isfinite().all()):
            raise InvalidInput.of(
                "latents", "decode to NaN or infinity; their values must be finite and small"
            )
        return [to_rgb_bytes(image) for image in images]

    def decode_image(
        self,
        latents: Tensor,
        image_format: str = "png",
        quality: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """Decodes latents (rows, columns, packed_channels) to an image file; arguments as for `encode_image`.

        Raises:
            InvalidInput: as `decode` and `encode_image`.
        """
        height_px, width_px = self._image_size(latents)
        check_encoding(width_px, height_px, image_format, quality, metadata)
        return encode_image(self.decode(latents), image_format, quality, metadata)

    def _needs_tiles(
        self, count_bytes: Callable[..., int], width_px: int, height_px: int, image_count: int = 1
    ) -> bool:
        emulated = needs_fp32_fallback(self.device, self.dtype)
        needed = count_bytes(self.config, width_px, height_px, self.dtype.itemsize, emulated=emulated)
        return self.tiling.applies(image_count * needed)

    def _image_size(self, latents: Tensor) -> tuple[int, int]:
        """Validates latents and returns the height and width in pixels that they decode to."""
        channels = self.config.packed_channels
        if latents.ndim != 3 or latents.shape[2] != channels or latents.numel() == 0:
            raise InvalidInput.of(
                "latents", f"have shape {tuple(latents.shape)}; must be (rows, columns, {channels})"
            )
        if not latents.is_floating_point() or latents.dtype.itemsize == 1:
            raise InvalidInput.of(
                "latents", f"are {latents.dtype}; must be floating point of at least 16 bits"
            )
        return latents.shape[0] * SIZE_MULTIPLE_PX, latents.shape[1] * SIZE_MULTIPLE_PX


@dataclass(frozen=True)
class EncodedReference:
    """One reference image as input of the flow transformer."""

    latents: Tensor
    """(rows, columns, packed_channels), normalized."""
    width_px: int
    """Width of the prepared image: 16 times the columns."""
    height_px: int


def lay_channels_last(autoencoder: Autoencoder) -> None:
    """Stores convolution weights channels-last, which makes convolutions 10–20 % faster on a CPU.

    Not for CUDA: its group norm returns channels-first features, so each layer would copy them twice.
    """
    for parameter in autoencoder.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def image_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to a tensor (H, W, 3) in −1…1, fp32."""
    return scaled_pixels(rgb_tensor(image))


def rgb_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to a tensor (H, W, 3), uint8: a quarter of the bytes of what the autoencoder takes."""
    return torch.from_numpy(np.array(image))


def scaled_pixels(rgb: Tensor) -> Tensor:
    """Converts uint8 pixels to −1…1, fp32."""
    return 2 * (rgb.float() / 255) - 1


def memory_bytes(device: torch.device) -> int:
    """Returns the memory of `device`, in use or not; of a CPU, as much as this container or machine may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return host_memory_bytes()


def host_memory_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Returns the memory of this machine, or the limit of this container if that is less.

    Returns 2⁶³ − 1 on systems that report neither.
    """
    known = (_machine_bytes(meminfo), _container_bytes(cgroup))
    return min((each for each in known if each is not None), default=2**63 - 1)


def _machine_bytes(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), None)


def _container_bytes(cgroup: Path) -> int | None:
    for name in _CGROUP_LIMITS:
        try:
            limit = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return None if limit == "max" else int(limit)
    return None

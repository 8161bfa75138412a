"""FLUX.2's autoencoder: images to latents and back, and latents to the transformer's tokens.

Latents are folded in 2×2 patches into channels, then normalized per packed channel with a batch normalization's
running statistics from the checkpoint; there is no scaling factor. Source: diffusers' `AutoencoderKLFlux2`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from klein_core.linear import needs_fp32_fallback
from klein_core.vae_decoder.tiling import decoder_tiles, encoder_tiles
from klein_core.variants import VaeConfig

GROUP_NORM_EPS = 1e-6
"""Epsilon of every group normalization; the latents' batch normalization has its own, larger one."""


class Autoencoder(nn.Module):
    """Encoder, decoder, and the statistics that normalize latents for the transformer."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Convolution(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = Convolution(channels, channels, 1) if config.use_post_quant_conv else None
        self.bn = nn.BatchNorm2d(config.packed_channels, eps=config.batch_norm_eps, affine=False)

    @property
    def pixels_per_token(self) -> tuple[int, int]:
        """Height and width of the pixels that one packed latent encodes."""
        scale: int = 2 ** (len(self.config.block_out_channels) - 1)
        return scale * self.config.patch_size[0], scale * self.config.patch_size[1]

    def posterior(self, image: Tensor, *, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the latents, each (B, latent, h, w), unpacked.

        Args:
            image: (B, 3, H, W) in -1…1, sides multiples of `pixels_per_token`.
            tiled: whether to encode an image that is larger than one tile in tiles.
        """
        tiles = encoder_tiles(self.config)
        in_tiles = tiled and tiles.needed_for(image)
        moments = tiles.run(image, self._moments) if in_tiles else self._moments(image)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def pack(self, latents: Tensor) -> Tensor:
        """Folds latents (B, latent, h, w) into un-normalized tokens (B, C, r, c)."""
        return fold_patches(latents, self.config.patch_size)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unfolds un-normalized tokens (B, C, r, c) into latents (B, latent, h, w)."""
        return unfold_patches(packed, self.config.patch_size)

    def normalize(self, packed: Tensor) -> Tensor:
        """Normalizes packed latents (B, C, r, c) to the unit statistics that the transformer expects."""
        mean, deviation = _mean_and_deviation(self.bn, packed)
        return (packed - mean) / deviation

    def denormalize(self, packed: Tensor) -> Tensor:
        """Undoes `normalize`."""
        mean, deviation = _mean_and_deviation(self.bn, packed)
        return packed * deviation + mean

    def encode(self, image: Tensor, *, tiled: bool = False) -> Tensor:
        """Encodes images (B, 3, H, W) in -1…1 to the posterior's mean, packed and normalized (B, C, r, c)."""
        return self.normalize(self.pack(self.posterior(image, tiled=tiled)[0]))

    def decode_unpacked(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes unpacked latents (B, latent, h, w) to images (B, 3, H, W), about -1…1."""
        tiles = decoder_tiles(self.config)
        in_tiles = tiled and tiles.needed_for(latents)
        return tiles.run(latents, self._image) if in_tiles else self._image(latents)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes packed, normalized latents (B, C, r, c) to images (B, 3, H, W), about -1…1.

        Latents are denormalized in their own dtype and cast to the weights' after that, as in diffusers.
        """
        unpacked = self.unpack(self.denormalize(latents))
        return self.decode_unpacked(unpacked.to(self.decoder.conv_in.weight.dtype), tiled=tiled)

    def _moments(self, image: Tensor) -> Tensor:
        moments: Tensor = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _image(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(
            latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        )
        return image


class Encoder(nn.Module):
    """Image (B, 3, H, W) → mean and log-variance, concatenated: (B, 2·latent, H/2ⁿ⁻¹, W/2ⁿ⁻¹) for n levels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Convolution(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(level - 1, 0)], width, config, downsample=level + 1 < len(widths))
            for level, width in enumerate(widths)
        )
        self.mid_block = MiddleBlock(widths[-1], config)
        self.conv_norm_out = group_norm(widths[-1], config.norm_num_groups)
        self.conv_out = Convolution(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.conv_in(image)
        for block in self.down_blocks:
            features = block(features)
        features = self.mid_block(features)
        moments: Tensor = self.conv_out(functional.silu(self.conv_norm_out(features)))
        return moments


class Decoder(nn.Module):
    """Latents (B, latent, h, w) → image (B, 3, h·2ⁿ⁻¹, w·2ⁿ⁻¹) for n levels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
        self.conv_in = Convolution(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(level - 1, 0)], width, config, upsample=level + 1 < len(widths))
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = group_norm(widths[-1], config.norm_num_groups)
        self.conv_out = Convolution(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        features = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            features = block(features)
        image: Tensor = self.conv_out(functional.silu(self.conv_norm_out(features)))
        return image


class DownBlock(nn.Module):
    """Residual blocks of one width, then a downsampler except at the last level."""

    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, *, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nn.ModuleList(
            ResidualBlock(before, after, config.norm_num_groups) for before, after in pairwise(widths)
        )
        self.downsamplers = nn.ModuleList([Downsampler(out_channels)] if downsample else [])

    def forward(self, features: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            features = block(features)
        return features


class MiddleBlock(nn.Module):
    """Residual block, attention if configured, residual block."""

    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList(
            [PixelAttention(channels, groups)] if config.mid_block_add_attention else []
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.resnets[0](features)
        for attention in self.attentions:
            features = attention(features)
        out: Tensor = self.resnets[1](features)
        return out


class UpBlock(nn.Module):
    """Residual blocks (one more than the encoder has), then an upsampler except at the last level."""

    def __init__(self, in_channels: int, out_channels: int, config: VaeConfig, *, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        self.resnets = nn.ModuleList(
            ResidualBlock(before, after, config.norm_num_groups) for before, after in pairwise(widths)
        )
        self.upsamplers = nn.ModuleList([Upsampler(out_channels)] if upsample else [])

    def forward(self, features: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            features = block(features)
        return features


class Downsampler(nn.Module):
    """Halves both sides with a strided convolution: (B, C, h, w) → (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        # Pads on the right and at the bottom only, as in training.
        halved: Tensor = self.conv(functional.pad(features, (0, 1, 0, 1)))
        return halved


class Upsampler(nn.Module):
    """Doubles both sides by nearest-neighbor interpolation, then convolves: (B, C, h, w) → (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        doubled: Tensor = self.conv(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        return doubled


class ResidualBlock(nn.Module):
    """Two normalized 3×3 convolutions and a shortcut: (B, in, h, w) → (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = Convolution(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = Convolution(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            Convolution(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(features)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        shortcut = features if self.conv_shortcut is None else self.conv_shortcut(features)
        summed: Tensor = shortcut + hidden
        return summed


class PixelAttention(nn.Module):
    """Single-head attention over all pixels: (B, C, h, w) → the same shape."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, features: Tensor) -> Tensor:
        batch, channels, rows, columns = features.shape
        pixels = self.group_norm(features).flatten(2).transpose(1, 2)
        query, key, value = (to(pixels).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        attended = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        mixed: Tensor = self.to_out[0](attended).transpose(1, 2)
        return mixed.reshape(batch, channels, rows, columns) + features


class Convolution(nn.Conv2d):
    """Convolution with bias: (B, in, h, w) → (B, out, h', w'), in the features' dtype.

    On CPUs without native bfloat16 it computes in fp32 and rounds the result; see `needs_fp32_fallback`.
    """

    __call__: Callable[..., Tensor]

    def forward(self, features: Tensor) -> Tensor:
        bias = self.bias
        if bias is None or not needs_fp32_fallback(features.device, features.dtype):
            return super().forward(features)
        result: Tensor = self._conv_forward(features.float(), self.weight.float(), bias.float())
        return result.to(features.dtype)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Returns the affine group normalization that every block uses."""
    return nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


def _mean_and_deviation(statistics: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = statistics.running_mean, statistics.running_var
    if mean is None or variance is None:
        raise TypeError("latent statistics must track a running mean and variance")
    # Square root first, in the statistics' precision, and then the cast: as in training.
    deviation = torch.sqrt(variance + statistics.eps)
    return mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)


def fold_patches(latents: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """Folds each patch of pixels into channels: (B, C, h, w) → (B, C·ph·pw, h/ph, w/pw).

    Packed channel `c·ph·pw + row·pw + column` is latent channel `c` at that row and column of the patch.
    """
    batch, channels, height, width = latents.shape
    rows, columns = height // patch[0], width // patch[1]
    cells = latents.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * patch[0] * patch[1], rows, columns)


def unfold_patches(packed: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """Undoes `fold_patches`: (B, C·ph·pw, r, c) → (B, C, r·ph, c·pw)."""
    batch, channels, rows, columns = packed.shape
    cells = packed.reshape(batch, channels // (patch[0] * patch[1]), patch[0], patch[1], rows, columns)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, rows * patch[0], columns * patch[1])

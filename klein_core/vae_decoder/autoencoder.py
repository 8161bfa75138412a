"""The layout and scale of latents: 2×2 patches folded into channels, normalized per packed channel.

There is no scaling factor: a batch normalization's running statistics, stored in the checkpoint, replace it.
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


def normalize(packed: Tensor, statistics: nn.BatchNorm2d) -> Tensor:
    """Shifts and scales packed latents (B, C, r, c) to the unit statistics that the transformer works in."""
    mean, deviation = _mean_and_deviation(statistics, packed)
    return (packed - mean) / deviation


def denormalize(packed: Tensor, statistics: nn.BatchNorm2d) -> Tensor:
    """Undoes `normalize`: (B, C, r, c) → the same shape."""
    mean, deviation = _mean_and_deviation(statistics, packed)
    return packed * deviation + mean


def _mean_and_deviation(statistics: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = statistics.running_mean, statistics.running_var
    if mean is None or variance is None:
        raise TypeError("latent statistics must track a running mean and variance")
    # The square root is taken in the statistics' own precision and only then cast, as the checkpoints expect.
    deviation = torch.sqrt(variance + statistics.eps)
    return mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)


class Convolution(nn.Conv2d):
    """A convolution with bias: (B, in, h, w) → (B, out, h', w'), in the features' dtype."""

    __call__: Callable[..., Tensor]

    def forward(self, features: Tensor) -> Tensor:
        bias = self.bias
        if bias is None or not needs_fp32_fallback(features.device, features.dtype):
            return super().forward(features)
        result: Tensor = self._conv_forward(features.float(), self.weight.float(), bias.float())
        return result.to(features.dtype)


GROUP_NORM_EPS = 1e-6
"""Epsilon of every group normalization; the latents' batch normalization has its own, larger one."""


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Makes the affine group normalization that every block of the autoencoder uses."""
    return nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


class ResidualBlock(nn.Module):
    """Two normalized 3×3 convolutions beside a shortcut: (B, in, h, w) → (B, out, h, w)."""

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
    """Attention of every pixel to every pixel, one head as wide as the features: (B, C, h, w) → the same."""

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


class MiddleBlock(nn.Module):
    """Residual block, attention where the configuration asks for it, residual block."""

    def __init__(self, channels: int, groups: int, *, add_attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)] if add_attention else [])

    def forward(self, features: Tensor) -> Tensor:
        features = self.resnets[0](features)
        for attention in self.attentions:
            features = attention(features)
        out: Tensor = self.resnets[1](features)
        return out


class Downsampler(nn.Module):
    """Halves both sides with a strided convolution: (B, C, h, w) → (B, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        # One column on the right and one row at the bottom only: the weights were trained off-center.
        halved: Tensor = self.conv(functional.pad(features, (0, 1, 0, 1)))
        return halved


class Upsampler(nn.Module):
    """Doubles both sides by repeating pixels, then convolves: (B, C, h, w) → (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        doubled: Tensor = self.conv(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
        return doubled


class DownBlock(nn.Module):
    """Residual blocks of one width, then half the size unless it is the last level."""

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


class UpBlock(nn.Module):
    """Residual blocks (one more than the encoder's), then double the size unless it is the last level."""

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


class Encoder(nn.Module):
    """Image (B, 3, H, W) → mean and log-variance side by side (B, 2·latent, H/2ⁿ⁻¹, W/2ⁿ⁻¹) for n levels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Convolution(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(level - 1, 0)], width, config, downsample=level + 1 < len(widths))
            for level, width in enumerate(widths)
        )
        self.mid_block = _middle_block(widths[-1], config)
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
        self.mid_block = _middle_block(widths[0], config)
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


class Autoencoder(nn.Module):
    """Both directions, and the statistics between the autoencoder's latents and the transformer's."""

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
        """Height and width in pixels of the square that one packed latent stands for."""
        scale: int = 2 ** (len(self.config.block_out_channels) - 1)
        return scale * self.config.patch_size[0], scale * self.config.patch_size[1]

    def posterior(self, image: Tensor, *, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the latents, each (B, latent, h, w), unpacked.

        Args:
            image: (B, 3, H, W) in -1…1, sides multiples of `pixels_per_token`.
            tiled: in tiles if the image is larger than one.
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
        """Brings packed latents (B, C, r, c) to the transformer's scale with the stored statistics."""
        return normalize(packed, self.bn)

    def denormalize(self, packed: Tensor) -> Tensor:
        """Undoes `normalize`."""
        return denormalize(packed, self.bn)

    def encode(self, image: Tensor, *, tiled: bool = False) -> Tensor:
        """Encodes images (B, 3, H, W) in -1…1 to the posterior's mean, packed and normalized (B, C, r, c)."""
        return self.normalize(self.pack(self.posterior(image, tiled=tiled)[0]))

    def decode_unpacked(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes the autoencoder's own latents (B, latent, h, w) to images (B, 3, H, W), about -1…1."""
        tiles = decoder_tiles(self.config)
        in_tiles = tiled and tiles.needed_for(latents)
        return tiles.run(latents, self._image) if in_tiles else self._image(latents)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes packed, normalized latents (B, C, r, c) to images (B, 3, H, W), about -1…1."""
        return self.decode_unpacked(self.unpack(self.denormalize(latents)), tiled=tiled)

    def _moments(self, image: Tensor) -> Tensor:
        moments: Tensor = self.encoder(image)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _image(self, latents: Tensor) -> Tensor:
        image: Tensor = self.decoder(
            latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        )
        return image


def _middle_block(channels: int, config: VaeConfig) -> MiddleBlock:
    return MiddleBlock(channels, config.norm_num_groups, add_attention=config.mid_block_add_attention)

"""Convolutional pieces of the autoencoder: residual block, one-head attention, middle block, resampling.

Attribute names are the checkpoint's key names, so weights load without a table.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from klein_core.vae_decoder.convolution import Convolution

GROUP_NORM_EPS = 1e-6
"""Epsilon of every group normalisation; the latents' batch normalisation has its own, larger one."""


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Makes the affine group normalisation that every block of the autoencoder uses."""
    return nn.GroupNorm(groups, channels, eps=GROUP_NORM_EPS)


class ResidualBlock(nn.Module):
    """Two normalised 3×3 convolutions beside a shortcut: (B, in, h, w) → (B, out, h, w)."""

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
        # One column on the right and one row at the bottom only: the weights were trained off-centre.
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

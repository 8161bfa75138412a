"""The autoencoder of klein models: images to packed, normalised latents and back.

Trainable as it stands; parameter names are the keys of published checkpoints.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from klein_core.vae_decoder import latents as layout
from klein_core.vae_decoder.blocks import Downsampler, MiddleBlock, ResidualBlock, Upsampler, group_norm
from klein_core.vae_decoder.convolution import Convolution
from klein_core.vae_decoder.tiling import decoder_tiles, encoder_tiles
from klein_core.variants import VaeConfig


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
        """Folds latents (B, latent, h, w) into un-normalised tokens (B, C, r, c)."""
        return layout.fold_patches(latents, self.config.patch_size)

    def unpack(self, packed: Tensor) -> Tensor:
        """Unfolds un-normalised tokens (B, C, r, c) into latents (B, latent, h, w)."""
        return layout.unfold_patches(packed, self.config.patch_size)

    def normalise(self, packed: Tensor) -> Tensor:
        """Brings packed latents (B, C, r, c) to the transformer's scale with the stored statistics."""
        return layout.normalise(packed, self.bn)

    def denormalise(self, packed: Tensor) -> Tensor:
        """Undoes `normalise`."""
        return layout.denormalise(packed, self.bn)

    def encode(self, image: Tensor, *, tiled: bool = False) -> Tensor:
        """Encodes images (B, 3, H, W) in -1…1 to the posterior's mean, packed and normalised (B, C, r, c)."""
        return self.normalise(self.pack(self.posterior(image, tiled=tiled)[0]))

    def decode_unpacked(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes the autoencoder's own latents (B, latent, h, w) to images (B, 3, H, W), about -1…1."""
        tiles = decoder_tiles(self.config)
        in_tiles = tiled and tiles.needed_for(latents)
        return tiles.run(latents, self._image) if in_tiles else self._image(latents)

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decodes packed, normalised latents (B, C, r, c) to images (B, 3, H, W), about -1…1."""
        return self.decode_unpacked(self.unpack(self.denormalise(latents)), tiled=tiled)

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

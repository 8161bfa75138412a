"""Tiling: processes large images in overlapping tiles, with the memory of one tile at any image size.

Tiles and blending are those of diffusers' `enable_tiling`. Normalization and attention see one tile at a time, so the
result differs slightly from the image in one piece; `TilingPolicy` makes the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klein_core.variants import VaeConfig

OVERLAP = 0.25
"""Share of a tile's side that overlaps the next tile."""


@dataclass(frozen=True)
class TilingPolicy:
    """Decides when to process images larger than one tile in tiles."""

    mode: str = "auto"
    """`auto`, `on` or `off`; `auto` uses tiles if the image in one piece needs more memory than the limit."""
    limit_bytes: int | None = None
    """Memory for activations; `None` is the device's free memory at that moment."""

    def applies(self, needed_bytes: int, free_bytes: Callable[[], int]) -> bool:
        """Returns whether to use tiles for an image that needs `needed_bytes` in one piece."""
        if self.mode != "auto":
            return self.mode == "on"
        return needed_bytes > (free_bytes() if self.limit_bytes is None else self.limit_bytes)


AUTOMATIC_TILING = TilingPolicy()


@dataclass(frozen=True)
class Tiles:
    """Geometry of square tiles: input sizes in the network's input pixels or latents, output sizes in its output's."""

    side: int
    """Side of an input tile; the last row and column of tiles may be smaller."""
    stride: int
    """Distance between the starts of neighboring input tiles."""
    blend: int
    """Width of the output strip that is blended between neighboring tiles."""
    kept: int
    """Rows and columns of an output tile before the next one starts."""

    @classmethod
    def between(cls, side: int, out_side: int) -> Tiles:
        """Returns the tiles of a network that maps `side` to `out_side`."""
        blend = int(out_side * OVERLAP)
        return cls(side, int(side * (1 - OVERLAP)), blend, out_side - blend)

    def needed_for(self, whole: Tensor) -> bool:
        """Returns whether (B, C, h, w) is larger than one tile."""
        return max(whole.shape[-2:]) > self.side

    def run(self, whole: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `network` to (B, C, h, w), one tile at a time, and blends the results."""
        above: list[Tensor] = []
        rows: list[Tensor] = []
        # A tile starts at every stride, even if the one before has reached the edge: as in diffusers.
        for top in range(0, whole.shape[2], self.stride):
            tiles: list[Tensor] = []
            for column, left in enumerate(range(0, whole.shape[3], self.stride)):
                tile = network(whole[:, :, top : top + self.side, left : left + self.side])
                if above:
                    self._fade_in(above[column], tile, axis=2)
                if tiles:
                    self._fade_in(tiles[-1], tile, axis=3)
                tiles.append(tile)
            rows.append(torch.cat([tile[:, :, : self.kept, : self.kept] for tile in tiles], dim=3))
            above = tiles
        return torch.cat(rows, dim=2)

    def _fade_in(self, before: Tensor, tile: Tensor, axis: int) -> None:
        """Blends the start of `tile` linearly with the end of the tile before it, in place."""
        extent = min(before.shape[axis], tile.shape[axis], self.blend)
        share = torch.arange(extent, dtype=torch.float64) / extent
        share = share.view(-1, 1) if axis == 2 else share
        begin = tile.narrow(axis, 0, extent)
        # Products are rounded to the tile's dtype before they are added, as in diffusers.
        old, new = before.narrow(axis, before.shape[axis] - extent, extent), begin
        old = (old.float() * (1 - share).float().to(tile.device)).to(tile.dtype)
        new = (new.float() * share.float().to(tile.device)).to(tile.dtype)
        begin.copy_(old + new)


def decoder_tiles(config: VaeConfig) -> Tiles:
    """Returns the decoder's tiles: 128 latents to 1024 pixels in klein."""
    return Tiles.between(_latent_side(config), config.sample_size)


def encoder_tiles(config: VaeConfig) -> Tiles:
    """Returns the encoder's tiles: 1024 pixels to 128 latents in klein."""
    return Tiles.between(config.sample_size, _latent_side(config))


def _latent_side(config: VaeConfig) -> int:
    scale: int = 2 ** (len(config.block_out_channels) - 1)
    return config.sample_size // scale

"""Large images in overlapping tiles, one at a time: memory of one tile whatever the image's size.

The same tiles and the same blend as diffusers' `enable_tiling`. Normalization and attention see one tile at a
time, so a tiled image is not quite the image in one piece; hence the choice, `TilingPolicy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klein_core.variants import VaeConfig

OVERLAP = 0.25
"""Share of a tile's side that it has in common with the next."""


@dataclass(frozen=True)
class Tiles:
    """Sides of square tiles, in pixels or latents of what goes in and of what comes out."""

    side: int
    """Of a tile that goes in; those at the right and the bottom are smaller."""
    stride: int
    """Between the beginnings of two tiles that go in."""
    blend: int
    """Width of the strip of what comes out that fades from one tile to the next."""
    kept: int
    """Rows and columns of a tile that comes out before the next one begins."""

    @classmethod
    def between(cls, side: int, out_side: int) -> Tiles:
        """Returns the tiles of a network that turns `side` into `out_side`."""
        blend = int(out_side * OVERLAP)
        return cls(side, int(side * (1 - OVERLAP)), blend, out_side - blend)

    def needed_for(self, whole: Tensor) -> bool:
        """Returns whether (B, C, h, w) is larger than one tile."""
        return max(whole.shape[-2:]) > self.side

    def run(self, whole: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns what `network` makes of (B, C, h, w), tile by tile."""
        above: list[Tensor] = []
        rows: list[Tensor] = []
        # A tile begins at every stride, also where the one before has reached the edge already.
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
        """Overwrites the beginning of `tile` with a linear passage from the end of the tile before it."""
        extent = min(before.shape[axis], tile.shape[axis], self.blend)
        share = torch.arange(extent, dtype=torch.float64) / extent
        share = share.view(-1, 1) if axis == 2 else share
        begin = tile.narrow(axis, 0, extent)
        # Products are rounded to the tile's own precision before they are added, as the source does.
        old, new = before.narrow(axis, before.shape[axis] - extent, extent), begin
        old = (old.float() * (1 - share).float().to(tile.device)).to(tile.dtype)
        new = (new.float() * share.float().to(tile.device)).to(tile.dtype)
        begin.copy_(old + new)


def decoder_tiles(config: VaeConfig) -> Tiles:
    """Returns the tiles in which latents are decoded: 128 latents to 1024 pixels in klein."""
    return Tiles.between(_latent_side(config), config.sample_size)


def encoder_tiles(config: VaeConfig) -> Tiles:
    """Returns the tiles in which images are encoded: 1024 pixels to 128 latents in klein."""
    return Tiles.between(config.sample_size, _latent_side(config))


def _latent_side(config: VaeConfig) -> int:
    scale: int = 2 ** (len(config.block_out_channels) - 1)
    return config.sample_size // scale


@dataclass(frozen=True)
class TilingPolicy:
    """When images larger than a tile are made in tiles."""

    mode: str = "auto"
    """`auto`, `on` or `off`; `auto` is where the whole image needs more than the limit."""
    limit_bytes: int | None = None
    """Of activations; `None` is what the device has free at that moment."""

    def applies(self, needed_bytes: int, free_bytes: Callable[[], int]) -> bool:
        """Returns whether to use tiles for an image that in one piece needs `needed_bytes`."""
        if self.mode != "auto":
            return self.mode == "on"
        return needed_bytes > (free_bytes() if self.limit_bytes is None else self.limit_bytes)


AUTOMATIC_TILING = TilingPolicy()

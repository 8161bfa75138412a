"""Tiling: processes large images in overlapping tiles, with the memory of one tile at any image size.

Tiles and blending are those of diffusers' `enable_tiling`. Normalization and attention see one tile at a time, so the
result differs slightly from the image in one piece; `TilingPolicy` makes the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klein_core.variants import VaeConfig

OVERLAP = 0.25
"""Share of a tile's side that overlaps the next tile."""


MEMORY_SHARE = 4
"""Without a given limit, one image may take this part of the device's memory, a quarter; the rest is for weights."""


@dataclass(frozen=True)
class TilingPolicy:
    """Decides when to process images larger than one tile in tiles. The decision depends on an image's size alone."""

    mode: str = "auto"
    """`auto`, `on` or `off`; `auto` uses tiles if the image in one piece needs more memory than the limit."""
    limit_bytes: int | None = None
    """Memory for activations; `None` is a quarter of the device's memory, see `for_memory`."""

    def for_memory(self, memory_bytes: Callable[[], int]) -> TilingPolicy:
        """Returns this policy with its limit set, for a device of `memory_bytes`, free or not.

        Free memory would be another at each moment, and tiles change pixels: equal requests would differ.
        """
        if self.mode != "auto" or self.limit_bytes is not None:
            return self
        return replace(self, limit_bytes=memory_bytes() // MEMORY_SHARE)

    def applies(self, needed_bytes: int) -> bool:
        """Returns whether to use tiles for an image that needs `needed_bytes` in one piece.

        Raises:
            ValueError: the limit is not set.
        """
        if self.mode != "auto":
            return self.mode == "on"
        if self.limit_bytes is None:
            raise ValueError("the limit of automatic tiling is not set; call for_memory first")
        return needed_bytes > self.limit_bytes

    def __str__(self) -> str:
        if self.mode != "auto" or self.limit_bytes is None:
            return f"tiling is {self.mode}"
        return (
            f"tiling is auto: images that need more than {self.limit_bytes >> 20} MiB in one piece are tiled"
        )


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

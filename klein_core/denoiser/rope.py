"""Where tokens are: four-axis position ids and the rotation that each id stands for.

The axes are time (which image), row, column and text order. Text counts on the last axis only, the target
image has time 0, and reference `i` has time `10 + 10·i`, as in diffusers' `Flux2KleinPipeline`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from klein_core.denoiser.workspace import Workspace

REFERENCE_TIME_STEP = 10
"""Distance on the time axis between the target and the first reference, and between references."""


def text_ids(text_length: int) -> Tensor:
    """Returns (text_length, 4) ids that differ on the last axis only."""
    ids = torch.zeros(text_length, 4, dtype=torch.float64)
    ids[:, 3] = torch.arange(text_length)
    return ids


def image_ids(time: int, rows: int, columns: int) -> Tensor:
    """Returns (rows · columns, 4) ids of one image in row-major order."""
    ids = torch.zeros(rows, columns, 4, dtype=torch.float64)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.flatten(0, 1)


def span_ids(text_length: int, grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns (tokens, 4) ids of a span: text, target, references (`grids` lists target first)."""
    return torch.cat([text_ids(text_length), images_ids(grids)])


def images_ids(grids: tuple[tuple[int, int], ...], first_time: int = 0) -> Tensor:
    """Returns (tokens, 4) ids of images one after another; the first one's time is `first_time`."""
    times = range(first_time, first_time + REFERENCE_TIME_STEP * len(grids), REFERENCE_TIME_STEP)
    return torch.cat([image_ids(time, *grid) for time, grid in zip(times, grids, strict=True)])


def rotations(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Returns (tokens, head_dim / 2, 2) fp32: cosine and sine for each adjacent pair of head channels.

    Axis `a` of `axes_dims[a]` channels turns pair `j` by `id · theta^(−2j / axes_dims[a])`. Frequencies and
    angles are float64, as in diffusers' `Flux2PosEmbed`.
    """
    angles = [
        ids[:, axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


@lru_cache(maxsize=32)
def span_rotations(
    text_length: int,
    grids: tuple[tuple[int, int], ...],
    axes_dims: tuple[int, ...],
    theta: float,
    device: torch.device,
) -> Tensor:
    """Returns `rotations` of a whole span on `device`; the last 32 different ones are kept."""
    with torch.inference_mode(False):
        return rotations(span_ids(text_length, grids), axes_dims, theta).to(device)


def reference_rotations(
    grids: tuple[tuple[int, int], ...], axes_dims: tuple[int, ...], theta: float, device: torch.device
) -> Tensor:
    """Returns `rotations` of references alone, where they stand in a span."""
    with torch.inference_mode(False):
        return rotations(images_ids(grids, REFERENCE_TIME_STEP), axes_dims, theta).to(device)


def rotate(heads: Tensor, table: Tensor, scratch: Workspace) -> Tensor:
    """Turns adjacent channel pairs of each head.

    Args:
        heads: (batch, tokens, …, head_dim), fp32; overwritten if that may be.
        table: (1 or batch, tokens, head_dim / 2, 2), from `rotations`.
    """
    pairs = torch.unflatten(heads, -1, (-1, 2))
    table = table.reshape(*table.shape[:2], *(1,) * (heads.ndim - 3), *table.shape[2:])
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs)
        turned = torch.mul(turned, torch.view_as_complex(table), out=scratch.over(turned))
        return torch.view_as_real(turned).flatten(-2)
    # The compiler fuses real arithmetic and leaves complex numbers alone.
    cosine, sine = table.unbind(-1)
    first, second = pairs.unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)

"""Rotary position embedding over four axes: image, row, column and text order.

Text counts on the last axis only. On the image axis ("time" in diffusers) the target image is 0 and reference `i`
is `10 + 10·i`. Source: diffusers' `Flux2KleinPipeline`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from klein_core.denoiser.workspace import Workspace

REFERENCE_TIME_STEP = 10
"""Distance on the time axis between the target and the first reference, and between references."""


@lru_cache(maxsize=32)
def span_rope_table(
    text_length: int,
    grids: tuple[tuple[int, int], ...],
    axes_dims: tuple[int, ...],
    theta: float,
    device: torch.device,
) -> Tensor:
    """Returns the `rope_table` of a whole span on `device`; caches the last 32."""
    # A cached table may be read outside inference mode later.
    with torch.inference_mode(False):
        return rope_table(span_ids(text_length, grids), axes_dims, theta).to(device)


def reference_rope_table(
    grids: tuple[tuple[int, int], ...], axes_dims: tuple[int, ...], theta: float, device: torch.device
) -> Tensor:
    """Returns the `rope_table` of references without a target, at the positions that they have in a span."""
    with torch.inference_mode(False):
        return rope_table(images_ids(grids, REFERENCE_TIME_STEP), axes_dims, theta).to(device)


def apply_rope(heads: Tensor, table: Tensor, workspace: Workspace) -> Tensor:
    """Rotates adjacent channel pairs of each head.

    Args:
        heads: (batch, tokens, …, head_dim), fp32; overwritten where the workspace allows it.
        table: (1 or batch, tokens, head_dim / 2, 2), from `rope_table`.
        workspace: of the step.
    """
    pairs = torch.unflatten(heads, -1, (-1, 2))
    table = table.reshape(*table.shape[:2], *(1,) * (heads.ndim - 3), *table.shape[2:])
    if not torch.compiler.is_compiling():
        rotated = torch.view_as_complex(pairs)
        rotated = torch.mul(rotated, torch.view_as_complex(table), out=workspace.inplace(rotated))
        return torch.view_as_real(rotated).flatten(-2)
    # The compiler fuses real arithmetic but not complex numbers.
    cosine, sine = table.unbind(-1)
    first, second = pairs.unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)


def rope_table(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> Tensor:
    """Returns (tokens, head_dim / 2, 2) fp32: cosine and sine for each adjacent pair of head channels.

    Axis `a` of `axes_dims[a]` channels rotates pair `j` by `id · theta^(−2j / axes_dims[a])`. Frequencies and
    angles are float64, as in diffusers' `Flux2PosEmbed`.
    """
    angles = [
        ids[:, axis, None] * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def span_ids(text_length: int, grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns (tokens, 4) position ids of a span: text, target, references (`grids` lists the target first)."""
    text = torch.zeros(text_length, 4, dtype=torch.float64)
    text[:, 3] = torch.arange(text_length)
    return torch.cat([text, images_ids(grids)])


def images_ids(grids: tuple[tuple[int, int], ...], first_time: int = 0) -> Tensor:
    """Returns (tokens, 4) position ids of images in row-major order; the first image is at time `first_time`."""
    images = []
    for index, (rows, columns) in enumerate(grids):
        ids = torch.zeros(rows, columns, 4, dtype=torch.float64)
        ids[..., 0] = first_time + REFERENCE_TIME_STEP * index
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)
        images.append(ids.flatten(0, 1))
    return torch.cat(images)

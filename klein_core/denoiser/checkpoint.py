"""How the parameters of this network relate to the names in a `transformer/` folder."""

from __future__ import annotations

from klein_core.checkpoint.layouts import DIFFUSERS
from klein_core.checkpoint.transformer import transformer_sources
from klein_core.variants import TransformerConfig


def checkpoint_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns parameter → diffusers' names, for parameters that fuse several; the others are named alike."""
    return {
        parameter: tuple(piece.name for piece in pieces)
        for parameter, pieces in transformer_sources(config, DIFFUSERS).items()
        if len(pieces) > 1
    }

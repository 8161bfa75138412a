"""The embedded model: where its checkpoint lies. Torch-free."""

from __future__ import annotations

from pathlib import Path

WEIGHTS: Path = Path(__file__).resolve().parent / "weights"
"""The checkpoint in the diffusers folder layout."""

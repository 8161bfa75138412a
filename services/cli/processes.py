"""The suite's processes by name."""

from __future__ import annotations

STAGES = ("text-encoder", "denoiser", "vae-decoder")
ORCHESTRATOR = "orchestrator"
PROCESSES = (*STAGES, ORCHESTRATOR)

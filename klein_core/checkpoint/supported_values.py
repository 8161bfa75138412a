"""Values that configuration files must have where they say them, because others would need code that is not here.

Torch-free. An absent key means klein's value.
"""

from __future__ import annotations

from typing import Any

VAE_LEVELS = 4
TRANSFORMER_ONLY: dict[str, Any] = {"patch_size": 1, "guidance_embeds": False}
VAE_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * VAE_LEVELS,
    "up_block_types": ["UpDecoderBlock2D"] * VAE_LEVELS,
    "patch_size": [2, 2],
    "in_channels": 3,
    "out_channels": 3,
}
SCHEDULER_ONLY: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}

"""Start of the vae-decoder: its dtype and its warm-up by device."""

from __future__ import annotations

import pytest
import torch

from klein_services.vae_decoder.servicer import decoder_dtype
from klein_services.vae_decoder.settings import VaeDecoderSettings


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cpu", None),
        ("checkpoint", "cuda", None),
        ("f32", "cuda", torch.float32),
    ],
)
def test_auto_is_bf16_on_cuda_only(name: str, device: str, dtype: torch.dtype | None) -> None:
    assert decoder_dtype(name, torch.device(device)) is dtype


@pytest.mark.parametrize(
    ("side_px", "on_gpu", "sides"),
    [(0, True, (1024, 512)), (0, False, (64,)), (300, True, (288,)), (1, False, (64,))],
)
def test_the_warm_up_has_the_sizes_that_will_be_served(
    side_px: int, on_gpu: bool, sides: tuple[int, ...]
) -> None:
    assert VaeDecoderSettings(warm_up_size_px=side_px).warm_up_sizes_px(on_gpu) == sides

"""Benchmarks are long and run by hand, so what they prepare is tried here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.health import CONFIG, save_model
from benchmarks.precision import QUANTIZERS
from klein_core.checkpoint.config import read_sampling
from klein_core.denoiser.transformer import FlowTransformer


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_the_precision_benchmark_quantizes_comes_back_about_as_it_was(name: str) -> None:
    weight = torch.randn(576, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    decoded = QUANTIZERS[name](weight).dense(torch.float32, 0, 576)
    error = (decoded - weight.float()).norm() / weight.float().norm()
    assert 0 < error < 0.15


def test_the_health_benchmarks_checkpoint_loads(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert read_sampling(tmp_path).is_distilled
    assert FlowTransformer.from_folder(tmp_path).config == CONFIG

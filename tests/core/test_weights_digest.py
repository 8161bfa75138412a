"""Digests of weights change with every noticeable change of a model, and agree between equal models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from klein_core.checkpoint.weights import DIGEST_SAMPLES, weights_digest
from klein_core.quantization.fp8 import Int8Weight
from klein_core.quantization.quantized_weight import set_weight


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.BatchNorm1d(96))


def test_equal_weights_have_equal_digests_whatever_their_strides(module):
    twin = copy.deepcopy(module)
    twin[0].weight.data = twin[0].weight.data.t().contiguous().t()
    assert weights_digest(twin) == weights_digest(module)


def test_any_noticeable_change_shows(module):
    digests = {
        weights_digest(module),
        weights_digest(module, "a tokenizer"),
        weights_digest(module, "a", "b"),
    }
    digests.add(weights_digest(module, "ab"))
    for change in (
        lambda m: m[0].weight.data.mul_(1.001),
        lambda m: m[1].running_var.add_(1e-3),
        lambda m: m.to(torch.bfloat16),
        lambda m: set_weight(m, "0.weight", Int8Weight.of(m[0].weight.data)),
    ):
        changed = copy.deepcopy(module)
        change(changed)
        digests.add(weights_digest(changed))
    assert len(digests) == 8


def test_every_part_of_a_large_tensor_counts():
    large = nn.Linear(1, 50 * DIGEST_SAMPLES, bias=False)
    before = weights_digest(large)
    for start in range(0, 50 * DIGEST_SAMPLES, 10 * DIGEST_SAMPLES):
        changed = copy.deepcopy(large)
        changed.weight.data[start : start + 100] += 1
        assert weights_digest(changed) != before


@pytest.mark.parametrize("first", [1, 2048])
@pytest.mark.parametrize("shape", [(3072, 3072), (1024, 4096), (27648, 3072)], ids=str)
def test_every_range_of_columns_counts(shape, first):
    large = nn.Linear(*reversed(shape), bias=False).requires_grad_(False)
    before = weights_digest(large)
    large.weight[:, first : first + 1024] += 1
    assert weights_digest(large) != before

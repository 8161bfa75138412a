"""The matrix product: row ranges of it are the same numbers as the whole."""

from __future__ import annotations

import pytest
import torch

from klein_core.linear import Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_range_is_a_product_with_those_rows(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    linear = Linear(8, 12).to(dtype)
    tokens = torch.randn(2, 5, 8, generator=generator).to(dtype)
    part = Linear(8, 4).to(dtype)
    with torch.no_grad():
        part.weight.copy_(linear.weight[3:7])
        assert torch.equal(linear.rows(tokens, 3, 7), part(tokens))
        assert torch.equal(linear.rows(tokens, 0, 12), linear(tokens))


def test_no_tokens_are_no_work():
    linear = Linear(8, 12)
    assert linear(torch.empty(1, 0, 8)).shape == (1, 0, 12)
    assert linear.rows(torch.empty(1, 0, 8), 3, 7).shape == (1, 0, 4)

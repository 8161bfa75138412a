"""What only a CUDA device can show of quantized weights: products in 8 and 4 bits, and the memory that they take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klein_core.denoiser.transformer import FlowTransformer
from klein_core.linear import Linear
from klein_core.pico import WEIGHTS
from klein_core.quantization.quantized_weight import (
    Capability,
    capability_of,
    multiplies_float4,
    multiplies_float8,
    set_weight,
)
from tests.core.test_quantized_weight import KINDS, matrix
from tests.tiny.transformer import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
BOUNDS = dict.fromkeys(KINDS, 0.15) | {"fp8": 0.04, "fp8 a row": 0.04, "int8": 0.01}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def capability() -> Capability:
    found = capability_of(DEVICE)
    assert found is not None
    return found


def layer_of(kind: str) -> tuple[Linear, Tensor]:
    write, read = KINDS[kind]
    file = write(matrix(384, 256), input_scale=None) if kind == "fp8" else write(matrix(384, 256))
    layer = Linear(256, 384)
    set_weight(layer, "weight", read(file))
    return layer.to(DEVICE), file.values


@pytest.mark.parametrize("kind", KINDS)
def test_weights_unfold_to_the_same_bits(kind: str):
    layer, values = layer_of(kind)
    assert torch.equal(layer.weight.dense(torch.bfloat16).cpu(), values.bfloat16())
    assert torch.equal(layer.weight.dense(torch.float32, 130, 270).cpu(), values[130:270])


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str):
    layer, values = layer_of(kind)
    # Inputs of the size that the writer's static scale is made for.
    generator = torch.Generator().manual_seed(1)
    tokens = (torch.randn(3, 33, 256, generator=generator).clamp(-4, 4) * 0.5).bfloat16()
    exact = tokens.float() @ values.t()
    by_device = multiplies_float8 if kind.startswith("fp8") else multiplies_float4
    is_native = "int8" not in kind and by_device(capability())
    inputs = tokens.to(DEVICE)
    assert layer.weight.multiplies(inputs, 0, 384) is is_native
    result = layer(inputs)
    assert result.dtype == torch.bfloat16
    assert relative_error(result.cpu(), exact) < BOUNDS[kind]
    assert relative_error(layer.rows(inputs, 128, 384), result[..., 128:]) < 1e-2
    out = torch.empty_like(result)
    assert layer(inputs, out).data_ptr() == out.data_ptr()


def test_memory_after_quantizing_at_load():
    def allocated(quantization: str) -> int:
        before = torch.cuda.memory_allocated()
        transformer = FlowTransformer.from_folder(
            WEIGHTS, device=DEVICE, dtype=torch.bfloat16, quantization=quantization
        )
        after = torch.cuda.memory_allocated()
        del transformer
        return after - before

    assert allocated("fp8") <= 0.64 * allocated("none")

"""What only a CUDA device can show: the same pictures there, and packing that changes nothing but rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.packing import Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.pipeline import Pipeline
from tests.tiny.adapters import FORMATS
from tests.tiny.checkpoint import save_tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_checkpoint(folder)
    return folder


def test_adapters_in_a_packed_step_equal_each_span_alone(checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_folder(checkpoint, device="cuda")
    model = pipeline.transformer
    oracle = Flux2Transformer2DModel.from_pretrained(checkpoint / "transformer")
    read = [
        pipeline.read_adapter(FORMATS[form].write(oracle).save(tmp_path / f"{form}.safetensors"))
        for form in ("kohya", "lokr-w2", "loha")
    ]
    generator = torch.Generator().manual_seed(0)

    def span(rows: int, *adapters: ScaledAdapter) -> Span:
        prompt = torch.randn(64, model.config.joint_attention_dim, generator=generator)
        latents = torch.randn(rows, 6, model.config.in_channels, generator=generator)
        return Span(prompt.cuda(), latents.cuda(), (), 0.7, adapters=adapters)

    one, other, third = (ScaledAdapter(adapter, 0.5) for adapter in read)
    spans = [span(8, one), span(8), span(8, other, one), span(8, one), span(4, third), span(4)]
    with torch.no_grad():
        together = model(spans)
        plain = model([replace(each, adapters=()) for each in spans])
        for each, got, unadapted in zip(spans, together, plain, strict=True):
            alone = model([each])[0]
            assert float((got - alone).norm() / alone.norm()) <= 1e-5
            assert torch.equal(got, unadapted) == (not each.adapters)


def test_pictures_are_those_of_the_cpu(checkpoint: Path) -> None:
    arguments = {"width_px": 96, "height_px": 128, "seeds": [3], "step_count": 3}
    on_cpu, on_cuda = (
        next(Pipeline.from_folder(checkpoint, device=device).generate("a red circle", **arguments)).int()
        for device in ("cpu", "cuda")
    )
    # Convolutions may round to TF32 there.
    assert (on_cpu - on_cuda).abs().float().mean() < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_packed_step_equals_each_span_alone(checkpoint: Path, dtype: torch.dtype, tolerance: float) -> None:
    model = FlowTransformer.from_folder(checkpoint, device="cuda", dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    channels, joint = model.config.in_channels, model.config.joint_attention_dim
    spans = [
        Span(draw(64, joint), draw(8, 6, channels), (), 1.0),
        Span(draw(64, joint), draw(4, 4, channels), (draw(6, 4, channels),), 0.7),
        Span(draw(64, joint), draw(8, 6, channels), (draw(3, 5, channels), draw(2, 2, channels)), 0.4),
    ]
    with torch.no_grad():
        together = model(spans)
        alone = [model([span])[0] for span in spans]
    for one, other in zip(together, alone, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) <= tolerance


def test_cached_references_give_the_pictures_of_the_cpu(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, reference_cache=True)
    on_cpu, on_cuda = (
        FlowTransformer.from_folder(tmp_path, device=device, dtype=torch.float32)
        for device in ("cpu", "cuda")
    )
    generator = torch.Generator().manual_seed(0)
    channels, joint = on_cpu.config.in_channels, on_cpu.config.joint_attention_dim
    references = [torch.randn(rows, 5, channels, generator=generator) for rows in (4, 7)]
    span = Span(torch.randn(64, joint, generator=generator), torch.randn(8, 6, channels, generator=generator))
    with torch.no_grad():
        wanted, got = (
            model([replace(span, reference_cache=model.reference_cache(references))])[0].cpu()
            for model in (on_cpu, on_cuda)
        )
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-4

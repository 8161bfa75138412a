"""Compiled blocks: how many programs, nothing compiled after the warm-up, no host value inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from klein_core.denoiser.offload import offload_blocks
from klein_core.denoiser.packing import Span
from klein_services.denoiser.warmup import compile_steps
from tests.services.fakes.denoiser_server import CONFIG, tiny_transformer


@pytest.fixture
def compiler() -> Iterator[None]:
    """Restores the process's compiler afterwards."""
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def span(rows: int, columns: int, text: int = 7, references: Sequence[tuple[int, int]] = ()) -> Span:
    generator, channels = torch.Generator().manual_seed(rows), CONFIG.in_channels
    return Span(
        torch.randn(text, CONFIG.joint_attention_dim, generator=generator),
        torch.randn(rows, columns, channels, generator=generator),
        tuple(torch.randn(*grid, channels, generator=generator) for grid in references),
        0.5,
    )


@pytest.mark.usefixtures("compiler")
def test_blocks_compile_once_for_each_kind_of_step_and_never_after_the_warm_up() -> None:
    programs: list[torch.fx.GraphModule] = []

    def count(program: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        programs.append(program)
        return program.forward

    model, plain = tiny_transformer(), tiny_transformer()
    model.compile_blocks(backend=count)
    with torch.inference_mode():
        model([span(4, 4)])
        # Double-stream blocks, single-stream blocks, the final block.
        assert len(programs) == 3
        model([span(6, 4)])
        model([span(8, 8, text=9, references=[(3, 5)])])
        assert len(programs) == 3
        host_values = [node for program in programs for node in program.graph.nodes if node.target == "item"]
        assert not host_values
        # Without steps: only what ends the warm-up.
        compile_steps(lambda trajectories: None, lambda width_px, height_px: None, packs=False)
        pair = [span(4, 4), span(4, 4)]
        for got, wanted in zip(model(pair), plain(pair), strict=True):
            assert torch.allclose(got, wanted, atol=1e-5)
        assert len(programs) == 3


def test_blocks_are_compiled_or_offloaded_never_both() -> None:
    offloaded, compiled = tiny_transformer(), tiny_transformer()
    offload_blocks(offloaded, "cpu")
    with pytest.raises(RuntimeError, match="offloaded blocks cannot be compiled"):
        offloaded.compile_blocks()
    compiled.compile_blocks(backend="eager")
    with pytest.raises(RuntimeError, match="compiled blocks cannot be offloaded"):
        offload_blocks(compiled, "cpu")

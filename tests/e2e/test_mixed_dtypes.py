"""Four real processes whose parts have different element types give the bytes of the pipeline of the same mix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.running_suite import Case, encoder_calls, picture, running_suite
from tests.tiny.checkpoint import save_tiny_checkpoint

REFERENCE = picture(96, 80, 1)


@pytest.mark.parametrize("other", ["vae", "text_encoder"])
def test_a_part_in_fp32_next_to_parts_in_bf16(tmp_path: Path, other: str) -> None:
    save_tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16, part_dtypes={other: torch.float32})
    drawn = Case("a large red heart", size=(80, 64), seeds=(7,))
    edited = Case("make the background blue", references=(REFERENCE,), seeds=(3,))
    with running_suite(tmp_path, tmp_path / "model") as running:
        # Alone, then from the cache, both at once.
        for cases in ([drawn], [edited], [drawn, edited]):
            for case, generation in zip(cases, running.ask(*cases), strict=True):
                expected = case.expected(running.pipeline, running.default_size)
                assert [image.data for image in generation.images] == expected
                assert bool(sum(encoder_calls(generation).values())) == (len(cases) == 1)
        new = [drawn.afresh(), edited.afresh()]
        for case, generation in zip(new, running.ask(*new), strict=True):
            assert [image.data for image in generation.images] == case.expected(
                running.pipeline, running.default_size
            )

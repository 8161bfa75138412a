"""Packing: in any mix of spans, each has the result that it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_core.denoiser.packing import Packing, Span
from tests.tiny.transformer import random_span, relative_error, tiny_oracle, twin

OURS = twin(tiny_oracle())
TOLERANCE = 1e-5

grid = st.tuples(st.integers(1, 5), st.integers(1, 5))
spans = st.builds(
    lambda grids, sigma, text_length, seed: random_span(
        grids, sigma=sigma, text_length=text_length, seed=seed
    ),
    grids=st.lists(grid, min_size=1, max_size=4),
    sigma=st.floats(0.01, 1),
    text_length=st.integers(1, 9),
    seed=st.integers(0, 9),
)


def assert_each_as_alone(mix: list[Span]) -> None:
    with torch.no_grad():
        for velocity, span in zip(OURS(mix), mix, strict=True):
            assert velocity.shape == span.latents.shape
            assert relative_error(velocity, OURS([span])[0]) < TOLERANCE


@settings(deadline=None, max_examples=8)
@given(mix=st.lists(spans, min_size=2, max_size=5))
def test_any_mix(mix: list[Span]):
    assert_each_as_alone(mix)


@pytest.mark.parametrize("gradients", [False, True])
def test_every_kind_of_mix_in_any_order(gradients: bool):
    alike = [random_span([(3, 4)], sigma=s, seed=i) for i, s in enumerate((0.1, 0.5, 0.9))]
    # As many tokens as `alike` in all, yet cut differently.
    same_total = random_span([(2, 4), (2, 2)], seed=5, sigma=0.4)
    turned = random_span([(4, 3)], seed=8, sigma=0.4)
    others = [random_span([(5, 2), (1, 3), (4, 4)], seed=6, text_length=3), random_span([(1, 1)], seed=7)]
    mix = [others[0], alike[0], same_total, alike[1], turned, others[1], alike[2]]
    with torch.set_grad_enabled(gradients):
        expected = [OURS([span])[0] for span in mix]
        for order in (range(7), reversed(range(7)), (3, 1, 6, 0, 5, 2, 4), (1, 3, 6), (1, 4), (1, 2)):
            picked = list(order)
            for velocity, index in zip(OURS([mix[i] for i in picked]), picked, strict=True):
                assert relative_error(velocity, expected[index]) < TOLERANCE


def test_a_span_does_not_see_its_neighbors():
    mix = [random_span([(3, 4), (2, 2)], seed=1), random_span([(2, 2)], seed=2, sigma=0.3)]
    with torch.no_grad():
        before = OURS(mix)
        noisy = Span(mix[1].prompt_embedding * 50, mix[1].latents + 9, (), 0.9)
        after = OURS([mix[0], noisy])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_equal_spans_share_one_attention_call(monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *tensors: calls.append(tensors[0].shape[0]) or original(*tensors),
    )
    alike = [random_span([(3, 4)], seed=i) for i in range(3)]
    other = random_span([(2, 2)], seed=5)
    layers = OURS.config.num_layers + OURS.config.num_single_layers
    with torch.no_grad():
        OURS(alike)
        assert calls == [3] * layers
        calls.clear()
        OURS([alike[0], other, *alike[1:]])
    assert sorted(calls) == [1] * layers + [3] * layers


@pytest.mark.timeout(600)
def test_compiled_blocks_give_the_same():
    oracle = tiny_oracle(num_layers=1, num_single_layers=2)
    plain, compiled = twin(oracle), twin(oracle)
    compiled.compile_blocks(backend="eager")
    with torch.no_grad():
        for span in (random_span([(3, 4)]), random_span([(5, 7), (2, 2)], text_length=5)):
            assert relative_error(compiled([span])[0], plain([span])[0]) < TOLERANCE


@settings(deadline=None, max_examples=15)
@given(mix=st.lists(spans, min_size=1, max_size=4))
def test_joining_and_splitting_are_inverse(mix: list[Span]):
    packing = Packing.of(mix)
    text = packing.pack([torch.randn(span.text_length, 2) for span in mix])
    image = packing.pack([torch.randn(span.image_length, 2) for span in mix])
    joint = packing.join(text, image)
    again_text, again_image = packing.split(joint, text.shape[1])
    assert torch.equal(again_text, text)
    assert torch.equal(again_image, image)
    targets = packing.unpack(packing.targets(joint), packing.target_lengths)
    images = packing.unpack(image, packing.image_lengths)
    for target, tokens in zip(targets, images, strict=True):
        assert torch.equal(target, tokens[: target.shape[0]])

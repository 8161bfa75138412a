"""Applying adapters: spans with different ones share a step, and each has the result that it has alone."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.apply import TokenStream, apply_adapters
from klein_core.denoiser.adapters.key_mapping import layer_targets
from klein_core.denoiser.adapters.reader import read_adapter
from klein_core.denoiser.packing import Span, exclude_from_compile
from klein_core.denoiser.sampler import Trajectory, packed_step
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear
from klein_core.quantization.quantized_weight import QuantizedWeight
from tests.tiny.adapters import FORMATS, merged
from tests.tiny.transformer import oracle_velocity, random_span, relative_error, tiny_oracle, twin

ORACLE = tiny_oracle()
OURS = twin(ORACLE)
TOLERANCE = 1e-5
KINDS = ("diffusers", "kohya", "lokr-w2", "loha")


def digest(transformer: FlowTransformer) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        whole.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


UNTOUCHED = digest(OURS)


def load(folder: Path, kind: str, seed: int = 0, transformer: FlowTransformer = OURS) -> Adapter:
    oracle = tiny_oracle(
        num_layers=transformer.config.num_layers, num_single_layers=transformer.config.num_single_layers
    )
    path = FORMATS[kind].write(oracle, seed=seed).save(folder / f"{kind}.safetensors")
    return read_adapter(path, layer_targets(transformer), device="cpu", dtype=transformer.dtype)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [load(folder, kind, seed) for seed, kind in enumerate(KINDS)]


def with_adapters(span: Span, *wanted: tuple[Adapter, float]) -> Span:
    return replace(span, adapters=tuple(ScaledAdapter(*each) for each in wanted))


def velocities(spans: list[Span]) -> list[Tensor]:
    with torch.no_grad():
        return OURS(spans)


def assert_each_as_alone(mix: list[Span]) -> None:
    """Asserts equal bits for spans without adapters, and equality up to rounding for the others."""
    plain = velocities([replace(span, adapters=()) for span in mix])
    for result, span, unadapted in zip(velocities(mix), mix, plain, strict=True):
        if span.adapters:
            assert relative_error(result, velocities([span])[0]) < TOLERANCE
            assert relative_error(result, unadapted) > 1e-3
        else:
            assert torch.equal(result, unadapted)
    assert digest(OURS) == UNTOUCHED
    assert not any(linear.adaptations for linear in OURS.linears.values())


wishes = st.lists(
    st.tuples(st.integers(0, len(KINDS) - 1), st.sampled_from([-1.5, 0.4, 1.0])),
    max_size=2,
    unique_by=lambda w: w[0],
)
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=6)
@given(
    mix=st.lists(st.tuples(grids, st.integers(1, 6), st.integers(0, 9), wishes), min_size=2, max_size=5),
    alike=st.booleans(),
)
def test_any_mix(adapters: list[Adapter], mix: list, alike: bool):
    spans = []
    for sizes, text_length, seed, wanted in mix:
        shape = (
            {"grids": mix[0][0], "text_length": 5} if alike else {"grids": sizes, "text_length": text_length}
        )
        span = random_span(**shape, seed=seed, sigma=(seed + 1) / 11)
        spans.append(with_adapters(span, *((adapters[index], scale) for index, scale in wanted)))
    assert_each_as_alone(spans)


def test_neighbors_and_strangers_with_the_same_adapter(adapters: list[Adapter]):
    one, other = (adapters[0], 0.5), (adapters[1], -1.0)
    alike = [random_span([(3, 4)], seed=seed, sigma=0.2 + seed / 10) for seed in range(5)]
    for wanted in ([one], [other], [], [one], [one]), ([one, other], [], [one], [one, other], []):
        assert_each_as_alone([with_adapters(span, *each) for span, each in zip(alike, wanted, strict=True)])


def test_two_adapters_add_up(adapters: list[Adapter]):
    span = random_span([(3, 4), (2, 2)], seed=1)
    deltas = [FORMATS[kind].write(ORACLE, seed=seed).deltas for seed, kind in enumerate(KINDS)]
    together = merged(ORACLE, (deltas[0], 0.7), (deltas[1], -0.4))
    result = velocities([with_adapters(span, (adapters[0], 0.7), (adapters[1], -0.4))])[0]
    assert relative_error(result, oracle_velocity(together, span)) < TOLERANCE


def test_cached_references_are_adapted_too(adapters: list[Adapter]):
    """Cached keys and values depend on the adapters, so a cache is valid for spans with the same ones."""
    wanted = (ScaledAdapter(adapters[0], 0.7), ScaledAdapter(adapters[1], -0.4))
    deltas = [FORMATS[kind].write(ORACLE, seed=seed).deltas for seed, kind in enumerate(KINDS)]
    exact = twin(merged(ORACLE, (deltas[0], 0.7), (deltas[1], -0.4)))
    references = random_span([(2, 3), (3, 2)], seed=4).references + random_span([(1, 2)]).references
    span, other = random_span([(3, 4)], seed=1), random_span([(3, 4)], seed=2)
    with torch.no_grad():
        caches = [
            network.reference_cache(references, each) for network, each in ((OURS, wanted), (exact, ()))
        ]
        assert relative_error(caches[0].keys_values, caches[1].keys_values) < TOLERANCE
        expected = exact([replace(span, reference_cache=caches[1])])[0]
        mix = [other, replace(span, reference_cache=caches[0], adapters=wanted)]
        assert relative_error(OURS(mix)[1], expected) < TOLERANCE


def test_gradients_and_no_gradients_agree(adapters: list[Adapter]):
    mix = [with_adapters(random_span([(2, 2)], seed=seed), (adapters[seed], 1.0)) for seed in range(2)]
    for plain, recorded in zip(velocities(mix), OURS(mix), strict=True):
        assert relative_error(recorded, plain) < TOLERANCE


def test_a_step_without_adapters_does_nothing_more(adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(Linear, "_adapt", lambda self, *arguments: calls.append(arguments))
    span = random_span([(2, 3)])
    velocities([span, span])
    assert not calls
    velocities([with_adapters(span, (adapters[0], 1.0))])
    assert len(calls) > len(OURS.linears)


def test_a_scale_of_nothing_is_no_adapter(adapters: list[Adapter]):
    def run(*wanted: ScaledAdapter) -> Tensor:
        trajectory = Trajectory.from_noise(
            seed=1,
            rows=2,
            columns=2,
            channels=16,
            step_count=2,
            prompt_embedding=random_span([(1, 1)]).prompt_embedding,
            adapters=wanted,
        )
        while not trajectory.finished:
            packed_step(OURS, [trajectory])
        return trajectory.latents

    assert torch.equal(run(), run(ScaledAdapter(adapters[0], 0.0)))
    assert not torch.equal(run(), run(ScaledAdapter(adapters[0], 0.1)))


def test_guidance_adapts_both_predictions(adapters: list[Adapter]):
    span = random_span([(2, 2)])
    trajectory = Trajectory(
        latents=span.latents,
        step_count=4,
        prompt_embedding=span.prompt_embedding,
        negative_prompt_embedding=-span.prompt_embedding,
        guidance_scale=3.0,
        adapters=[ScaledAdapter(adapters[0])],
    )
    assert [len(each.adapters) for each in trajectory.spans] == [1, 1]


def test_a_failed_step_leaves_nothing_behind(adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch):
    span = random_span([(2, 3)])
    plain = velocities([span])[0]
    with monkeypatch.context() as patch:
        patch.setattr(OURS.proj_out, "forward", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            velocities([with_adapters(span, (adapters[0], 1.0))])
    assert torch.equal(velocities([span])[0], plain)


def test_threads_do_not_see_each_others_adapters(adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch):
    """One thread waits in the middle of an adapted step while another one takes a plain step."""
    span = random_span([(2, 3)])
    plain, changed = velocities([span])[0], velocities([with_adapters(span, (adapters[0], 1.0))])[0]
    inside, go_on = threading.Event(), threading.Event()
    forward, results = OURS.x_embedder.forward, []

    def waiting(*arguments: object) -> Tensor:
        if threading.current_thread() is thread:
            inside.set()
            assert go_on.wait(30)
        return forward(*arguments)

    def run() -> None:
        results.append(velocities([with_adapters(span, (adapters[0], 1.0))])[0])

    thread = threading.Thread(target=run)
    monkeypatch.setattr(OURS.x_embedder, "forward", waiting)
    thread.start()
    try:
        assert inside.wait(30)
        assert torch.equal(velocities([span])[0], plain)
    finally:
        go_on.set()
        thread.join()
    assert torch.equal(results[0], changed)


def test_bfloat16(tmp_path: Path):
    oracle = tiny_oracle().to(torch.bfloat16)
    ours = twin(oracle)
    adapter = load(tmp_path, "ai-toolkit", transformer=ours)
    deltas = FORMATS["ai-toolkit"].write(ORACLE).deltas
    span = random_span([(3, 4)], dtype=torch.bfloat16)
    with torch.no_grad():
        result = ours([with_adapters(span, (adapter, 0.5))])[0]
        plain = ours([span])[0]
    exact = oracle_velocity(
        merged(oracle.float(), (deltas, 0.5)), replace(span, latents=span.latents.float())
    )
    assert result.dtype == torch.bfloat16
    assert relative_error(result, exact) < 0.05
    assert relative_error(plain, exact) > 0.2


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantized_weights_take_adapters(tmp_path: Path, quantization: str):
    """An adapter adds the same to quantized weights as to plain weights of the same values."""
    oracle = tiny_oracle(num_layers=1, num_single_layers=2)
    oracle.save_pretrained(tmp_path / "transformer")
    quantized = FlowTransformer.from_folder(tmp_path, quantization=quantization)
    plain = twin(oracle)
    for name, linear in quantized.linears.items():
        if isinstance(linear.weight, QuantizedWeight):
            plain.linears[name].weight.copy_(linear.weight.dense(torch.float32))
    adapter = load(tmp_path, "diffusers", transformer=plain)
    mix = [with_adapters(random_span([(3, 4)]), (adapter, 0.8)), random_span([(2, 2)], seed=2)]
    with torch.no_grad():
        for ours, theirs in zip(quantized(mix), plain(mix), strict=True):
            assert relative_error(ours, theirs) < 1e-4
    assert any(isinstance(linear.weight, QuantizedWeight) for linear in quantized.linears.values())


@pytest.mark.timeout(600)
def test_compiled_layers_leave_adapters_to_plain_code(adapters: list[Adapter]):
    exclude_from_compile()
    plain = OURS.transformer_blocks[0].ff
    compiled = torch.compile(plain, backend="eager", dynamic=True)
    tokens = torch.randn(1, 12, OURS.config.hidden_size)
    row_counts = {TokenStream.IMAGE: [[5, 7]]}
    with torch.no_grad():
        for wanted in ((), (ScaledAdapter(adapters[0], 1.0),), ()):
            with apply_adapters(OURS.linears, row_counts, [(), wanted]):
                assert relative_error(compiled(tokens, Workspace()), plain(tokens, Workspace())) < TOLERANCE


@pytest.mark.timeout(600)
def test_adapters_of_other_layers_do_not_compile_anew(tmp_path: Path):
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = twin(tiny_oracle(num_layers=1, num_single_layers=1))
    exclude_from_compile()
    compiled.transformer_blocks[0].compile(dynamic=True, backend=counting)
    whole, span = load(tmp_path, "diffusers", transformer=compiled), random_span([(3, 4)])
    layers = ("transformer_blocks.0.ff.linear_in", "transformer_blocks.0.attn.to_qkv")
    of_one = [replace(whole, slices={layer: whole.slices[layer]}) for layer in layers]
    with torch.no_grad():
        for wanted in ([], [of_one[0]]):
            compiled([with_adapters(span, *((adapter, 1.0) for adapter in wanted))])
        programs = len(graphs)
        assert programs
        for wanted in ([], of_one[1:], of_one, [whole]):
            compiled([with_adapters(span, *((adapter, 1.0) for adapter in wanted))])
    assert len(graphs) == programs


def test_an_adapter_of_another_model_is_no_silent_nothing(adapters: list[Adapter]):
    smaller = twin(tiny_oracle(num_layers=1, num_single_layers=1))
    with pytest.raises(KeyError), torch.no_grad():
        smaller([with_adapters(random_span([(2, 3)]), (adapters[0], 1.0))])
    assert not any(linear.adaptations or linear.is_adapted for linear in smaller.linears.values())


def test_the_end_of_one_threads_step_leaves_anothers_adapters(adapters: list[Adapter]):
    span = with_adapters(random_span([(2, 3)]), (adapters[0], 1.0))
    (expected,) = velocities([span])
    row_counts = {stream: [[1]] for stream in TokenStream}
    other = threading.Thread(target=lambda: _begin_and_end(row_counts, adapters[0]))
    with apply_adapters(OURS.linears, row_counts, [(ScaledAdapter(adapters[0], 1.0),)]):
        other.start()
        other.join()
        assert all(linear.is_adapted for linear in OURS.linears.values())
    assert not any(linear.is_adapted for linear in OURS.linears.values())
    assert torch.equal(velocities([span])[0], expected)


def _begin_and_end(row_counts: dict[TokenStream, list[list[int]]], adapter: Adapter) -> None:
    with apply_adapters(OURS.linears, row_counts, [(ScaledAdapter(adapter, 1.0),)]):
        pass

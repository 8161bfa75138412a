"""Adapter formats: each gives the result of an independent writer of the format, and of diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.key_mapping import layer_targets
from klein_core.denoiser.adapters.reader import describe_adapter, read_adapter
from tests.tiny.adapters import FORMATS, Deltas, Format, Written, authors_targets, diffusers_targets, merged
from tests.tiny.checkpoint import tiny_pipeline
from tests.tiny.transformer import oracle_velocity, random_span, relative_error, tiny_oracle, twin

ORACLE = tiny_oracle(num_layers=1, num_single_layers=2)
OURS = twin(ORACLE)
LAYERS = layer_targets(OURS)
SPAN = random_span([(3, 4), (2, 2)], seed=3)
TOLERANCE = 1e-5


def read(path: Path) -> Adapter:
    return read_adapter(path, LAYERS, device="cpu", dtype=torch.float32)


def velocity(*adapters: tuple[Adapter, float]) -> torch.Tensor:
    scaled = tuple(ScaledAdapter(adapter, scale) for adapter, scale in adapters)
    with torch.no_grad():
        return OURS([replace(SPAN, adapters=scaled)])[0]


def expected(*scaled: tuple[Deltas, float]) -> torch.Tensor:
    return oracle_velocity(merged(ORACLE, *scaled), SPAN)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_means_what_its_writer_says(name: str, tmp_path: Path):
    form = FORMATS[name]
    written = form.write(ORACLE, seed=1)
    adapter = read(written.save(tmp_path / "style.safetensors"))
    assert relative_error(velocity((adapter, 0.6)), expected((written.deltas, 0.6))) < TOLERANCE
    assert adapter.name == "style"
    assert adapter.summary == describe_adapter(tmp_path / "style.safetensors", LAYERS)
    assert adapter.summary.layer_count == len(form.targets(ORACLE))
    assert adapter.summary.rank == (0 if name == "lokr" else form.rank)
    assert adapter.summary.kind.lower() == form.kind.split("-")[0]


def test_any_single_layer(tmp_path: Path):
    """Each layer name stands for the right rows, in both namings."""
    plain = velocity()
    for name, targets in (("diffusers", diffusers_targets), ("ai-toolkit", authors_targets)):
        whole = FORMATS[name].write(ORACLE, seed=2)
        for index, target in enumerate(targets(ORACLE)):
            # Names that our network has too need no mapping; one in five of them stands for all.
            if target.name in OURS.linears and index % 5:
                continue
            marked = f".{target.name}.lora_"
            tensors = {key: value for key, value in whole.tensors.items() if marked in key}
            parameters = target.deltas(torch.zeros(target.shape)).keys()
            written = Written(tensors, {}, {key: whole.deltas[key] for key in parameters})
            adapter = read(written.save(tmp_path / "one.safetensors"))
            result = velocity((adapter, 1.0))
            assert relative_error(result, expected((written.deltas, 1.0))) < TOLERANCE, target.name
            assert not torch.equal(result, plain), target.name


def test_part_of_a_fused_projection(tmp_path: Path):
    size = OURS.config.hidden_size
    down, up = torch.randn(2, size), torch.randn(3 * size, 2)
    name = "diffusion_model.single_blocks.{}.linear1_qkv.lora_{}.weight"
    last = OURS.config.num_single_layers - 1
    tensors = {name.format(last, "A"): down, name.format(last, "B"): up}
    rows = ORACLE.state_dict()[f"single_transformer_blocks.{last}.attn.to_qkv_mlp_proj.weight"].shape[0]
    delta = torch.zeros(rows, size)
    delta[: 3 * size] = up @ down
    deltas = {f"single_transformer_blocks.{last}.attn.to_qkv_mlp_proj.weight": delta}
    adapter = read(Written(tensors, {}, deltas).save(tmp_path / "part.safetensors"))
    assert relative_error(velocity((adapter, 1.0)), expected((deltas, 1.0))) < TOLERANCE


def test_alpha_of_some_layers_by_name(tmp_path: Path):
    form = FORMATS["diffusers-metadata"]
    patterns = {"transformer.alpha_pattern": {"attn.to_q": 9, "^proj_out": 0.5}}
    metadata = {**form.metadata, **patterns}
    written = type(form)(form.targets, form.prefix, metadata=metadata).write(ORACLE)
    for name, delta in written.deltas.items():
        alpha = 9 if name.endswith("attn.to_q.weight") else 0.5 if name == "proj_out.weight" else 5
        written.deltas[name] = delta * alpha / 5
    adapter = read(written.save(tmp_path / "patterns.safetensors"))
    assert relative_error(velocity((adapter, 1.0)), expected((written.deltas, 1.0))) < TOLERANCE


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_peft_configuration_without_alpha_has_pefts_default(tmp_path: Path):
    form = FORMATS["diffusers-metadata"]
    metadata = {key: value for key, value in form.metadata.items() if not key.endswith("lora_alpha")}
    path = replace(form, metadata=metadata).write(ORACLE).save(tmp_path / "silent.safetensors")
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=merged(ORACLE))
    pipeline.load_lora_weights(str(path), adapter_name="silent")
    theirs = oracle_velocity(pipeline.transformer, SPAN)
    assert relative_error(velocity((read(path), 1.0)), theirs) < TOLERANCE


def test_rank_stabilized(tmp_path: Path):
    form = FORMATS["diffusers-metadata"]
    metadata = {**form.metadata, "transformer.use_rslora": True}
    written = type(form)(form.targets, form.prefix, metadata=metadata).write(ORACLE)
    deltas = {name: delta * form.rank**0.5 for name, delta in written.deltas.items()}
    adapter = read(written.save(tmp_path / "stabilized.safetensors"))
    assert relative_error(velocity((adapter, 1.0)), expected((deltas, 1.0))) < TOLERANCE


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`", "ignore:While injecting the PEFT adapters"
)
@pytest.mark.parametrize(
    "names",
    [
        ("diffusers", "kohya"),
        ("diffusers-metadata",),
        ("ai-toolkit",),
        ("ai-toolkit-diffusers", "peft-authors"),
        ("peft",),
        ("lokr-square",),
        ("plain-metadata",),
    ],
    ids="+".join,
)
def test_as_diffusers(names: tuple[str, ...], tmp_path: Path):
    """Compares those layers that diffusers reads correctly; see `diffusers_reads`."""
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=merged(ORACLE))
    scales = [0.7, -1.3][: len(names)]
    adapters = []
    for index, name in enumerate(names):
        written = FORMATS[name].write(ORACLE, seed=index)
        for tensor in list(written.tensors):
            if not diffusers_reads(name, tensor):
                del written.tensors[tensor]
        path = written.save(tmp_path / f"{index}.safetensors")
        pipeline.load_lora_weights(str(path), adapter_name=f"adapter_{index}")
        adapters.append(read(path))
    pipeline.set_adapters([f"adapter_{index}" for index in range(len(names))], scales)
    theirs = oracle_velocity(pipeline.transformer, SPAN)
    assert relative_error(velocity(*zip(adapters, scales, strict=True)), theirs) < TOLERANCE
    assert relative_error(velocity(), theirs) > 0.1


@pytest.mark.parametrize(
    "entries",
    [
        *({key: "12"} for key in ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")),
        *({key: "true"} for key in ("use_rslora", "rank_stabilized")),
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_a_bare_header_entry_changes_nothing_as_in_diffusers_and_is_noted(
    entries: dict[str, str], tmp_path: Path
):
    form = replace(FORMATS["diffusers"], plain_metadata=entries)
    path = form.write(ORACLE, seed=1).save(tmp_path / "style.safetensors")
    pipeline = tiny_pipeline()
    pipeline.register_modules(transformer=merged(ORACLE))
    pipeline.load_lora_weights(str(path), adapter_name="style")
    adapter = read(path)
    ours = velocity((adapter, 1.0))
    assert relative_error(ours, oracle_velocity(pipeline.transformer, SPAN)) < TOLERANCE
    assert relative_error(ours, velocity((adapter, 4.0))) > 0.1
    [note] = adapter.summary.notes
    assert note.startswith(f"header entry {next(iter(entries))}")
    assert f"alpha is the rank, {form.rank}" in note


@pytest.mark.parametrize(
    "form",
    [
        replace(FORMATS["kohya"], plain_metadata={"ss_network_alpha": "1.5", "ss_network_dim": "3"}),
        replace(FORMATS["diffusers"], plain_metadata={"lora_alpha": "3.0", "rank": "3"}),
        replace(FORMATS["diffusers-metadata"], plain_metadata={"lora_alpha": "9"}),
    ],
    ids=["alpha tensors", "alpha is the rank", "PEFT's configuration"],
)
def test_an_entry_that_could_change_nothing_is_not_noted(form: Format, tmp_path: Path):
    written = form.write(ORACLE)
    adapter = read(written.save(tmp_path / "style.safetensors"))
    assert adapter.summary.notes == ()
    assert relative_error(velocity((adapter, 1.0)), expected((written.deltas, 1.0))) < TOLERANCE


def diffusers_reads(name: str, tensor: str) -> bool:
    """Whether diffusers applies a tensor of a format to the right rows.

    It swaps the head's halves under the authors' name, drops modulations of kohya's and refuses everything but blocks
    where diffusers' names come after another prefix than `transformer.`.
    """
    if name in ("ai-toolkit-diffusers", "peft"):
        return "transformer_blocks" in tensor
    return "adaLN" not in tensor and (name != "kohya" or "modulation" not in tensor)

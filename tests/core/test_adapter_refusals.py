"""Adapter files that cannot be applied are refused whole, with the names of all tensors at fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from klein_core.denoiser.adapters.key_mapping import layer_targets
from klein_core.denoiser.adapters.reader import describe_adapter, read_adapter
from klein_core.errors import CheckpointError
from tests.tiny.adapters import FORMATS, Written
from tests.tiny.transformer import tiny_oracle, twin

ORACLE = tiny_oracle(num_layers=1, num_single_layers=1)
LAYERS = layer_targets(twin(ORACLE))
LAYER = "transformer.transformer_blocks.0.attn.to_q"
DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
SIZE = 32


def pair(name: str = LAYER, rank: int = 2, inputs: int = SIZE, outputs: int = SIZE) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank, inputs),
        f"{name}.lora_B.weight": torch.ones(outputs, rank),
    }


def refusal(path: Path, *, by_header: bool = True) -> str:
    """Returns the error of reading; describing must raise the same if the header shows the problem."""
    with pytest.raises(CheckpointError) as reading:
        read_adapter(path, LAYERS, device="cpu", dtype=torch.float32)
    if by_header:
        with pytest.raises(CheckpointError) as describing:
            describe_adapter(path, LAYERS)
        assert str(describing.value) == str(reading.value)
    assert str(path.parent) not in str(reading.value)
    return str(reading.value)


CASES: dict[str, tuple[dict[str, Tensor], list[str]]] = {
    "half a pair": ({DOWN: torch.ones(2, SIZE)}, ["incomplete", "to_q (has down)"]),
    "alpha alone": ({**pair(), "proj_out.alpha": torch.tensor(1.0)}, ["incomplete", "proj_out (has alpha)"]),
    "unknown layer": (
        pair("transformer.transformer_blocks.7.attn.to_q"),
        ["does not have", "blocks.7.attn.to_q"],
    ),
    "flux.1": (pair("lora_unet_double_blocks_0_img_mod_lin"), ["does not have", "img_mod_lin"]),
    "another size": (pair(inputs=64), ["do not fit", "down (2, 64)", "(32, 32)"]),
    "another rank": ({**pair(), UP: torch.ones(SIZE, 3)}, ["do not fit", "down (2, 32)", "up (32, 3)"]),
    "no rank": (pair(rank=0), ["do not fit", "(0, 32)"]),
    "a convolution": (
        {DOWN: torch.ones(2, SIZE, 1, 1), UP: torch.ones(SIZE, 2)},
        ["do not fit", "(2, 32, 1, 1)"],
    ),
    "wrong type": (
        {**pair(), DOWN: torch.ones(2, SIZE, dtype=torch.float64)},
        ["not one of F32", f"{DOWN} (F64)"],
    ),
    "text encoder": (pair("text_encoder.layers.0.self_attn.q_proj"), ["text encoder", "q_proj.lora_A"]),
    "text encoder of kohya": (pair("lora_te1_layers_0_self_attn_q_proj"), ["text encoder", "lora_te1"]),
    "DoRA": ({**pair(), f"{LAYER}.dora_scale": torch.ones(SIZE, 1)}, ["DoRA", "dora_scale"]),
    "DoRA of PEFT": ({**pair(), f"{LAYER}.lora_magnitude_vector": torch.ones(SIZE)}, ["DoRA", "magnitude"]),
    "bias": ({**pair(), f"{LAYER}.lora_B.bias": torch.ones(SIZE)}, ["not part of", "lora_B.bias"]),
    "weights": (
        {"transformer_blocks.0.attn.to_q.weight": torch.ones(SIZE, SIZE)},
        ["not part of", "to_q.weight"],
    ),
    "twice": (
        {**pair(), **pair("diffusion_model.transformer_blocks.0.attn.to_q")},
        ["given twice", "to_q.lora_A"],
    ),
    "whole and part": (
        {**pair(), **pair("diffusion_model.double_blocks.0.img_attn.qkv", outputs=3 * SIZE)},
        ["given twice", "attn.to_q", "img_attn.qkv"],
    ),
    "two kinds": ({**pair(), f"{LAYER}.lokr_w1": torch.ones(2, 2)}, ["incomplete", "lokr_w1"]),
    "Kronecker of another size": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2": torch.ones(4, 4)},
        ["do not fit", "lokr_w2 (4, 4)"],
    ),
    "half a factor": (
        {f"{LAYER}.lokr_w1": torch.ones(2, 2), f"{LAYER}.lokr_w2_a": torch.ones(16, 2)},
        ["incomplete", "lokr_w2_a"],
    ),
    "Tucker": (
        {f"{LAYER}.lokr_t2": torch.ones(2, 2), **pair()},
        ["not part of", "lokr_t2"],
    ),
    "alpha of two numbers": (
        {**pair(), f"{LAYER}.alpha": torch.ones(2)},
        ["not a single number", "alpha (2,)"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_the_header(name: str, tmp_path: Path):
    tensors, told = CASES[name]
    message = refusal(Written(tensors).save(tmp_path / "style.safetensors"))
    assert message.startswith("style.safetensors: ")
    for words in told:
        assert words in message


def test_a_file_without_tensors(tmp_path: Path):
    path = tmp_path / "style.safetensors"
    header = b'{"__metadata__": {"format": "pt"}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "without tensors" in refusal(path)


def test_all_problems_are_listed_at_once(tmp_path: Path):
    tensors = {
        **pair("transformer.nothing"),
        DOWN: torch.ones(2, SIZE),
        "text_encoder.a.lora_A.weight": torch.ones(1, 1),
        f"{LAYER}.dora_scale": torch.ones(1),
    }
    message = refusal(Written(tensors).save(tmp_path / "style.safetensors"))
    assert all(words in message for words in ("does not have", "incomplete", "text encoder", "DoRA"))


def test_an_adapter_of_another_model(tmp_path: Path):
    other = tiny_oracle(num_attention_heads=4, num_layers=1, num_single_layers=1)
    written = FORMATS["diffusers"].write(other)
    message = refusal(written.save(tmp_path / "style.safetensors"))
    assert "do not fit each other or the model" in message
    assert "more" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [DOWN, UP, f"{LAYER}.alpha"])
def test_not_finite(name: str, value: float, tmp_path: Path):
    tensors = {**pair(), f"{LAYER}.alpha": torch.tensor(1.0)}
    tensors[name].view(-1)[-1] = value
    message = refusal(Written(tensors).save(tmp_path / "style.safetensors"), by_header=False)
    assert "NaN or infinity" in message
    assert name in message


@pytest.mark.parametrize(
    ("configuration", "told"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ("[" * 100000, "not a JSON object"),
        (json.dumps({"transformer.lora_alpha": "many"}), "not a finite number: lora_alpha"),
        ('{"transformer.lora_alpha": NaN}', "not a finite number: lora_alpha"),
        (json.dumps({"transformer.use_dora": True}), "DoRA"),
        (json.dumps({"transformer.alpha_pattern": {"(a+)+$": 1}}), "not plain layer names"),
        (json.dumps({"transformer.alpha_pattern": {"attn.to_q": None}}), "alpha_pattern.attn.to_q"),
    ],
)
def test_bad_configuration(configuration: str, told: str, tmp_path: Path):
    written = Written(pair(), {"lora_adapter_metadata": configuration})
    assert told in refusal(written.save(tmp_path / "style.safetensors"))


def test_an_alpha_that_is_given_twice(tmp_path: Path):
    configuration = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2.0})}
    written = Written({**pair(), f"{LAYER}.alpha": torch.tensor(1.0)}, configuration)
    message = refusal(written.save(tmp_path / "style.safetensors"))
    assert "alpha given twice" in message
    assert f"{LAYER}.alpha" in message


def _cut(data: bytes) -> bytes:
    return data[:-4]


def _longer(data: bytes) -> bytes:
    return data + b"1234"


def _huge_header(data: bytes) -> bytes:
    return (1 << 60).to_bytes(8, "little") + data[8:]


def _overlapping(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for entry in header.values():
        entry["data_offsets"] = [0, 256]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    "damage", [_cut, _longer, _huge_header, _overlapping, lambda data: b"", lambda data: b"\x80\x02pickle"]
)
def test_not_a_sound_file(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = Written(pair()).save(tmp_path / "style.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert "style.safetensors" in refusal(path)


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"style\.safetensors"):
        read_adapter(tmp_path / "style.safetensors", LAYERS, device="cpu", dtype=torch.float32)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from klein_core.denoiser.adapters import reader

    path = Written(pair()).save(tmp_path / "style.safetensors")
    read_header = reader.read_header

    def read_and_write(path: Path) -> reader.Header:
        header = read_header(path)
        path.write_bytes(path.read_bytes() + b" ")
        return header

    monkeypatch.setattr(reader, "read_header", read_and_write)
    assert "changed while it was read" in refusal(path, by_header=False)


def test_a_whole_alpha_may_be_an_integer(tmp_path: Path):
    form = replace(FORMATS["kohya"], alpha=2)
    path = form.write(ORACLE).save(tmp_path / "style.safetensors")
    adapter = read_adapter(path, LAYERS, device="cpu", dtype=torch.float32)
    factors = {one.factor for slices in adapter.slices.values() for one in slices}
    assert factors == {2 / form.rank}
    assert adapter.size_bytes == sum(
        t.nbytes for n, t in form.write(ORACLE).tensors.items() if "alpha" not in n
    )


@pytest.mark.parametrize("stem", ["my style", "stil-ü", "-x", "x" * 129])
def test_a_file_that_no_request_could_name_is_refused(tmp_path: Path, stem: str):
    path = Written(pair()).save(tmp_path / f"{stem}.safetensors")
    assert "rename the file" in refusal(path, by_header=False)

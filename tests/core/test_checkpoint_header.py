"""A header is accepted only when every byte of the file is accounted for."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from klein_core.checkpoint import header as safetensors_header
from klein_core.checkpoint.header import read_header
from klein_core.errors import CheckpointError


def entry(start=0, stop=8, dtype="F32", shape=(2,), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop], **more}


def write(path, header, data=b"\0" * 8):
    """Writes a file by hand; `header` is a table, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_written_file_is_read_as_it_was_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "none": torch.ones(0, 5),
        "codes": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.tensors["b"].dtype == "BF16"
    assert header.tensors["codes"].dtype == "F8_E4M3"
    data = (tmp_path / "x.safetensors").read_bytes()
    a = header.tensors["a"]
    assert data[a.start : a.start + a.byte_count] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": entry(), "v": entry(4, 12)}, ["overlapping", "v"]),
        ({"w": entry(), "v": entry()}, ["overlapping"]),
        ({"v": entry(4, 12)}, ["after a gap", "v"]),
        ({"w": entry(stop=4, shape=(1,))}, ["4 bytes at its end"]),
        ({"w": entry(), "v": entry(8, 16)}, ["truncated", "v"]),
        ({"w": entry(8, 0)}, ["not a byte range", "w"]),
        ({"w": entry(-8, 0)}, ["not a byte range", "w"]),
        ({"w": entry(shape=(3,))}, ["another number of bytes", "w"]),
        ({"w": entry(dtype="F16")}, ["another number of bytes", "w"]),
        ({"w": entry(dtype="F4", shape=(3,), stop=1)}, ["another number of bytes", "w"]),
        ({"w": entry(dtype="FLOAT")}, ["dtype", "w"]),
        ({"w": entry(dtype=["F32"])}, ["dtype", "w"]),
        ({"w": entry(shape=(-2,))}, ["shape", "w"]),
        ({"w": entry(shape=(2.0,))}, ["shape", "w"]),
        ({"w": entry(shape=(True, 2))}, ["shape", "w"]),
        ({"w": entry(shape=[1] * 17 + [2])}, ["shape", "w"]),
        ({"w": entry(shape=(2**62, 2**62))}, ["another number of bytes", "w"]),
        ({"w": entry(stop=2**70)}, ["not a byte range", "w"]),
        ({"w": {"dtype": "F32", "shape": [2]}}, ["data_offsets", "w"]),
        ({"w": entry(more=1)}, ["dtype, shape and data_offsets", "w"]),
        ({"w": [1]}, ["dtype, shape and data_offsets", "w"]),
        ({"": entry()}, ["names"]),
        ({"a\x1b[31m": entry()}, ["names", "a\\x1b[31m"]),
        ({"n" * 1001: entry()}, ["names"]),
        ({"__metadata__": {"a": 1}, "w": entry()}, ["__metadata__"]),
        ({"__metadata__": [], "w": entry()}, ["__metadata__"]),
        (b'{"w": 1, "w": 1}', ["twice", "w"]),
        (b'{"w": {"dtype": "F32", "dtype": "F32"}}', ["twice", "dtype"]),
        (b'{"w": NaN}', ["NaN"]),
        (b"[]", ["JSON object"]),
        (b" {}", ["JSON object"]),
        (b"{", ["not valid"]),
        (b"{\xff}", ["not valid"]),
        (b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["deep"]),
        (b'{"w":' + b"9" * 5000 + b"}", ["not valid"]),
    ],
)
def test_what_breaks_the_format_is_refused_by_name(tmp_path, header, words):
    message = refusal(write(tmp_path / "x.safetensors", header))
    assert all(word in message for word in words), message
    assert len(message) < 2000
    assert message.isprintable()


def test_names_that_break_are_all_listed(tmp_path):
    header = {f"w{index}": entry(dtype="F9") for index in range(3)} | {"v": entry(shape=(9,))}
    message = refusal(write(tmp_path / "x.safetensors", header))
    assert "w0, w1, w2" in message
    assert "another number of bytes than dtype and shape require: v" in message


def test_a_giant_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "100000000" in refusal(path)
    # A sparse file: the length alone must be enough to refuse it.
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{")
    os.truncate(path, 200_000_000)
    assert "100000000" in refusal(path)


def test_a_header_of_too_many_values_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAXIMUM_VALUES", 1000)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    message = refusal(write(tmp_path / "x.safetensors", b'{"w": [' + b"1," * 1001 + b"1]}"))
    assert "1000 values" in message


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_called_that(tmp_path, kept):
    path = write(tmp_path / "x.safetensors", {"w": entry()})
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated" in refusal(path)


def test_other_formats_are_called_by_their_name(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"w": 1}))
    assert "a pickle, which is never read" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    assert "torch.save" in refusal(path)
    path.write_bytes(b"GGUF" + b"\0" * 60)
    assert "GGUF" in refusal(path)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    assert "is missing" in refusal(tmp_path / "nowhere.safetensors")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refusal(tmp_path / "pipe.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_it_is_read_or_refused_and_nothing_else(tmp_path, data):
    """A file with a few bytes replaced gives a header whose tensors lie inside it, or a CheckpointError."""
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 8), "b": entry(8, 12, shape=(1,))}, b"\0" * 12)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    spans = sorted((tensor.start, tensor.start + tensor.byte_count) for tensor in header.tensors.values())
    assert all(0 <= start <= stop <= len(content) for start, stop in spans)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_it_needs_no_torch():
    script = "import sys, klein_core.checkpoint.header; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

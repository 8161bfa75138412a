"""`klein inspect`: a table for people, JSON for machines, one sentence for what cannot be read."""

import json
import struct
from pathlib import Path

import pytest

from klein_core.pico import WEIGHTS
from klein_services.cli.main import main


def inspect(*arguments: str) -> int:
    try:
        return main(["inspect", *arguments])
    except SystemExit as end:
        return int(end.code or 0)


def test_the_embedded_model_is_a_table_and_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("pico") == 0
    shown = capsys.readouterr().out
    for word in ("transformer", "text_encoder", "vae", "double-stream blocks", "fp32", "not needed"):
        assert word in shown


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect("--json", str(WEIGHTS / "vae")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is True
    [component] = told["components"]
    assert component["component"] == "vae"
    assert component["missing"] == []
    assert {"group", "precision", "tensor_count", "byte_count"} <= component["shares"][0].keys()


def write(path: Path, header: dict[str, object], data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


HOSTILE = {
    "truncated": struct.pack("<Q", 1000) + b"{",
    "giant header": struct.pack("<Q", 2**62) + b"{}",
    "pickle": b"\x80\x04\x95",
    "empty": b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_sentence_and_exit_code_1(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(HOSTILE[kind])
    assert inspect(str(file)) == 1
    shown = capsys.readouterr().err
    assert str(file) in shown.replace("\n", "")
    assert "Traceback" not in shown


def test_a_path_keeps_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("models/myTuned.safetensors", "models"):
        (folder / "myTuned.safetensors").write_bytes(HOSTILE["truncated"])
        assert inspect(name) == 1
        shown = capsys.readouterr().err
        assert name in shown
        assert "Models" not in shown


def test_a_file_s_words_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = {"__metadata__": {"title\x1b[2J": "[red]x\x1b]0;y\x07"}, "img_in.weight": entry}
    assert inspect(str(write(tmp_path / "x.safetensors", header, b"\0" * 4))) == 1
    captured = capsys.readouterr()
    assert "\x1b]0" not in captured.out + captured.err
    assert "[red]x" in captured.out
    assert "missing" in captured.out

"""`klein serve STAGE`: settings as flags, shown and refused by name."""

import json
import re
from pathlib import Path

import pytest

from klein_services.cli.main import main
from klein_services.cli.model_store import RECEIPT
from klein_services.cli.process import PROCESSES


def klein(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("stage", PROCESSES)
def test_check_config_shows_every_setting_with_its_source(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLEIN_LOG_LEVEL", "debug")
    assert klein("serve", stage, "--check-config", "--port", "12345") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("KLEIN_PORT" in line and "12345" in line and "--port" in line for line in lines)
    assert any("KLEIN_LOG_LEVEL" in line and "debug" in line for line in lines)
    assert any("KLEIN_GRACE_SECONDS" in line and "default" in line for line in lines)


def test_a_bad_flag_value_is_one_sentence_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert klein("serve", "denoiser", "--check-config", "--port", "99999") == 2
    err = capsys.readouterr().err
    assert "--port" in err
    assert "65535" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flag", "value"), [("--device", "gpu"), ("--dtype", "f8"), ("--weights-path", "nowhere.safetensors")]
)
def test_a_flag_that_would_stop_the_start_is_refused_by_its_name(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert klein("serve", "denoiser", flag, value) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert flag in err
    assert value in err
    assert "KLEIN_" not in err


def test_a_bad_variable_is_one_sentence_with_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLEIN_METRICS_PORT", "many")
    assert klein("serve", "text-encoder", "--check-config") == 2
    err = capsys.readouterr().err
    assert "KLEIN_METRICS_PORT" in err
    assert "many" in err


def test_check_config_reads_the_routing_table_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "routing.toml"
    table.write_text('[models.a]\ntext_encoder = "t:1"\ndenoiser = 7\n')
    monkeypatch.setenv("KLEIN_ROUTING_TABLE", str(table))
    assert klein("serve", "orchestrator", "--check-config") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "models.a.denoiser is 7" in err
    assert "models.a.vae_decoder is missing" in err


def test_model_is_short_for_model_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert klein("serve", "vae-decoder", "--check-config", "--model", str(tmp_path)) == 0
    assert any(
        "KLEIN_MODEL_PATH" in line and str(tmp_path) in line for line in capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize("is_flag", [True, False])
def test_a_pulled_model_is_meant_by_its_name(
    is_flag: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pulled(tmp_path / "models", "klein-4b", monkeypatch)
    if not is_flag:
        monkeypatch.setenv("KLEIN_MODEL_PATH", "Klein-4B")
    named = ["--model", "Klein-4B"] if is_flag else []
    assert klein("serve", "denoiser", "--check-config", *named) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("KLEIN_MODEL_PATH" in line and str(folder) in line for line in lines)
    assert any("KLEIN_MODEL_NAME" in line and "klein-4b" in line for line in lines)


@pytest.mark.parametrize(
    ("model", "words"), [("klein-4b", "klein pull klein-4b"), ("./nowhere", "no folder or file ./nowhere")]
)
def test_a_missing_model_is_refused_before_a_start(
    model: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(tmp_path))
    assert klein("serve", "text-encoder", "--model", model, "--check-config") == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KLEIN_DEVICE", "gpu0"),
        ("KLEIN_VARIANT", "klein-5b"),
        ("KLEIN_WEIGHTS_PATH", "nowhere.safetensors"),
        ("KLEIN_TOKENIZER_PATH", "nowhere"),
    ],
)
def test_check_config_refuses_what_would_stop_the_start(
    variable: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert klein("serve", "text-encoder", "--check-config") == 2
    err = capsys.readouterr().err
    assert variable in err
    assert value in err


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", "mps"])
def test_check_config_takes_every_device_s_name(device: str) -> None:
    assert klein("serve", "vae-decoder", "--check-config", "--device", device) == 0


def pulled(models: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the receipt that `klein pull` writes, and no model."""
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(models))
    folder = models / name
    folder.mkdir(parents=True)
    (folder / RECEIPT).write_text(json.dumps({"model": name}))
    return folder


@pytest.mark.parametrize("arguments", [["painter"], ["denoiser", "--no-such-flag", "1"]])
def test_what_does_not_exist_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert klein("serve", *arguments) == 2
    assert arguments[-2 if len(arguments) > 1 else 0] in capsys.readouterr().err


@pytest.mark.parametrize("stage", PROCESSES)
def test_help_lists_the_settings(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert klein("serve", stage, "--help") == 0
    out = capsys.readouterr().out
    assert "--metrics-port" in out
    assert "KLEIN_METRICS_PORT" in out
    assert re.search(r"\[default: 946[4-8]\]", out)

"""`klein plan`: from a model's name or files to a command, without torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from klein_core.pico import WEIGHTS
from klein_services.cli.app import app
from klein_services.cli.errors import CliError
from klein_services.cli.model_store import RECEIPT
from klein_services.cli.plan import memory_bytes


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=True)
    if isinstance(result.exception, CliError):
        raise result.exception
    return result.exit_code, result.output


def plan(*arguments: str) -> dict:
    return json.loads(run(*arguments, "--json")[1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 << 30), ("24GB", 24 * 10**9), ("512m", 512 * 10**6), ("1.5 GiB", 3 << 29), ("4096", 4096)],
)
def test_memory_is_read_as_people_write_it(text, expected):
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "12 apples", "1e9"])
def test_other_words_are_no_memory(text):
    with pytest.raises(CliError, match="no amount of memory"):
        memory_bytes(text)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("40GiB", ["klein up --model klein-4b --device cuda"]),
        ("12GiB", ["klein up --model klein-4b --device cuda --quantization fp8"]),
        (
            "10GiB",
            [
                "klein pull klein-4b --precision nvfp4",
                "klein up --model klein-4b-nvfp4 --device cuda --quantization fp8",
            ],
        ),
    ],
)
def test_the_command_suits_the_device(memory, expected):
    assert plan("--model", "klein-4b", "--device-memory", memory)["commands"] == expected


def test_a_precision_can_be_demanded():
    told = plan("--model", "klein-4b", "--device-memory", "13GiB", "--precision", "bf16")
    assert told["commands"] == ["klein up --model klein-4b --device cuda --offload blocks"]
    assert {need["precision"] for need in told["needs"] if need["stage"] == "denoiser"} == {"bf16"}


def test_int8_may_be_that_of_both_networks():
    told = plan("--model", "klein-4b", "--device-memory", "12GiB", "--precision", "int8")
    assert told["commands"] == ["klein up --model klein-4b --device cuda --quantization int8"]
    assert [need["precision"] for need in told["together"]] == ["int8", "int8", "bf16"]


def test_stages_that_do_not_fit_together_are_started_apart():
    told = plan(
        "--model", "klein-9b", "--device-memory", "12GiB", "--precision", "bf16", "--sizes", "2048x2048"
    )
    assert told["together"] is None
    starts = [shlex.split(command) for command in told["commands"]]
    assert [words[:3] for words in starts] == [["klein", "serve", stage] for stage in told["apart"]]
    assert "--offload" in starts[1]


def test_every_printed_command_can_be_run(monkeypatch, tmp_path):
    told = plan("--model", "klein-4b", "--device-memory", "6GiB")
    pull, *starts = (shlex.split(command)[1:] for command in told["commands"])
    assert pull == ["pull", "klein-4b", "--precision", "fp8"]
    assert [words[:2] for words in starts] == [["serve", stage] for stage in told["apart"]]
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(tmp_path))
    (tmp_path / "klein-4b-fp8").mkdir()
    (tmp_path / "klein-4b-fp8" / RECEIPT).write_text(json.dumps({"model": "klein-4b-fp8"}))
    for words in starts:
        result = CliRunner().invoke(app, [*words, "--check-config"])
        assert result.exit_code == 0, (words, result.exception)


def test_a_folder_is_planned_by_its_own_files():
    by_name = plan("--model", "pico", "--device-memory", "4GiB")
    by_folder = plan("--model", str(WEIGHTS), "--device-memory", "4GiB")
    assert by_folder["needs"] == by_name["needs"]
    stored = sum(path.stat().st_size for path in (WEIGHTS / "transformer").glob("*.safetensors"))
    denoiser = next(need for need in by_name["needs"] if need["stage"] == "denoiser")
    assert denoiser["weight_bytes"] == pytest.approx(stored, rel=0.01)


def test_a_person_sees_a_table_and_a_command():
    code, output = run("--model", "klein-4b", "--device-memory", "24GiB")
    assert code == 0
    for word in ("text-encoder", "7.22 GiB", "nvfp4, offload", "klein up --model klein-4b"):
        assert word in output


def test_what_fits_nowhere_is_a_failure():
    code, output = run("--model", "klein-9b", "--device-memory", "1GiB")
    assert code == 1
    assert "fit no device of 1.00 GiB" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "klein-5b"], "klein-5b"),
        (["--sizes", "1024"], "--sizes"),
        (["--sizes", "1000x1024"], "multiple of 16"),
        (["--batch", "0"], "--batch is 0"),
        (["--references", "-1"], "--references is -1"),
        (["--precision", "fp6"], "fp6"),
    ],
)
def test_misuse_is_explained(arguments, message):
    given = ["--model", "klein-4b", "--device-memory", "12GiB", *arguments]
    with pytest.raises(CliError) as caught:
        run(*given)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_planning_needs_no_torch():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'safetensors', 'transformers')));"
        "from klein_services.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["plan", "--model", "pico", "--device-memory", "4GiB", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["together"]

"""`klein plan`: from a model's name or files to commands, without torch."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from typer.testing import CliRunner

from klein_core.model_registry import PUBLISHED_MODELS
from klein_core.pico import WEIGHTS
from klein_core.variants import TransformerConfig
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
    [
        ("12GiB", 12 << 30),
        ("24GB", 24 * 10**9),
        ("512m", 512 * 10**6),
        ("1.5 GiB", 3 << 29),
        ("24", 24 << 30),
        ("0.5", 1 << 29),
        ("4096B", 4096),
    ],
)
def test_memory_is_read_as_people_write_it(text, expected):
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "0", "12 apples", "1e9"])
def test_other_words_are_no_memory(text):
    with pytest.raises(CliError, match="no amount of memory"):
        memory_bytes(text)


def test_a_large_number_without_a_unit_is_refused():
    with pytest.raises(CliError, match="--device-memory 25769803776 has no unit"):
        memory_bytes("25769803776")


def write_nvidia_smi(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_without_the_flag_the_first_gpu_decides(monkeypatch, tmp_path):
    write_nvidia_smi(tmp_path, "echo 24564; echo 8192")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert plan("--model", "klein-4b")["device_bytes"] == 24564 << 20


@pytest.mark.parametrize("script", ["echo No devices were found; exit 6", "echo [N/A]", None], ids=str)
def test_without_the_flag_and_a_gpu_the_flag_is_asked_for(script, monkeypatch, tmp_path):
    if script is not None:
        write_nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CliError, match="--device-memory 24GiB") as caught:
        plan("--model", "klein-4b")
    assert caught.value.exit_code == 2


@pytest.fixture(autouse=True)
def models(monkeypatch, tmp_path) -> Path:
    """The folder of pulled models, which is empty."""
    folder = tmp_path / "models"
    monkeypatch.setenv("KLEIN_MODELS_FOLDER", str(folder))
    return folder


def add_pulled(models: Path, name: str) -> None:
    (models / name).mkdir(parents=True)
    (models / name / RECEIPT).write_text(json.dumps({"model": name}))


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("40GiB", ["klein pull klein-4b", "klein up --model klein-4b --device cuda"]),
        ("12GiB", ["klein pull klein-4b", "klein up --model klein-4b --device cuda --quantization fp8"]),
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


def test_what_was_pulled_is_not_pulled_again(models):
    add_pulled(models, "klein-4b")
    told = plan("--model", "klein-4b", "--device-memory", "40GiB")
    assert told["commands"] == ["klein up --model klein-4b --device cuda"]


def test_options_of_a_name_stay_in_the_published_name():
    told = plan("--model", "klein-4b-small-decoder", "--device-memory", "10GiB")
    pull, up = told["commands"]
    assert pull == "klein pull klein-4b-small-decoder --precision nvfp4"
    assert "--model klein-4b-nvfp4-small-decoder " in up


def test_a_precision_can_be_demanded(models):
    add_pulled(models, "klein-4b")
    told = plan("--model", "klein-4b", "--device-memory", "13GiB", "--precision", "bf16")
    assert told["commands"] == ["klein up --model klein-4b --device cuda --offload blocks"]
    assert {need["precision"] for need in told["needs"] if need["stage"] == "denoiser"} == {"bf16"}


def test_tiles_that_the_plan_counts_on_are_switched_on(models):
    add_pulled(models, "klein-4b")
    large = ("--model", "klein-4b", "--sizes", "2048x2048", "--device-memory")
    assert plan(*large, "14GiB")["commands"] == [
        "KLEIN_TILING=on klein up --model klein-4b --device cuda --quantization fp8"
    ]
    assert [" --tiling on " in each for each in plan(*large, "8GiB")["commands"]] == [
        False,
        False,
        True,
        False,
    ]


def test_int8_may_be_that_of_both_networks(models):
    add_pulled(models, "klein-4b")
    told = plan("--model", "klein-4b", "--device-memory", "12GiB", "--precision", "int8")
    assert told["commands"] == ["klein up --model klein-4b --device cuda --quantization int8"]
    assert [need["precision"] for need in told["together"]] == ["int8", "int8", "bf16"]


def test_an_8_gib_card_leaves_the_text_encoder_on_the_cpu():
    told = plan("--model", "klein-4b", "--device-memory", "8GiB")
    assert [need["is_on_cpu"] for need in told["together"]] == [True, False, False]
    assert told["commands"] == [
        "klein pull klein-4b --precision fp8",
        "klein serve text-encoder --model klein-4b-fp8 --device cpu --port 50051",
        "klein serve denoiser --model klein-4b-fp8 --device cuda --port 50052",
        "klein serve vae-decoder --model klein-4b-fp8 --device cuda --port 50053",
        "klein serve orchestrator --model-name klein-4b-fp8 --port 50050 --text-encoder-target 127.0.0.1:50051 "
        "--denoiser-target 127.0.0.1:50052 --vae-decoder-target 127.0.0.1:50053",
    ]
    code, output = run("--model", "klein-4b", "--device-memory", "8GiB")
    assert code == 0
    assert "text-encoder bf16, on the CPU" in output


def test_stages_may_have_a_device_each():
    told = plan(
        "--model", "klein-9b", "--device-memory", "12GiB", "--precision", "bf16", "--sizes", "2048x2048"
    )
    _, *starts = (shlex.split(command) for command in told["commands_apart"])
    assert [words[2] for words in starts] == [*told["apart"], "orchestrator"]
    devices = [words[words.index("--device") + 1] for words in starts[:-1]]
    assert devices == ["cuda:0", "cuda:1", "cuda:2"]
    assert "--offload" in starts[1]


@pytest.mark.parametrize("key", ["commands", "commands_apart"])
def test_every_printed_command_can_be_run(key, models):
    told = plan("--model", "klein-4b", "--device-memory", "6GiB")
    pull, *starts = (shlex.split(command)[1:] for command in told[key])
    assert pull == ["pull", "klein-4b", "--precision", "fp8" if key == "commands_apart" else "nvfp4"]
    assert [words[:2] for words in starts] == [["serve", stage] for stage in (*told["apart"], "orchestrator")]
    add_pulled(models, starts[0][3])
    for words in starts:
        result = CliRunner().invoke(app, [*words, "--check-config"])
        assert result.exit_code == 0, (words, result.exception)


def write_without_weights(path: Path, config: TransformerConfig) -> None:
    """Writes a bf16 transformer of which only the header takes space on disk."""
    shape = dataclasses.asdict(config)
    known = inspect.signature(Flux2Transformer2DModel.__init__).parameters.keys() & shape.keys()
    with torch.device("meta"):
        network = Flux2Transformer2DModel(**{name: shape[name] for name in known}, guidance_embeds=False)
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_a_bare_transformer_is_started_with_the_other_parts_of_its_model(models, tmp_path):
    file = tmp_path / "tuned model.safetensors"
    write_without_weights(file, PUBLISHED_MODELS["klein-4b"].transformer)
    add_pulled(models, "klein-4b")
    assert plan("--model", str(file), "--device-memory", "40GiB")["commands"] == [
        f"klein up --model klein-4b --transformer '{file}' --device cuda",
    ]
    told = plan("--model", str(file), "--device-memory", "8GiB")
    denoiser = shlex.split(told["commands"][1])
    assert denoiser[2:7] == ["denoiser", "--model", "klein-4b", "--weights-path", str(file)]


def test_a_folder_is_planned_by_its_own_files():
    by_name = plan("--model", "pico", "--device-memory", "4GiB")
    by_folder = plan("--model", str(WEIGHTS), "--device-memory", "4GiB")
    assert by_folder["needs"] == by_name["needs"]
    stored = sum(path.stat().st_size for path in (WEIGHTS / "transformer").glob("*.safetensors"))
    denoiser = next(need for need in by_name["needs"] if need["stage"] == "denoiser")
    assert denoiser["weight_bytes"] == pytest.approx(stored, rel=0.01)


def test_the_table_and_a_command_are_printed():
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
        (["--device-memory", "lots"], "--device-memory lots"),
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

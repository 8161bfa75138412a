"""`python -m klein_services.STAGE`: its arguments, and an installation without torch."""

import subprocess
import sys

import pytest

from klein_services.cli.process import PROCESSES, STAGES, inherited_environment

MODULES = [f"klein_services.{process.replace('-', '_')}" for process in PROCESSES]
STAGE_MODULES = MODULES[: len(STAGES)]
WITHOUT_TORCH = """
import runpy, sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "numpy", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
WITHOUT_TEMPORARY_FOLDER = """
import runpy, sys, tempfile
# A superuser can write to every folder, so the candidates are replaced rather than made read-only.
tempfile._candidate_tempdir_list = lambda: ["/nowhere"]
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        env=inherited_environment() | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", MODULES)
def test_check_config_needs_no_torch_and_starts_nothing(module: str) -> None:
    shown = run(module, "--check-config", KLEIN_GRACE_SECOND="3", KLEIN_DRAIN_DELAY_SECONDS="7")
    assert (shown.returncode, shown.stderr.count("\n")) == (0, 1)
    assert "KLEIN_GRACE_SECONDS is one" in shown.stderr
    assert any("KLEIN_DRAIN_DELAY_SECONDS" in line and " 7 " in line for line in shown.stdout.splitlines())


def test_check_config_refuses_what_klein_serve_refuses() -> None:
    refused = run("klein_services.vae_decoder", "--check-config", KLEIN_MODEL_PATH="nowhere")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "KLEIN_MODEL_PATH is 'nowhere'; there is no such folder or file\n"


def test_check_config_reports_all_bad_values_at_once() -> None:
    bad = {
        "KLEIN_QUEUE_LIMIT": "0",
        "KLEIN_DTYPE": "int8",
        "KLEIN_MODEL_PATH": "nowhere",
        "KLEIN_DEVICE": "gpu",
        "KLEIN_WARMUP_SIZES": "65x65",
        "KLEIN_ADAPTERS_FOLDER": "nowhere",
    }
    refused = run("klein_services.denoiser", "--check-config", **bad)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert {line.split()[0] for line in refused.stderr.splitlines()} == set(bad)


def test_all_processes_can_run_side_by_side_with_their_defaults() -> None:
    ports: list[str] = []
    for module in MODULES:
        lines = run(module, "--check-config").stdout.splitlines()
        values = {words[0]: words[1] for words in map(str.split, lines)}
        ports += [values["KLEIN_PORT"], values["KLEIN_METRICS_PORT"]]
    assert len(set(ports)) == len(ports) == 10
    assert set(ports) >= {"9464", "9465", "9466", "9467", "9468"}


@pytest.mark.parametrize("module", MODULES)
def test_other_arguments_are_refused(module: str) -> None:
    refused = run(module, "--port", "5")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("--port is not understood")


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_a_stage_without_torch_is_one_sentence(module: str) -> None:
    ended = run(module)
    assert ended.returncode == 1
    assert "cannot run stages: " in ended.stderr
    assert "pip install 'klein-suite[stages]'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_a_stage_without_a_temporary_folder_is_one_sentence(module: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TEMPORARY_FOLDER, module],
        env=inherited_environment() | {"KLEIN_PORT": "0", "KLEIN_METRICS_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("Stages need a folder for temporary files: ")
    assert ended.stderr.endswith("Set TMPDIR to a folder that can be written.\n")
    assert ended.stderr.count("\n") == 1

"""Models of other families are refused by `klein pull`, `klein up` and `klein inspect`, before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klein_services.cli.main import main
from klein_services.cli.process import inherited_environment
from tests.services.fakes.hub_server import Hub, Repository, serving
from tests.tiny.checkpoint import save_tiny_checkpoint

SENTENCE = "FLUX.3, a later family (another text encoder, 16 steps, another license); this suite serves FLUX.2 [klein]"
Pull = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux3") / "model"
    save_tiny_checkpoint(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "Flux3KleinPipeline"}))
    return folder


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def pull(hub: Hub, tmp_path: Path) -> Iterator[Pull]:
    with serving(hub) as endpoint:
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "",
            "KLEIN_MODELS_FOLDER": str(tmp_path / "models"),
            "NO_PROXY": "127.0.0.1,localhost",
            "KLEIN_TRACEBACK": "",
        }

        def pull(identifier: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "klein_services.cli.main", "pull", identifier],
                env=inherited_environment() | own,
                capture_output=True,
                text=True,
                timeout=240,
            )

        yield pull


@pytest.mark.parametrize(
    "identifier", ["flux.3-klein-4b", "FLUX.3-klein-base-9B-fp8", "black-forest-labs/FLUX.3-klein-4B"]
)
def test_a_name_is_refused_before_the_hub_is_asked(pull: Pull, hub: Hub, identifier: str) -> None:
    done = pull(identifier)
    assert done.returncode == 2
    assert f"{identifier} is {SENTENCE}" in done.stderr
    assert "Known: klein-4b" in done.stderr
    assert hub.requests == []


def test_a_repository_of_another_name_is_refused_before_its_weights(
    pull: Pull, hub: Hub, folder: Path
) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories["someone/new"] = Repository(files)
    done = pull("someone/new")
    assert done.returncode == 1
    assert SENTENCE in done.stderr
    assert hub.fetched
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_repository_of_another_layout_is_named_by_its_files(pull: Pull, hub: Hub) -> None:
    hub.repositories["someone/new"] = Repository({"flux-3-klein-4b.safetensors": b"weights"})
    done = pull("someone/new")
    assert done.returncode == 1
    assert f"By the names of its files, someone/new is {SENTENCE}" in done.stderr
    assert hub.fetched == []


def test_a_folder_is_refused_before_a_process_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--model", str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.err.count(SENTENCE) == 1
    assert "Starting" not in shown.out


def test_a_name_is_refused_by_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--model", "flux.3-klein-4b"]) == 2
    assert f"flux.3-klein-4b is {SENTENCE}" in capsys.readouterr().err


def test_inspect_says_it_in_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.err.count(SENTENCE) == 1
    assert shown.out == ""

"""The wheel: its packages and its claim to be typed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the names of the files in a wheel that is built here, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_installs_its_packages_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"klein_api", "klein_client", "klein_core", "klein_services"}


@pytest.mark.parametrize(
    "name",
    [
        "klein_api/v1/image_service.proto",
        "klein_api/v1/image_service_pb2.py",
        "klein_api/v1/service_config.json",
        "klein_core/pico/weights/model_index.json",
        "klein_core/pipeline.py",
        "klein_services/cli/main.py",
        "klein_services/gateway/page/index.html",
        "klein_services/gateway/page/main.js",
    ],
)
def test_the_wheel_holds_code_protos_and_the_embedded_model(wheel: list[str], name: str) -> None:
    assert name in wheel


def test_the_wheel_holds_no_training_code(wheel: list[str]) -> None:
    trained_by = {path.name for path in (ROOT / "training" / "pico").iterdir()} - {"__init__.py"}
    pico = {Path(name).name for name in wheel if name.startswith("klein_core/pico/")}
    assert len(trained_by) > 20
    assert pico & trained_by == set()


@pytest.mark.parametrize("package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_a_package_of_a_typed_project_has_its_marker(package: str, wheel: list[str]) -> None:
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert f"{Path(package).name}/py.typed" in wheel

"""`make setup`, with a Python that only notes what it is asked to install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INDEX = "https://torch.example/cpu"
STAND_IN = f"""#!/bin/sh
case "$1 $2" in
  "-m venv")
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    test -e no-ensurepip && exit 1
    touch "$folder/bin/pip";;
  "-m pip")
    test -e "$(dirname "$0")/pip" || exit 1
    test "$3" = --version || echo "$@" >> installed
    case "$*" in *"$FAILING"*) test -z "$FAILING";; esac;;
  *) exec {sys.executable} "$@";;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return tmp_path


def make(clone: Path, *arguments: str, failing: str = "") -> subprocess.CompletedProcess[str]:
    # Nothing of the make that runs these tests: it would pass its own variables on.
    environment = {"PATH": os.environ["PATH"], "FAILING": failing}
    command = ["make", "setup", "PYTHON=./python", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)


def installed(clone: Path) -> list[str]:
    return (clone / "installed").read_text().splitlines()


def test_setup_installs_once(clone: Path) -> None:
    assert make(clone).returncode == 0
    assert make(clone).returncode == 0
    assert len(installed(clone)) == 1


def test_only_torch_comes_from_its_own_index(clone: Path) -> None:
    assert make(clone, f"TORCH_INDEX={INDEX}").returncode == 0
    torch, rest = installed(clone)
    assert torch.endswith(f"--no-deps --index-url {INDEX} torch")
    assert INDEX not in rest


def test_an_index_without_torch_is_named(clone: Path) -> None:
    done = make(clone, f"TORCH_INDEX={INDEX}", failing="--index-url")
    assert done.returncode != 0
    assert f"torch could not be installed from {INDEX}" in done.stderr
    assert len(installed(clone)) == 1


def test_half_a_venv_is_completed(clone: Path) -> None:
    (clone / "no-ensurepip").touch()
    assert "apt install python3-venv" in make(clone).stderr
    (clone / "no-ensurepip").unlink()
    assert make(clone).returncode == 0
    assert len(installed(clone)) == 1


def test_a_python_that_is_not_there_is_told_from_an_old_one(clone: Path) -> None:
    missing = make(clone, "PYTHON=python9")
    assert "There is no python9 here" in missing.stderr
    assert "older" not in missing.stderr

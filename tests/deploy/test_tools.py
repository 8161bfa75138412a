"""The programs of `deploy/tools/packages.txt` and `requirements.in`: each one runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from _pytest.outcomes import Skipped

from tests.deploy.tools import ROOT, tool

PACKAGES = ROOT / "deploy" / "tools" / "packages.txt"
VERSION = {"kubectl": ["version", "--client"], "kustomize": ["version"]}
PROGRAMS = [
    Path(line.split()[2]).name
    for line in PACKAGES.read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("name", [*PROGRAMS, "checkov", "hadolint", "kubernetes-validate"])
def test_a_program_answers_with_its_version(name: str) -> None:
    command = [tool(name), *VERSION.get(name, ["--version"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_missing_program_is_a_skip_that_names_the_way_to_get_it() -> None:
    with pytest.raises(Skipped, match=r"no such-program here: run deploy/tools/install\.sh"):
        tool("such-program")

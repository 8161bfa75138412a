"""Programs that check the deployment files: those that `deploy/tools/install.sh` unpacked, else those on PATH."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / ".tools" / "bin", ROOT / ".tools" / "venv" / "bin")


def tool(name: str) -> str:
    """Returns the path of a program; a test that needs a missing one is skipped with the way to get it."""
    for folder in FOLDERS:
        if found := shutil.which(name, path=folder):
            return found
    if found := shutil.which(name):
        return found
    pytest.skip(f"there is no {name} here: run deploy/tools/install.sh")

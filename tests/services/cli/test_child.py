"""Imports of a stage that runs as a child process."""

import sys
from pathlib import Path

import pytest

from klein_services.cli.process import Child, ChildSpec, inherited_environment


def test_a_child_imports_what_its_parent_does_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("klein_services", "klein_core", "klein_api"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('another package')")
    monkeypatch.chdir(tmp_path)
    # The stage reads its settings and refuses this one: everything that it needs until then was imported.
    environment = inherited_environment() | {"KLEIN_PORT": "many"}
    child = Child(ChildSpec("orchestrator", "127.0.0.1:0", environment, tmp_path / "log"))
    assert child.wait(30)
    assert child.log_tail() == ["KLEIN_PORT is 'many'; it must be a whole number"]


def test_a_parent_without_a_script_passes_its_folder_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert inherited_environment()["PYTHONPATH"] == f"{tmp_path}:/elsewhere"

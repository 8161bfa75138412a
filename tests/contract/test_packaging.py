"""What the wheel claims and holds."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_a_package_that_is_called_typed_says_so_to_type_checkers(package: str) -> None:
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    # The wheel takes a package's folder whole.
    assert (ROOT / package / "py.typed").is_file()

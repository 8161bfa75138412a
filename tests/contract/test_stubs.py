"""The committed Python code of the protos is what the protos say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[2] / "protos"


def generated_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for pattern in ("*_pb2*.py", "*_pb2*.pyi")
        for path in folder.rglob(pattern)
    }


def test_the_stubs_are_current(tmp_path):
    specification = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    generator.generate(tmp_path)
    fresh, committed = generated_files(tmp_path), generated_files(PROTOS)
    assert fresh.keys() == committed.keys()
    changed = [name for name, text in fresh.items() if committed[name] != text]
    assert changed == [], "run `make protos` and commit what it writes"

"""Packages that a GPU machine without a network lacks: `python -m benchmarks.gpu.needs FOLDER [--python 3.12]`.

Downloads wheels of this project's dependencies but torch and its own, and of diffusers as the peer, and unpacks them
into FOLDER for `--site`. Packages that the machine has come first. `--limit-mib` refuses a folder that is larger.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PEERS = ("diffusers", "accelerate", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
# A machine with torch for CUDA has these, in versions that fit it.
_LEFT_OUT = ("torch", "numpy", "aiosqlite", "sqlalchemy", "python-multipart")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches and unpacks the wheels; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    parser.add_argument("--limit-mib", type=int, default=64)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as wheels:
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        line += ["--constraint", str(ROOT / "constraints.txt"), "--only-binary", ":all:"]
        line += ["--python-version", options.python, "--platform", "manylinux_2_28_x86_64"]
        line += ["--platform", "manylinux2014_x86_64", *_packages()]
        subprocess.run(line, check=True)
        for wheel in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(options.folder)
    size = sum(file.stat().st_size for file in options.folder.rglob("*") if file.is_file())
    print(f"{options.folder}: {size >> 20} MiB unpacked")
    return 0 if size >> 20 <= options.limit_mib else 1


def _packages() -> list[str]:
    """Returns the names of what is needed: of the base install and of the stages, and the peers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["stages"]]
    names = [each.split(">=")[0] for each in wanted]
    return [*(name for name in names if name not in _LEFT_OUT), *_PEERS]


if __name__ == "__main__":
    sys.exit(main())

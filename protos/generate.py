"""Generates the Python modules of every .proto beside it; `python protos/generate.py [folder]`.

Messages are generated for all files, gRPC code only for services, so that no empty module appears.
"""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(destination: Path) -> None:
    """Writes the modules of all protos under `destination`.

    Raises:
        RuntimeError: protoc refuses a file; it has said why on standard error.
    """
    protos = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.proto"))
    services = [path for path in protos if path.name.endswith("_service.proto")]
    messages = [f"--python_out={destination}", f"--mypy_out={destination}"]
    _protoc([*messages, *map(str, protos)])
    _protoc([f"--grpc_python_out={destination}", f"--mypy_grpc_out={destination}", *map(str, services)])


def _protoc(arguments: list[str]) -> None:
    # protoc looks for its plugins on PATH, where an unactivated environment's folder is not.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    builtin = resources.files("grpc_tools") / "_proto"
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{builtin}", *arguments]) != 0:
        raise RuntimeError("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)

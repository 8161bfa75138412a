"""Writes `requirements/*.txt`: every package of the images, one version and its hashes each.

`python deploy/docker/lock.py --cpu-wheels PLACE` needs `uv`. Versions are those of constraints.txt; a package that
constraints.txt does not have (only torch's CUDA libraries) keeps the version that its file has.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "docker" / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
INIT = "dumb-init==1.2.5.post1"
"""Process 1 of the containers."""
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "orchestrator": (),
    "stage": ("stages",),
    "orchestrator-signing": ("provenance",),
}
"""Image → extras of klein-suite that it installs."""
PYTHON = "3.11"
"""Python of the default base image."""
_HEADER = "# Written by deploy/docker/lock.py from pyproject.toml and constraints.txt.\n"

Blocks = dict[str, str]
"""Package → its lines of a requirements file: version and hashes."""


def main(arguments: Sequence[str]) -> int:
    """Writes the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cpu-wheels", required=True, help="index or folder that has torch's CPU-only wheel, named …+cpu"
    )
    options = parser.parse_args(arguments)
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.stderr.write("lock.py needs uv: pip install uv\n")
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    torch = pinned(CONSTRAINTS.read_text())["torch"]
    orchestrator = compiled(uv, [*wanted(project, EXTRAS["orchestrator"]), INIT])
    stage = compiled(uv, [*wanted(project, EXTRAS["stage"]), INIT])
    cuda = compiled(uv, [f"torch=={torch}"])
    cpu = compiled(uv, [f"torch=={torch}+cpu"], cpu_wheels=options.cpu_wheels)
    signing = compiled(uv, [*wanted(project, EXTRAS["orchestrator-signing"]), INIT])
    shared = cuda.keys() & cpu.keys() - {"torch"}
    write("build", compiled(uv, project["build-system"]["requires"]))
    write("orchestrator", orchestrator)
    write("signing", {name: signing[name] for name in signing.keys() - orchestrator.keys()})
    # Torch's own dependencies that both builds have are the stage's, so that torch's layer is only torch.
    write(
        "stage", {name: stage[name] for name in (stage.keys() - cuda.keys() | shared) - orchestrator.keys()}
    )
    write("torch-cpu", {name: cpu[name] for name in cpu.keys() - shared})
    write("torch-cuda", {name: cuda[name] for name in cuda.keys() - shared})
    return 0


def wanted(project: Mapping[str, Any], extras: Iterable[str]) -> list[str]:
    """Returns the requirements of klein-suite with some of its extras."""
    optional = project["project"]["optional-dependencies"]
    return list(chain(project["project"]["dependencies"], *(optional[extra] for extra in extras)))


def compiled(uv: str, requirements: Sequence[str], *, cpu_wheels: str = "") -> Blocks:
    """Resolves requirements, and returns each package that they need with its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        source, limits, target = (Path(folder, name) for name in ("in", "constraints", "out"))
        source.write_text("\n".join(requirements))
        own = {canonicalize_name(Requirement(each).name) for each in requirements if cpu_wheels}
        versions = pinned(CONSTRAINTS.read_text())
        limits.write_text("".join(f"{k}=={v}\n" for k, v in versions.items() if k not in own))
        # Preferred by uv: versions of the last run that constraints.txt does not fix.
        target.write_text("".join(path.read_text() for path in sorted(FOLDER.glob("torch-cuda.txt"))))
        command = [
            uv,
            "pip",
            "compile",
            str(source),
            "--constraint",
            str(limits),
            "--output-file",
            str(target),
        ]
        command += [
            "--generate-hashes",
            "--python-version",
            PYTHON,
            "--no-header",
            "--no-annotate",
            "--quiet",
        ]
        command += ["--python-platform", "x86_64-manylinux_2_28"]
        command += ["--find-links", cpu_wheels] if cpu_wheels else []
        subprocess.run(command, check=True)
        return blocks(target.read_text())


def blocks(text: str) -> Blocks:
    """Returns the lines of each package of a requirements file."""
    found: Blocks = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if line.startswith("#") or not line.strip():
            continue
        if not line[0].isspace():
            name = canonicalize_name(line.split("==")[0])
            found[name] = ""
        found[name] += line
    return found


def pinned(text: str) -> dict[str, str]:
    """Returns the version of each package of a file of `name==version` lines, hashes or not."""
    lines = (line.split()[0].partition("==") for line in blocks(text).values())
    return {canonicalize_name(name): version for name, _, version in lines}


def write(name: str, packages: Blocks) -> None:
    """Writes one requirements file."""
    (FOLDER / f"{name}.txt").write_text(_HEADER + "".join(packages[each] for each in sorted(packages)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The images: hadolint, hashes of every package, and what Dockerfile and code must agree on.

`KLEIN_TEST_IMAGES=1` also builds them and runs `deploy/docker/smoke.sh`; `KLEIN_BUILD_ARGUMENTS` are those of build.sh.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.docker import lock
from klein_services.cli.process import PROCESSES, STAGES
from klein_services.cli.stage_process import settings_class
from klein_services.runtime import entry
from tests.deploy.tools import ROOT, tool

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
FILES = {path.stem: lock.blocks(path.read_text()) for path in lock.FOLDER.glob("*.txt")}
CONSTRAINTS = lock.pinned((ROOT / "constraints.txt").read_text())
IMAGES = {
    "orchestrator": {"orchestrator"},
    "orchestrator-signing": {"orchestrator", "signing"},
    "stage for CPU": {"orchestrator", "stage", "torch-cpu"},
    "stage for CUDA": {"orchestrator", "stage", "torch-cuda"},
}
"""Image → requirements files that it installs."""
_BLOCK = re.compile(r"[\w.-]+==\S+(?: \\\n +--hash=sha256:[0-9a-f]{64})+\n")


def closure(name: str, extras: frozenset[str], seen: set[str]) -> Iterator[str]:
    """Yields every package that a package, as it is installed here, needs on this machine."""
    for text in importlib.metadata.requires(name) or ():
        needed = Requirement(text)
        applies = needed.marker is None or any(
            needed.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        key = f"{canonicalize_name(needed.name)}[{','.join(sorted(needed.extras))}]"
        if applies and key not in seen:
            seen.add(key)
            yield canonicalize_name(needed.name)
            yield from closure(needed.name, frozenset(needed.extras), seen)


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_each_package_has_one_version_and_its_hashes() -> None:
    assert set(FILES) == {"build", "orchestrator", "signing", "stage", "torch-cpu", "torch-cuda"}
    loose = [f"{file}: {name}" for file, each in FILES.items() for name, lines in each.items()
             if not _BLOCK.fullmatch(lines)]  # fmt: skip
    assert loose == []


def test_a_package_without_a_hash_is_found() -> None:
    (planted,) = lock.blocks("grpcio==1.85.1\n").values()
    assert not _BLOCK.fullmatch(planted)


def test_versions_are_those_that_the_suite_is_tested_with() -> None:
    found = {
        (file, name): lock.pinned("".join(each.values()))[name]
        for file, each in FILES.items()
        for name in each
    }
    wrong = {
        key: version
        for key, version in found.items()
        if version.removesuffix("+cpu") != CONSTRAINTS.get(key[1], version)
    }
    assert wrong == {}, "run deploy/docker/lock.py"
    unconstrained = {(file, name) for file, name in found if name not in CONSTRAINTS}
    assert {file for file, name in unconstrained if name != "dumb-init"} == {"torch-cuda"}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_every_package_that_it_needs(image: str) -> None:
    extras = lock.EXTRAS[image.split()[0]]
    has = {name for file in IMAGES[image] for name in FILES[file]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs: set[str] = set()
    seen: set[str] = set()
    for text in lock.wanted(project, extras):
        requirement = Requirement(text)
        needs |= {canonicalize_name(requirement.name)}
        needs |= set(closure(requirement.name, frozenset(requirement.extras), seen))
    assert sorted(needs - has) == [], "run deploy/docker/lock.py"


def test_the_orchestrator_has_no_torch() -> None:
    assert not FILES["orchestrator"].keys() & {"torch", "transformers", "numpy", "pillow", "safetensors"}


def test_no_package_is_in_two_layers_of_an_image() -> None:
    for image, files in IMAGES.items():
        names = [name for file in files for name in FILES[file]]
        assert len(names) == len(set(names)), image


def test_the_allocator_has_the_values_that_the_servers_set() -> None:
    values = dict(re.findall(r"\b(MALLOC_\w+)=(\d+)", DOCKERFILE))
    assert int(values["MALLOC_MMAP_THRESHOLD_"]) == entry._BLOCK_BYTES
    assert int(values["MALLOC_TRIM_THRESHOLD_"]) == entry._KEPT_BYTES


@pytest.mark.parametrize("target", ["stage", "orchestrator"])
def test_an_image_runs_as_a_number_and_exposes_the_default_ports(target: str) -> None:
    _, _, section = DOCKERFILE.partition(f"FROM runtime AS {target}\n")
    section, _, _ = section.partition("\nFROM ")
    assert re.findall(r"^USER (.*)$", section, re.MULTILINE) == ["10001:10001"]
    (exposed,) = re.findall(r"^EXPOSE (.*)$", section, re.MULTILINE)
    servers = STAGES if target == "stage" else set(PROCESSES) - set(STAGES)
    defaults = [settings_class(server)() for server in servers]
    assert {int(port) for port in exposed.split()} == {
        port for each in defaults for port in (each.port, each.metrics_port)
    }


def test_the_entry_point_is_an_init_in_exec_form() -> None:
    assert re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE) == [
        '["dumb-init", "--single-child", "--", "klein"]'
    ]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("build.sh --gpu", "--gpu is no option"),
        ("build.sh --tag", "--tag needs a value"),
        ("build.sh --only decoder", "--only is decoder; it must be stage, orchestrator or"),
        ("build.sh --wheels /nowhere", "--wheels is /nowhere; there is no such folder"),
        ("build.sh --ca /nowhere", "/nowhere cannot be read"),
        ("smoke.sh --image", "--image is no option"),
    ],
)
def test_a_script_refuses_bad_arguments(command: str, reason: str) -> None:
    done = subprocess.run(
        ["sh", *shlex.split(f"{DOCKER}/{command}")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(reason, done.stderr), done.stderr


def test_a_machine_without_a_builder_is_reported(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "dirname", "basename", "sed", "cat"):
        (programs / name).symlink_to(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}")
    done = subprocess.run(
        ["sh", f"{DOCKER}/build.sh"], capture_output=True, text=True, check=False, env={"PATH": str(programs)}
    )
    assert (done.returncode, done.stderr) == (1, "build.sh: docker (with its daemon) or buildah is needed\n")


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not os.environ.get("KLEIN_TEST_IMAGES"),
    reason="KLEIN_TEST_IMAGES=1 builds and runs the images (minutes, gigabytes)",
)
def test_the_images_are_built_and_make_a_picture() -> None:
    name = ["--prefix", "localhost/klein-test", "--tag", "test"]
    arguments = shlex.split(os.environ.get("KLEIN_BUILD_ARGUMENTS", ""))
    subprocess.run([f"{DOCKER}/build.sh", "--cpu", *name, *arguments], check=True)
    subprocess.run([f"{DOCKER}/smoke.sh", *name], check=True)

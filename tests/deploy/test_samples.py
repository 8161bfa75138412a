"""The clients of `docs/samples` against four real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from klein_services.cli.suite import Suite, SuiteOptions
from tests.deploy.tools import ROOT

READY_SECONDS = 180.0
SAMPLES = ROOT / "docs" / "samples"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    options = SuiteOptions(device="cpu", threads=1, log_folder=tmp_path_factory.mktemp("logs"))
    with Suite(options) as running:
        running.wait_until_ready(timeout_seconds=READY_SECONDS)
        yield running


def run(folder: Path, target: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KLEIN_TARGET": target, "KLEIN_PROTOS": str(ROOT / "protos")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def is_blue(file: Path) -> bool:
    red, _, blue = Image.open(BytesIO(file.read_bytes())).convert("RGB").resize((1, 1)).getpixel((0, 0))
    return blue > red


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node or no npm here: install Node 18 or newer")
    folder = tmp_path_factory.mktemp("node") / "sample"
    shutil.copytree(SAMPLES / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = run(folder, "", "npm", "ci", "--no-audit", "--no-fund")
    assert installed.returncode == 0, installed.stderr
    return folder


def test_the_node_sample_makes_and_edits_an_image(node_folder: Path, suite: Suite) -> None:
    made = run(
        node_folder,
        suite.target,
        "node",
        "client.mjs",
        "a large red circle on a white background",
        "red.png",
    )
    assert (made.returncode, made.stderr) == (0, "")
    lines = made.stdout.splitlines()
    assert "step 4 of 4" in lines
    assert lines[-1] == "red.png: pico, text-to-image"
    edited = run(
        node_folder,
        suite.target,
        "node",
        "client.mjs",
        "make the background blue",
        "blue.png",
        "red.png",
    )
    assert edited.stdout.splitlines()[-1] == "blue.png: pico, edit"
    assert not is_blue(node_folder / "red.png")
    assert is_blue(node_folder / "blue.png")


def test_the_node_sample_shows_why_a_request_failed(node_folder: Path, suite: Suite) -> None:
    refused = run(node_folder, suite.target, "node", "client.mjs", "a star", "star.png", "client.mjs")
    assert refused.returncode == 1
    assert refused.stderr.startswith("INVALID_ARGUMENT: references[0]: is not an image")
    gone = run(node_folder, "127.0.0.1:1", "node", "client.mjs", "a star", "star.png")
    assert gone.returncode == 1
    assert gone.stderr.startswith("UNAVAILABLE: ")
    assert not (node_folder / "star.png").exists()

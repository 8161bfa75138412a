"""The Compose files: what Compose itself reads from them, and that images, servers and settings agree with it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from klein_services.cli.process import GATEWAY, ORCHESTRATOR, PROCESSES, STAGES
from klein_services.cli.stage_process import settings_class
from klein_services.runtime.settings import variable_name
from tests.deploy.tools import ROOT, tool

DEPLOY = ROOT / "deploy"
CPU = ("compose.yaml", "compose.cpu.yaml")
COMBINATIONS = [
    ("compose.yaml",),
    CPU,
    ("compose.yaml", "compose.observability.yaml"),
    (*CPU, "compose.observability.yaml"),
]


def compose(
    *files: Path | str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Returns what Compose makes of files, without the variables of this machine."""
    flags = [flag for file in files for flag in ("--file", str(DEPLOY / file))]
    command = [tool("docker-compose"), *flags, "--profile", "*", "config", "--format", "json"]
    variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


@cache
def configuration(files: tuple[str, ...]) -> dict[str, Any]:
    """Returns the merged configuration of files in `deploy/`."""
    done = compose(*files)
    assert (done.returncode, done.stderr) == (0, "")
    merged: dict[str, Any] = json.loads(done.stdout)
    return merged


def seconds(duration: str) -> int:
    """Returns the seconds of a duration such as 2m13s."""
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(\d+)s", duration).groups()  # type: ignore[union-attr]
    return int(minutes or 0) * 60 + int(rest)


@pytest.mark.parametrize("files", COMBINATIONS, ids=" + ".join)
def test_compose_reads_every_combination_without_a_warning(files: tuple[str, ...]) -> None:
    services = configuration(files)["services"]
    assert services.keys() >= {*PROCESSES, "pull"}
    assert ("prometheus" in services) == ("compose.observability.yaml" in files)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("    helthcheck: {}", "helthcheck"),
        ("    mem_limit: lots", "lots"),
        ("    depends_on: [denoisr]", "denoisr"),
    ],
)
def test_compose_refuses_a_planted_mistake(tmp_path: Path, wrong: str, reason: str) -> None:
    planted = tmp_path / "compose.yaml"
    planted.write_text(f"services:\n  denoiser:\n    image: klein-stage\n{wrong}\n")
    done = compose(planted)
    assert done.returncode != 0
    assert reason in done.stderr


@pytest.mark.parametrize("files", [COMBINATIONS[0], CPU], ids=" + ".join)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_server_accepts_its_variables(process: str, files: tuple[str, ...], tmp_path: Path) -> None:
    environment = dict(configuration(files)["services"][process]["environment"])
    fields = dataclasses.fields(settings_class(process))
    environment.pop("XDG_STATE_HOME", None)
    assert environment.keys() <= {variable_name(field.name) for field in fields}
    # Volumes are in the containers only.
    for name in ("KLEIN_MODEL_PATH", "KLEIN_ADAPTERS_FOLDER"):
        if environment.get(name, "").startswith("/"):
            environment[name] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", f"klein_services.{process.replace('-', '_')}", "--check-config"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), **environment},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ports_are_those_of_the_settings() -> None:
    services = configuration(("compose.yaml",))["services"]
    for stage in STAGES:
        target = services["orchestrator"]["environment"][f"KLEIN_{stage.replace('-', '_').upper()}_TARGET"]
        assert target == f"dns:///{stage}:{settings_class(stage)().port}"
    for process in (ORCHESTRATOR, GATEWAY):
        (published,) = services[process]["ports"]
        assert published["target"] == settings_class(process)().port
        assert published["host_ip"] == "127.0.0.1"
    public = {name for name, each in services.items() if each.get("ports")}
    assert public == {ORCHESTRATOR, GATEWAY}
    orchestrator_port = settings_class(ORCHESTRATOR)().port
    assert services[GATEWAY]["environment"]["KLEIN_TARGET"] == f"dns:///orchestrator:{orchestrator_port}"


def test_images_are_build_targets_of_this_version() -> None:
    targets = set(
        re.findall(r"^FROM runtime AS (\S+)$", (DEPLOY / "docker" / "Dockerfile").read_text(), re.M)
    )
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    services = configuration(("compose.yaml",))["services"]
    assert {each["image"] for each in services.values()} == {
        f"klein-{target}:{version}" for target in targets
    }
    for process in PROCESSES:
        assert services[process]["command"] == ["serve", process]
        assert ("stage" in services[process]["image"]) == (process in STAGES)


@pytest.mark.parametrize("files", COMBINATIONS, ids=" + ".join)
def test_every_container_is_confined(files: tuple[str, ...]) -> None:
    for name, each in configuration(files)["services"].items():
        assert each["read_only"], name
        assert each["cap_drop"] == ["ALL"], name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert int(each["mem_limit"]) > 0, name
        assert not each.get("privileged"), name


@pytest.mark.parametrize("process", PROCESSES)
def test_a_container_has_time_to_drain_and_a_health_check_of_its_own(process: str) -> None:
    settings = settings_class(process)()
    service = configuration(("compose.yaml",))["services"][process]
    assert seconds(service["stop_grace_period"]) >= settings.drain_delay_seconds + settings.grace_seconds + 10
    assert service["healthcheck"]["test"] == ["CMD", "python3", "-m", "klein_services.cli.probe", process]
    assert any(entry.startswith("/tmp:") for entry in service["tmpfs"])


def test_stages_have_the_gpu_unless_the_file_for_cpus_is_added() -> None:
    for stage in STAGES:
        with_gpu, without = (configuration(files)["services"][stage] for files in (COMBINATIONS[0], CPU))
        (device,) = with_gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert with_gpu["environment"]["KLEIN_DEVICE"] == "cuda"
        assert "deploy" not in without
        assert without["environment"]["KLEIN_DEVICE"] == "cpu"


def test_models_are_written_by_pull_alone() -> None:
    for name, each in configuration(COMBINATIONS[-1])["services"].items():
        writable = [v["target"] for v in each.get("volumes", ()) if not v.get("read_only")]
        expected = {
            "pull": ["/models"],
            "gateway": ["/results"],
            "prometheus": ["/prometheus"],
            "alertmanager": ["/alertmanager"],
        }
        assert writable == expected.get(name, []), name


def test_the_list_of_variables_is_complete() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(KLEIN_\w+)", text))
    listed = set(re.findall(r"KLEIN_\w+", text.partition("\nname:")[0].partition("whole list")[2]))
    assert used == listed


def test_files_that_containers_mount_exist() -> None:
    for each in configuration(COMBINATIONS[-1])["services"].values():
        for volume in each.get("volumes", ()):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume["source"]

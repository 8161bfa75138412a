"""checkov over every overlay; each check that is skipped has its reason here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import OVERLAYS, Object, objects, pods, write
from tests.deploy.tools import tool

SKIPPED = {
    "CKV_K8S_11": "no CPU limits: throttling lengthens every step, and requests already divide a busy node",
    "CKV_K8S_15": "images have versions or digests, so a copy on the node is the right one; a registry that is down "
    "must not keep a stage from starting",
    "CKV_K8S_35": "huggingface_hub reads its token from HF_TOKEN; only the Job that downloads has it",
    "CKV_K8S_43": "digests exist once an operator has built the images; components/images is where they go",
}
UNCLOSED = {
    "CKV2_K8S_6": "network-policies is a component: a network without policies would refuse the try-out"
}


def failures(path: Path) -> list[str]:
    """Returns the checks that fail for a file, with the objects, except those that are skipped."""
    skipped = ",".join(SKIPPED)
    command = [
        tool("checkov"), "--file", str(path), "--framework", "kubernetes", "--skip-download", "--compact",
        "--output", "json", "--skip-check", skipped,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 50, "checkov has read nothing"
    return [f"{each['check_id']} {each['resource']}" for each in report["results"]["failed_checks"]]


def uncommon(overlay: str, seen: set[str]) -> list[Object]:
    """Returns the objects of an overlay that no earlier one had in the same form."""
    found = []
    for each in objects(overlay):
        text = json.dumps(each, sort_keys=True)
        if text not in seen:
            seen.add(text)
            # One file for all overlays: checkov takes objects of one name for one.
            found.append(each)
    return found


def test_checkov_finds_nothing_that_has_no_reason(tmp_path: Path) -> None:
    seen: set[str] = set()
    every = [each for overlay in OVERLAYS for each in uncommon(overlay, seen)]
    found = failures(write(every, tmp_path / "all.yaml"))
    assert [each for each in found if each.split()[0] not in UNCLOSED] == []


def test_production_is_closed_by_network_policies(tmp_path: Path) -> None:
    assert failures(write(objects("overlays/production"), tmp_path / "production.yaml")) == []


@pytest.mark.parametrize(
    ("check", "key", "value"),
    [("CKV_K8S_22", "readOnlyRootFilesystem", False), ("CKV_K8S_20", "allowPrivilegeEscalation", True)],
)
def test_checkov_finds_an_open_door(check: str, key: str, value: bool, tmp_path: Path) -> None:
    found = objects("overlays/production")
    pods(found, "Deployment")[0].main["securityContext"][key] = value
    assert any(each.startswith(check) for each in failures(write(found, tmp_path / "open.yaml")))

"""Schemas of Kubernetes' own kinds, and of custom resources from their definitions (CRDs)."""

from __future__ import annotations

import os
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.manifests import Object, path_of
from tests.deploy.tools import ROOT, tool

VERSIONS = ("1.34", "1.37")
"""Oldest and newest supported Kubernetes."""
OWN_GROUPS = ("", "apps", "autoscaling", "batch", "networking.k8s.io", "policy", "resource.k8s.io")
"""API groups of Kubernetes itself; kinds of all others are custom resources."""


def is_custom(each: Object) -> bool:
    """Returns whether an object is a custom resource."""
    group, _, _ = each["apiVersion"].rpartition("/")
    return group not in OWN_GROUPS


def core_problems(path: Path, version: str) -> list[str]:
    """Returns what one version of Kubernetes would refuse in a file, unknown fields and kinds included."""
    command = [tool("kubernetes-validate"), "--kubernetes-version", version, "--strict", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    # An unknown kind is only a warning there.
    bad = [line for line in lines if line.startswith(("ERROR", "WARN"))]
    assert done.returncode == 0 or bad, done.stdout + done.stderr
    return bad


def crd_folder() -> Path:
    """Returns the folder of the CRDs; without one the test is skipped."""
    given = os.environ.get("KLEIN_CRDS")
    # Next to a checkout, or next to the repository that a worktree belongs to.
    candidates = (
        [Path(given)] if given else [ROOT.parent / "shared" / "crds", ROOT.parents[1] / "shared" / "crds"]
    )
    for folder in candidates:
        if folder.is_dir():
            return folder
    pytest.skip(f"there are no CRDs in {candidates[0]}: set KLEIN_CRDS to a folder of CRD files")


@cache
def definitions(folder: Path) -> dict[tuple[str, str], Any]:
    """Returns the schema of each (apiVersion, kind) that the CRDs in a folder define."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        for crd in yaml.safe_load_all(path.read_text()):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                found[key] = strict(version["schema"]["openAPIV3Schema"])
    return found


def custom_problems(each: Object, schema: Any) -> list[str]:
    """Returns what the definition of a custom resource refuses in an object, unknown fields included."""
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{path_of(each)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(each)
    ]


def strict(schema: Any) -> Any:
    """Returns a CRD's schema as JSON Schema that refuses unknown fields, where the API server would drop them."""
    made = deepcopy(schema)
    made.setdefault("properties", {}).update(
        apiVersion={"type": "string"}, kind={"type": "string"}, metadata={"type": "object"}
    )
    return _strict(made)


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-")
    }
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and "additionalProperties" not in made and not keeps_unknown:
        # Object metadata has its own schema in Kubernetes itself.
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made

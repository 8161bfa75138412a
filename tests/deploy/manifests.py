"""Kubernetes objects that kustomize renders from the folders of `deploy/kubernetes`, and typed access to them."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import ROOT, tool

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = tuple(
    str(path.parent.relative_to(KUBERNETES))
    for path in sorted((KUBERNETES / "overlays").rglob("kustomization.yaml"))
    if path.parent.name != "denoiser-base"  # a part of an overlay
)
Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> str:
    """Returns the YAML that kustomize renders from a folder of `deploy/kubernetes`."""
    done = subprocess.run(
        [tool("kustomize"), "build", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Kustomize's warnings are about fields that it will drop one day.
    assert done.stderr == ""
    return done.stdout


def objects(overlay: str) -> list[Object]:
    """Returns the objects of an overlay; each call's are its own."""
    return deepcopy(_parsed(overlay))


@functools.cache
def _parsed(overlay: str) -> list[Object]:
    return list(yaml.safe_load_all(rendered(overlay)))


def path_of(each: Object) -> str:
    """Returns an object's kind and name, for messages."""
    return f"{each['kind']}/{each['metadata']['name']}"


def of_kind(all_objects: list[Object], *kinds: str) -> list[Object]:
    """Returns the objects of some kinds."""
    return [each for each in all_objects if each["kind"] in kinds]


def named(all_objects: list[Object], kind: str, name: str) -> Object:
    """Returns one object; the test fails when it is not there."""
    (found,) = [each for each in of_kind(all_objects, kind) if each["metadata"]["name"] == name]
    return found


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Returns whether a label selector with `matchLabels` only selects an object; an empty one selects all."""
    assert set(selector) <= {"matchLabels"}, f"only matchLabels is understood, not {selector}"
    return selector.get("matchLabels", {}).items() <= labels.items()


@dataclass(frozen=True)
class Pod:
    """The Pod template of a Deployment or Job."""

    owner: Object

    @property
    def name(self) -> str:
        return str(self.owner["metadata"]["name"])

    @property
    def path(self) -> str:
        return path_of(self.owner)

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.owner["spec"]["template"]["metadata"]["labels"])

    @property
    def spec(self) -> Object:
        return self.owner["spec"]["template"]["spec"]

    @property
    def main(self) -> Object:
        """The container that serves or works."""
        (container,) = self.spec["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        """Ports of the container by name."""
        return {port["name"]: port["containerPort"] for port in self.main.get("ports", [])}

    def containers(self) -> Iterator[Object]:
        yield from self.spec.get("initContainers", [])
        yield from self.spec["containers"]


def pods(all_objects: list[Object], *kinds: str) -> list[Pod]:
    """Returns the Pod templates of Deployments and Jobs, or of the given kinds."""
    return [Pod(each) for each in of_kind(all_objects, *(kinds or ("Deployment", "Job")))]


def environment(container: Object, all_objects: list[Object]) -> dict[str, str]:
    """Returns a container's variables as the kubelet sets them; those of optional references are left out."""
    found: dict[str, str] = {}
    for entry in container.get("env", []):
        if "value" in entry:
            text = entry["value"]
            for name, value in found.items():
                text = text.replace(f"$({name})", value)
            found[entry["name"]] = text
        elif (reference := entry["valueFrom"].get("configMapKeyRef")) is not None:
            data = named(all_objects, "ConfigMap", reference["name"])["data"]
            found[entry["name"]] = data.get(reference["key"], "")
    return found


def arguments(container: Object, all_objects: list[Object]) -> list[str]:
    """Returns a container's command and arguments, with variables as the kubelet expands them."""
    words = [*container.get("command", []), *container.get("args", [])]
    for name, value in environment(container, all_objects).items():
        words = [word.replace(f"$({name})", value) for word in words]
    return words


def write(all_objects: list[Object], path: Path) -> Path:
    """Writes objects to a YAML file."""
    path.write_text(yaml.safe_dump_all(all_objects))
    return path

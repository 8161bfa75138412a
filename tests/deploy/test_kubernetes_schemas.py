"""Rendered manifests against strict schemas, and misspelled fields that must be found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.manifests import KUBERNETES, OVERLAYS, named, objects, rendered, write
from tests.deploy.schemas import VERSIONS, core_problems, crd_folder, custom_problems, definitions, is_custom


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_accepts_every_object(version: str, tmp_path: Path) -> None:
    # One file, because reading the schemas takes most of the time.
    own = [each for overlay in OVERLAYS for each in objects(overlay) if not is_custom(each)]
    assert len(own) > 50
    assert core_problems(write(own, tmp_path / "all.yaml"), version) == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "replaced", "by"),
    [
        ("field of a probe", "readinessProbe:", "readynessProbe:"),
        ("field of a Pod", "enableServiceLinks:", "enableServiceLink:"),
        ("type of a value", "terminationGracePeriodSeconds: 330", "terminationGracePeriodSeconds: 330s"),
        ("kind", "kind: PodDisruptionBudget", "kind: PodDisruptionBugdet"),
    ],
)
def test_a_misspelled_object_is_refused(
    name: str, replaced: str, by: str, version: str, tmp_path: Path
) -> None:
    text = rendered("overlays/pico")
    assert replaced in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(replaced, by, 1))
    assert core_problems(path, version), f"a wrong {name} was accepted"


def test_custom_resources_fit_their_definitions() -> None:
    known = definitions(crd_folder())
    custom = [each for overlay in OVERLAYS for each in objects(overlay) if is_custom(each)]
    undefined = {(each["apiVersion"], each["kind"]) for each in custom} - known.keys()
    problems = [
        problem
        for each in custom
        if (key := (each["apiVersion"], each["kind"])) in known
        for problem in custom_problems(each, known[key])
    ]
    assert problems == []
    if undefined:
        kinds = ", ".join(sorted(kind for _, kind in undefined))
        pytest.skip(
            f"{kinds} not checked, the others are: add their CRDs to {crd_folder()} or set KLEIN_CRDS"
        )


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("ScaledObject", "denoiser", ("spec", "fallbackk"), {}),
        ("ScaledObject", "denoiser", ("spec", "fallback", "behaviors"), "static"),
        ("ScaledObject", "denoiser", ("spec", "fallback", "behavior"), "currentReplicasIfhigher"),
        ("ScaledObject", "denoiser", ("spec", "maxReplicaCount"), "8"),
        ("PodMonitor", "klein-suite", ("spec", "podMetricEndpoints"), []),
    ],
)
def test_a_misspelled_custom_resource_is_refused(kind: str, name: str, path: tuple, value: object) -> None:
    known = definitions(crd_folder())
    each = named(objects("overlays/production"), kind, name)
    schema = known[each["apiVersion"], kind]
    assert custom_problems(each, schema) == []
    inner = each
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert custom_problems(each, schema)


def test_install_yaml_is_the_rendered_overlay_for_pico() -> None:
    committed = (KUBERNETES / "install.yaml").read_text()
    header, _, body = committed.partition("---\n")
    assert header == "# Rendered from overlays/pico; see README.md.\n"
    assert body == rendered("overlays/pico"), "run deploy/kubernetes/render.sh"

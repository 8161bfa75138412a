"""The model of KEDA and the HPA, driven by the ScaledObjects that are deployed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.autoscaler import Autoscaler, ScaledObject
from benchmarks.autoscaling import MANIFESTS
from klein_services.orchestrator.external_scaler import Trigger
from klein_services.orchestrator.settings import OrchestratorSettings


@pytest.fixture(params=["prometheus", "external"])
def scaler(request) -> Autoscaler:
    return Autoscaler(ScaledObject.read(MANIFESTS[request.param]), target=4.0)


def synced(scaler: Autoscaler, values: list[float | None], current: int, begin: float = 0.0) -> list[int]:
    """Runs a round every 15 s and returns the replicas after each."""
    counts = []
    for number, value in enumerate(values):
        current = scaler.sync(begin + 15.0 * number, current, value)
        counts.append(current)
    return counts


def test_a_backlog_adds_replicas_within_the_policies(scaler):
    # At most twice as many, or two more, every 30 s: 1, 3, and 6 after 30 s more.
    assert synced(scaler, [40.0] * 5, 1) == [3, 3, 6, 6, 8]


def test_an_empty_backlog_removes_one_replica_a_minute_after_five_minutes(scaler):
    counts = synced(scaler, [32.0] + [0.0] * 30, 8)
    assert counts[:20] == [8] * 20
    assert all(before - after in (0, 1) for before, after in itertools.pairwise(counts))
    assert counts[21] < 8
    assert counts[-1] >= 5


def test_without_a_value_every_replica_stays(scaler):
    assert synced(scaler, [None] * 60, 5) == [5] * 60


def test_a_value_near_the_target_changes_nothing(scaler):
    assert synced(scaler, [4.0 * 3 * 1.09, 4.0 * 3 * 0.91], 3) == [3, 3]


def test_the_external_trigger_is_one_that_the_orchestrator_takes():
    folder: Path = MANIFESTS["external"].parent
    manifests = [path for path in folder.glob("*.yaml") if path.name != "kustomization.yaml"]
    assert len(manifests) == 3
    for path in manifests:
        scaled = ScaledObject.read(path)
        trigger = Trigger.of(scaled.metadata, OrchestratorSettings().table())
        assert trigger.address.stage == path.stem == scaled.name
        assert trigger.target > 0

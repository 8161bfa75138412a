"""Dashboards: current files, and the rules that every dashboard and panel keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from promql_parser import parse

from deploy.observability.alerts import EXTERNAL_METRICS
from deploy.observability.generate import ROOT, main, stale
from deploy.observability.grafana import FOLDER, dashboard_files, metrics_of
from deploy.observability.panels import BOARDS
from tests.contract.test_documents import registered_metrics

FILES = sorted((ROOT / FOLDER).glob("*.json"))
OTHERS = {"ALERTS", "process_cpu_seconds_total", "process_resident_memory_bytes", *EXTERNAL_METRICS}


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}


def queries() -> Iterator[tuple[str, str]]:
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]


def test_the_files_are_current() -> None:
    assert stale(dashboard_files(ROOT)) == []
    assert [path.stem for path in FILES] == sorted(board.uid for board in BOARDS)
    assert main(["--check"]) == 0


@pytest.mark.parametrize("name", [board.uid for board in BOARDS])
def test_a_dashboard_keeps_the_conventions(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["uid"] == name
    assert dashboard["schemaVersion"] >= 36
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["namespace"]["allValue"] == ".*"
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(titles) == len(set(titles)) > 5
    assert sorted({panel["id"] for panel in dashboard["panels"]}) == list(range(1, len(titles) + 1))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(places) == len(set(places))
    for panel in dashboard["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_queries_are_promql_with_grafanas_interval_and_the_namespace() -> None:
    found = list(queries())
    assert len(found) > 80
    for place, expression in found:
        for window in re.findall(r"\[(.*?)\]", expression):
            assert window == "$__rate_interval", place
        assert "rate(" not in expression or "$__rate_interval" in expression, place
        assert "ALERTS" in expression or 'namespace=~"$namespace"' in expression, place
        parse(expression.replace("$__rate_interval", "1m").replace("$namespace", "klein"))


def test_every_metric_exists_and_nearly_every_one_has_a_panel() -> None:
    own = set(registered_metrics())
    shown = {name for _, expression in queries() for name in metrics_of(expression)}
    assert shown - own <= OTHERS
    assert len(shown & own) / len(own) > 0.9, sorted(own - shown)

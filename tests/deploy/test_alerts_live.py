"""Alerts of real faults on real processes, and what a real Prometheus makes of their metrics and the dashboards."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from deploy.observability.panels import BOARDS
from klein_client import ImageOptions
from tests.deploy.observed_suite import ObservedSuite, observed_suite, wait_until
from tests.deploy.tools import tool
from tests.e2e.running_suite import picture

SETTINGS = {"KLEIN_QUEUE_LIMIT": "2", "KLEIN_STAGE_WAIT_SECONDS": "1"}
"""A suite that refuses its third client, and gives up on a missing stage at once."""
QUIET_SECONDS = 10
"""Further time in which no other alert may arrive; ten minutes of the product."""
LABELS = re.compile(r"^((?:klein|grpc_server)_\w+\{.*?\}) ", re.MULTILINE)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObservedSuite]:
    with observed_suite(tmp_path_factory.mktemp("observed"), SETTINGS) as running:
        yield running


def any_flow(number: int) -> tuple[str, ImageOptions]:
    """A request of each flow in turn, and every other one asked before."""
    references = [picture(64, 64, index) for index in range(number % 3)]
    return f"a blue star {number // 6}", ImageOptions(references=references)


def series(observed: ObservedSuite) -> set[str]:
    found = {
        f"{process}: {labels}"
        for process in observed.suite.metrics_ports
        for labels in LABELS.findall(observed.scrape(process))
    }
    # Probes are counted by the services that gRPC itself adds.
    return {each for each in found if 'grpc_service="grpc.' not in each}


def test_metrics_pass_promtool_and_requests_add_no_label_sets(observed: ObservedSuite) -> None:
    before = series(observed)
    assert len(before) > 500
    with observed.load(2, any_flow) as ended:
        wait_until(lambda: ended["OK"] >= 7, "seven requests of all flows")
    assert set(ended) == {"OK"}
    assert sorted(series(observed) - before) == []
    for process in observed.suite.metrics_ports:
        page = observed.scrape(process)
        command = [tool("promtool"), "check", "metrics"]
        result = subprocess.run(command, input=page, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, f"{process}: {result.stdout}{result.stderr}"
        assert observed.scrape(process, "application/openmetrics-text").endswith("# EOF\n")


def test_every_query_of_every_dashboard_has_data_after_load(observed: ObservedSuite) -> None:
    queries = [
        (f"{board.title}: {panel.title}", query.expression)
        for board in BOARDS
        for panel in board.panels
        if not panel.needs
        for query in panel.queries
    ]

    def empty() -> list[str]:
        found = []
        for place, expression in queries:
            asked = expression.replace("$__rate_interval", "60s").replace("$namespace", ".*")
            values = [float(each["value"][1]) for each in observed.query(asked)]
            if not any(map(math.isfinite, values)):
                found.append(f"{place}: {asked}")
        return found

    with observed.load(2, any_flow) as ended:
        wait_until(lambda: ended["OK"] >= 8, "eight requests")
        wait_until(lambda: len(empty()) == 0 or ended["OK"] >= 30, "all queries have data")
        assert empty() == []


def test_the_healthy_suite_raises_no_alert(observed: ObservedSuite) -> None:
    assert observed.firing() == set()
    assert observed.webhook.received == []


def test_refused_load_reaches_the_pager_and_nothing_else_does(observed: ObservedSuite) -> None:
    webhook = observed.webhook
    with observed.load(6) as ended:
        wait_until(lambda: webhook.names("firing"), "an alert")
        assert ended["RESOURCE_EXHAUSTED"] >= 5
        time.sleep(QUIET_SECONDS)
        assert webhook.names("firing") == {"KleinLoadRefused": 1}
        assert {each["receiver"] for each in webhook.received} == {"pager"}
        assert webhook.received[0]["annotations"]["runbook_url"] == "docs/runbook.md#kleinloadrefused"
    wait_until(lambda: webhook.names("resolved") == {"KleinLoadRefused": 1}, "the alert is resolved")


def test_a_killed_stage_reaches_the_pager_and_its_symptoms_are_inhibited(observed: ObservedSuite) -> None:
    webhook = observed.webhook
    wait_until(lambda: observed.firing() == set(), "nothing fires")
    webhook.received.clear()
    with observed.load(2) as ended:
        wait_until(lambda: ended["OK"] >= 1, "a request is answered")
        killed = observed.suite.children["vae-decoder"]
        killed.kill()
        assert killed.wait(60)
        wait_until(lambda: webhook.names("firing"), "an alert")
        wait_until(
            lambda: "KleinAvailabilityBurnsFast" in observed.firing(), "the symptom fires in Prometheus"
        )
        time.sleep(QUIET_SECONDS)
        assert ended["UNAVAILABLE"] >= 5
        assert webhook.names("firing") == {"KleinStageMissing": 1}
        alert = webhook.received[0]
        assert (alert["labels"]["stage"], alert["labels"]["severity"]) == ("vae-decoder", "critical")
        assert alert["annotations"]["summary"] == "no vae-decoder serves"
        observed.suite.restart("vae-decoder")
        wait_until(lambda: webhook.names("resolved")["KleinStageMissing"] == 1, "the alert is resolved")
        answered = ended["OK"]
        wait_until(lambda: ended["OK"] > answered, "requests are answered again")

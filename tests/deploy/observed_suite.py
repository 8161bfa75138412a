"""Four real processes with pico, watched by a real Prometheus and a real Alertmanager that posts to this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from deploy.observability.generate import ROOT, RULES, rule_files
from deploy.observability.parameters import Parameters
from klein_client import AsyncClient, ImageOptions, KleinError
from klein_services.cli.suite import Suite, SuiteOptions
from tests.deploy.tools import tool

READY_SECONDS = 180.0
_PROMPTS = itertools.count(1)


@dataclass(frozen=True)
class Timing:
    """How fast everything that watches goes."""

    parameters: Parameters
    scrape_seconds: int
    group_wait_seconds: int
    """Time in which a cause can arrive before its symptom is sent."""
    group_interval_seconds: int


HURRIED = Timing(Parameters(time_scale=1 / 60, minimum_seconds=5, latency_seconds=120), 1, 3, 1)
"""A minute of the product takes a second. On a busy machine even pico is slow: latency does not matter here."""


@dataclass
class Webhook:
    """Receiver of Alertmanager's posts."""

    received: list[dict[str, Any]] = field(default_factory=list)

    def names(self, status: str) -> Counter[str]:
        """Returns how many distinct alerts of each name arrived with a status."""
        labels = {
            json.dumps(alert["labels"], sort_keys=True): alert["labels"]["alertname"]
            for alert in self.received
            if alert["status"] == status
        }
        return Counter(labels.values())


@dataclass
class ObservedSuite:
    """What is running: the suite, and what watches it."""

    suite: Suite
    prometheus: str
    """Address of Prometheus, `http://…`."""
    webhook: Webhook

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the series of an instant query."""
        url = f"{self.prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        result: list[dict[str, Any]] = fetched(url)["data"]["result"]
        return result

    def firing(self) -> set[str]:
        """Returns the names of the alerts that fire in Prometheus, inhibited ones included."""
        alerts = fetched(f"{self.prometheus}/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def scrape(self, process: str, accept: str = "text/plain") -> str:
        """Returns the metrics page of a process."""
        url = f"http://127.0.0.1:{self.suite.metrics_ports[process]}/metrics"
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Accept": accept}), timeout=60
        ) as page:
            text: str = page.read().decode()
        return text

    @contextmanager
    def load(
        self, clients: int, requests: Callable[[int], tuple[str, ImageOptions]] | None = None
    ) -> Iterator[Counter[str]]:
        """Runs clients, each of which asks for one image after the other; yields how their requests ended."""
        ended: Counter[str] = Counter()
        stopped = threading.Event()
        make = requests or (lambda number: (f"a red circle {number}", ImageOptions()))

        async def ask_again_and_again() -> None:
            async with AsyncClient(self.suite.target, timeout_seconds=120, retry=False) as client:
                while not stopped.is_set():
                    prompt, options = make(next(_PROMPTS))
                    try:
                        await client.generate(prompt, **options)
                        ended["OK"] += 1
                    except KleinError as error:
                        ended[error.code.name] += 1
                        await asyncio.sleep(0.1)

        async def all_clients() -> None:
            await asyncio.gather(*(ask_again_and_again() for _ in range(clients)))

        thread = threading.Thread(target=lambda: asyncio.run(all_clients()))
        thread.start()
        try:
            yield ended
        finally:
            stopped.set()
            thread.join()


def fetched(url: str) -> dict[str, Any]:
    """Returns the JSON document at an address."""
    with urllib.request.urlopen(url, timeout=60) as response:
        document: dict[str, Any] = json.load(response)
    return document


def wait_until(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    """Waits for a condition; fails with `what` when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


@contextmanager
def observed_suite(
    folder: Path, settings: dict[str, str], timing: Timing = HURRIED
) -> Iterator[ObservedSuite]:
    """Runs everything until the block ends.

    Args:
        folder: files of the processes.
        settings: `KLEIN_` variables of the suite.
        timing: of Prometheus, its rules and Alertmanager.
    """
    tool("prometheus"), tool("prometheus-alertmanager")
    options = SuiteOptions(device="cpu", threads=1, log_folder=folder / "logs", settings=settings)
    with ExitStack() as stack:
        webhook = Webhook()
        receiver = stack.enter_context(_receiver(webhook))
        alertmanager = stack.enter_context(_alertmanager(folder, receiver, timing))
        suite = stack.enter_context(Suite(options))
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        prometheus = stack.enter_context(_prometheus(folder, suite, alertmanager, timing))
        observed = ObservedSuite(suite, f"http://{prometheus}", webhook)
        wait_until(lambda: len(observed.query("klein_serving == 1")) == 4, "four processes are scraped")
        yield observed


@contextmanager
def _receiver(webhook: Webhook) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in body["alerts"]:
                webhook.received.append({**alert, "receiver": body["receiver"]})
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _alertmanager(folder: Path, receiver: str, timing: Timing) -> Iterator[str]:
    text = (ROOT / "deploy/observability/alertmanager.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("127.0.0.1:9099", receiver))
    config["route"]["group_wait"] = f"{timing.group_wait_seconds}s"
    config["route"]["group_interval"] = f"{timing.group_interval_seconds}s"
    (folder / "alertmanager.yaml").write_text(yaml.safe_dump(config))
    command = [
        tool("prometheus-alertmanager"),
        f"--config.file={folder / 'alertmanager.yaml'}",
        f"--storage.path={folder / 'alertmanager'}",
        "--web.listen-address=127.0.0.1:0",
        "--cluster.listen-address=",
    ]
    with _listening(command, folder / "alertmanager.log") as address:
        yield address


@contextmanager
def _prometheus(folder: Path, suite: Suite, alertmanager: str, timing: Timing) -> Iterator[str]:
    config = yaml.safe_load((ROOT / "deploy/observability/prometheus.yaml").read_text(encoding="utf-8"))
    interval = f"{timing.scrape_seconds}s"
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    targets = [f"127.0.0.1:{port}" for port in suite.metrics_ports.values()]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    (folder / "rules").mkdir()
    (folder / "rules" / RULES.name).write_text(rule_files(timing.parameters)[RULES])
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        "--web.listen-address=127.0.0.1:0",
        "--enable-feature=exemplar-storage",
    ]
    with _listening(command, folder / "prometheus.log") as address:
        wait_until(lambda: _is_ready(address), "Prometheus is ready")
        yield address


def _is_ready(address: str) -> bool:
    """Returns whether Prometheus has read its storage; until then it answers 503."""
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=60):
            return True
    except urllib.error.HTTPError:
        return False


@contextmanager
def _listening(command: list[str], log: Path) -> Iterator[str]:
    """Runs a server on a free port; yields the address that it logs."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        pattern = re.compile(r"Listening on\W.*?address=(127\.0\.0\.1:[1-9]\d*)")
        wait_until(
            lambda: pattern.search(log.read_text()) or process.poll() is not None, f"{command[0]} listens"
        )
        found = pattern.search(log.read_text())
        assert found is not None, log.read_text()[-2000:]
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)

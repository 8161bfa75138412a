"""Time from a fault to its page, with the rules, intervals and waits of deploy/observability as they are.

    python -m benchmarks.alerts [--faults missing refused] [--picture FILE]

Runs the four processes with pico, Prometheus and Alertmanager (from deploy/tools/install.sh) and prints when
Alertmanager posts which alerts after a stage is killed, and after more load begins than the orchestrator takes.
`--picture` draws the overview dashboard from the data of the run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import command, describe_machine
from deploy.observability.panels import OVERVIEW
from deploy.observability.parameters import Parameters
from deploy.observability.picture import draw
from tests.deploy.observed_suite import ObservedSuite, Timing, observed_suite, wait_until

PRODUCT = Timing(Parameters(), scrape_seconds=15, group_wait_seconds=30, group_interval_seconds=300)
HEALTHY_SECONDS = 60
PAGE_SECONDS = 1200


def missing(observed: ObservedSuite) -> None:
    """Kills the vae-decoder, waits for the page, starts it again."""
    with observed.load(2) as ended:
        time.sleep(HEALTHY_SECONDS)
        print(f"  before: {dict(ended)}")
        killed = observed.suite.children["vae-decoder"]
        killed.kill()
        killed.wait(60)
        report(observed, "vae-decoder killed")
        observed.suite.restart("vae-decoder")
        time.sleep(HEALTHY_SECONDS)
        print(f"  after: {dict(ended)}")


def refused(observed: ObservedSuite) -> None:
    """Asks with more clients than the orchestrator has places until the page comes."""
    with observed.load(6) as ended:
        report(observed, "six clients, two places")
        print(f"  requests: {dict(ended)}")


def report(observed: ObservedSuite, fault: str) -> None:
    """Waits for a page and prints how long it took, and all alerts that had arrived by then."""
    known = set(observed.webhook.names("firing"))
    begun = time.monotonic()
    wait_until(lambda: set(observed.webhook.names("firing")) - known, "a page", PAGE_SECONDS)
    arrived = sorted(set(observed.webhook.names("firing")) - known)
    print(f"{fault:32}{time.monotonic() - begun:8.0f} s  {', '.join(arrived)}")


FAULTS: dict[str, Callable[[ObservedSuite], None]] = {"missing": missing, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", choices=sorted(FAULTS), default=["missing", "refused"])
    parser.add_argument(
        "--picture", type=Path, help="PNG file of the overview dashboard, drawn after the run"
    )
    options = parser.parse_args()
    print(command())
    print(describe_machine("grpcio", "torch"))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        with observed_suite(Path(folder), {"KLEIN_QUEUE_LIMIT": "2"}, PRODUCT) as observed:
            for fault in options.faults:
                FAULTS[fault](observed)
            if options.picture:
                draw(OVERVIEW, observed.prometheus, (time.monotonic() - begun) / 60, options.picture)


if __name__ == "__main__":
    main()

"""Runs the orchestrator: `python -m klein_services.orchestrator`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.server import run_module, start


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(OrchestratorSettings, _orchestrator, environment, overrides)


def _orchestrator(settings: OrchestratorSettings) -> Orchestrator:
    return Orchestrator(settings, settings.table())


if __name__ == "__main__":
    sys.exit(run_module(OrchestratorSettings, main, sys.argv[1:]))

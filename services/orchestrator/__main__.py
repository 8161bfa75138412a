"""Runs the orchestrator: `python -m services.orchestrator`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from services.orchestrator.application import Orchestrator
from services.orchestrator.settings import OrchestratorSettings
from services.runtime.module_entry import run_module
from services.runtime.server import start


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(OrchestratorSettings, _orchestrator, environment, overrides)


def _orchestrator(settings: OrchestratorSettings) -> Orchestrator:
    return Orchestrator(settings, settings.table())


if __name__ == "__main__":
    sys.exit(run_module(OrchestratorSettings, main, sys.argv[1:]))

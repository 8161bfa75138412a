"""Entry point: `python -m klein_services.orchestrator` serves until SIGTERM, configured by KLEIN_ variables."""

from __future__ import annotations

import sys

from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.entry import EntryPoint

ENTRY = EntryPoint(OrchestratorSettings, lambda settings: Orchestrator(settings, settings.table()))
main = ENTRY.main

if __name__ == "__main__":
    sys.exit(ENTRY.cli_main(sys.argv[1:]))

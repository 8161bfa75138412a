"""Runs the orchestrator: `python -m services.orchestrator`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from services.orchestrator.application import Orchestrator
from services.orchestrator.settings import OrchestratorSettings
from services.runtime.server import run
from services.runtime.settings import SettingsError, load_settings


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves until it is told to stop.

    Args:
        environment: where `KLEIN_*` variables are read from.
        overrides: settings from flags, by field name; they win.

    Returns:
        The process's exit code: 2 for settings or a routing table that cannot be used.
    """
    try:
        settings = load_settings(OrchestratorSettings, environment, overrides).settings
        table = settings.table()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return run(settings, Orchestrator(settings, table))


if __name__ == "__main__":
    sys.exit(main(os.environ, {}))

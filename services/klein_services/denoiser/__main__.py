"""`python -m klein_services.denoiser`: serves until SIGTERM, as the environment's KLEIN_ variables say."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.server import run_module, start
from klein_services.runtime.stage import Application


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(DenoiserSettings, _application, environment, overrides)


def _application(settings: DenoiserSettings) -> Application:
    # Only here, so that settings are read, and a missing torch is told, before torch is imported.
    from klein_services.denoiser.application import DenoiserApplication

    return DenoiserApplication(settings)


if __name__ == "__main__":
    sys.exit(run_module(DenoiserSettings, main, sys.argv[1:]))

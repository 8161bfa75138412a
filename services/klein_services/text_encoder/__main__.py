"""`python -m klein_services.text_encoder`: serves until SIGTERM, as the environment's KLEIN_ variables say."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from klein_services.runtime.server import run_module, start
from klein_services.runtime.stage import Application
from klein_services.text_encoder.settings import TextEncoderSettings


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(TextEncoderSettings, _application, environment, overrides)


def _application(settings: TextEncoderSettings) -> Application:
    # Only here, so that settings are read, and a missing torch is told, before torch is imported.
    from klein_services.text_encoder.servicer import TextEncoderApplication

    return TextEncoderApplication(settings)


if __name__ == "__main__":
    sys.exit(run_module(TextEncoderSettings, main, sys.argv[1:]))

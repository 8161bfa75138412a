"""`python -m services.denoiser`: serves until SIGTERM, as the environment's KLEIN_ variables say."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from services.denoiser.application import DenoiserApplication
from services.denoiser.settings import DenoiserSettings
from services.runtime.server import start


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(DenoiserSettings, DenoiserApplication, environment, overrides)


if __name__ == "__main__":
    sys.exit(main(os.environ, {}))

"""`python -m services.vae_decoder`: serves until SIGTERM, as the environment's KLEIN_ variables say."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from services.runtime.server import start
from services.vae_decoder.application import VaeDecoderApplication
from services.vae_decoder.settings import VaeDecoderSettings


def main(environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
    """Serves and returns the exit code; overrides are settings by name."""
    return start(VaeDecoderSettings, VaeDecoderApplication, environment, overrides)


if __name__ == "__main__":
    sys.exit(main(os.environ, {}))

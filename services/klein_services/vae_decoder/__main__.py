"""Entry point: `python -m klein_services.vae_decoder` serves until SIGTERM, configured by KLEIN_ variables."""

from __future__ import annotations

import sys

from klein_services.runtime.entry import EntryPoint
from klein_services.runtime.stage import Service
from klein_services.vae_decoder.settings import VaeDecoderSettings


def make_service(settings: VaeDecoderSettings) -> Service:
    """Returns the service, not loaded. Imports torch."""
    from klein_services.vae_decoder.servicer import VaeDecoderStage

    return VaeDecoderStage(settings)


ENTRY = EntryPoint(VaeDecoderSettings, make_service)
main = ENTRY.main

if __name__ == "__main__":
    sys.exit(ENTRY.cli_main(sys.argv[1:]))

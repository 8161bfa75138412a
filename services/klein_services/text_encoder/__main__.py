"""Entry point: `python -m klein_services.text_encoder` serves until SIGTERM, configured by KLEIN_ variables."""

from __future__ import annotations

import sys

from klein_services.runtime.entry import EntryPoint
from klein_services.runtime.stage import Service
from klein_services.text_encoder.settings import TextEncoderSettings


def make_service(settings: TextEncoderSettings) -> Service:
    """Returns the service, not loaded. Imports torch."""
    from klein_services.text_encoder.servicer import TextEncoderStage

    return TextEncoderStage(settings)


ENTRY = EntryPoint(TextEncoderSettings, make_service)
main = ENTRY.main

if __name__ == "__main__":
    sys.exit(ENTRY.cli_main(sys.argv[1:]))

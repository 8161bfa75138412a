"""Entry point: `python -m klein_services.denoiser` serves until SIGTERM, configured by KLEIN_ variables."""

from __future__ import annotations

import sys

from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.entry import EntryPoint
from klein_services.runtime.stage import Service


def make_service(settings: DenoiserSettings) -> Service:
    """Returns the service, not loaded. Imports torch."""
    from klein_services.denoiser.application import DenoiserApplication

    return DenoiserApplication(settings)


ENTRY = EntryPoint(DenoiserSettings, make_service)
main = ENTRY.main

if __name__ == "__main__":
    sys.exit(ENTRY.cli_main(sys.argv[1:]))

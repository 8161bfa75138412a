"""Entry point: `python -m klein_services.gateway` serves until SIGTERM, configured by KLEIN_ variables."""

from __future__ import annotations

import sys

from klein_services.gateway.server import GatewayServer, serve_gateway
from klein_services.gateway.settings import GatewaySettings
from klein_services.runtime.entry import EntryPoint

ENTRY = EntryPoint(GatewaySettings, GatewayServer, serve_gateway)
main = ENTRY.main

if __name__ == "__main__":
    sys.exit(ENTRY.cli_main(sys.argv[1:]))

"""Health check of the server in this container: `python3 -m klein_services.cli.probe STAGE`, exit code 0 if it serves.

Asks gRPC's health service, or `/healthz` of the gateway's metrics port. The address is the one that `klein serve STAGE`
would take from the same environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from klein_services.cli.probes import Probes, StartupPhase
from klein_services.cli.process import PROCESSES
from klein_services.cli.stage_process import settings_class
from klein_services.runtime.channels import host_for_url
from klein_services.runtime.settings import ServerSettings, SettingsError, load_settings

TIMEOUT_SECONDS = 3.0
_EVERY_ADDRESS = ("0.0.0.0", "[::]", "::")


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Checks once and prints one line; returns 0 when the stage serves, 1 when not, 2 for bad arguments."""
    if len(arguments) != 1 or arguments[0] not in PROCESSES:
        sys.stderr.write(f"Give one of {', '.join(PROCESSES)}.\n")
        return 2
    (stage,) = arguments
    try:
        settings = load_settings(settings_class(stage), environment).settings
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if isinstance(settings, ServerSettings):
        port, variable = settings.health_port or settings.port, "KLEIN_HEALTH_PORT"
        needs_other = bool(settings.tls_certificate) and not settings.health_port
    else:
        port, variable = settings.metrics_port, "KLEIN_METRICS_PORT"
        needs_other = not port
    if needs_other:
        sys.stderr.write(f"This server needs {variable} for this probe, which speaks plaintext.\n")
        return 2
    host = "localhost" if settings.host in _EVERY_ADDRESS else host_for_url(settings.host)
    address = f"{host}:{port}"
    with Probes({stage: address}) as probes:
        phase = probes.check([stage], timeout_seconds=TIMEOUT_SECONDS)[stage]
    sys.stdout.write(f"{stage} at {address}: {phase.value}\n")
    return 0 if phase is StartupPhase.READY else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))

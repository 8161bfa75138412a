"""Prerequisites of stages on this machine: torch, and a folder for temporary files."""

from __future__ import annotations

from importlib.util import find_spec

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage_settings import check_temporary_folder


def require_torch() -> None:
    """Raises CliError in an installation that can only be a client or an orchestrator."""
    if find_spec("torch") is None:
        raise CliError(
            "This installation cannot run stages: torch is missing.",
            "Install it with: pip install 'klein-suite[stages]'",
        )


def require_temporary_folder() -> None:
    """Raises CliError when no folder for temporary files can be written, which torch fails without."""
    try:
        check_temporary_folder()
    except SettingsError as error:
        raise CliError(str(error), exit_code=MISUSED) from error

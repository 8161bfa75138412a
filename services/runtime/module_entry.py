"""What `python -m services.STAGE` does with its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from services.runtime.settings import ServerSettings, SettingsError, load_settings
from services.runtime.settings_report import describe, misspelt

CHECK_CONFIG = "--check-config"


def run_module(
    settings_class: type[ServerSettings],
    main: Callable[[Mapping[str, str], Mapping[str, object]], int],
    arguments: Sequence[str],
) -> int:
    """Serves, or shows and checks what would be served with; returns the exit code.

    Args:
        settings_class: the stage's settings.
        main: serves with an environment and overrides until it is told to stop.
        arguments: those of the command line: none, or `--check-config`.
    """
    if not arguments:
        return main(os.environ, {})
    if list(arguments) == [CHECK_CONFIG]:
        return check_config(settings_class, os.environ)
    sys.stderr.write(
        f"{arguments[0]} is not understood: only {CHECK_CONFIG} is. Settings are KLEIN_ variables here; "
        "`klein serve` takes them as flags.\n"
    )
    return 2


def check_config(settings_class: type[ServerSettings], environment: Mapping[str, str]) -> int:
    """Prints every setting with its source; returns 2, with a sentence, when one cannot be used."""
    try:
        loaded = load_settings(settings_class, environment)
        loaded.settings.check()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(describe(loaded) + "\n")
    sys.stderr.writelines(f"{sentence}.\n" for sentence in misspelt(settings_class, environment))
    return 0

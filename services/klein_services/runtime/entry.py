"""Entry point of a server's process: command line, settings, allocator, exit code."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from klein_services.runtime import logs
from klein_services.runtime.listener import RESERVED_FILES
from klein_services.runtime.pem import PemError
from klein_services.runtime.server import serve
from klein_services.runtime.settings import ProcessSettings, SettingsError, load_settings
from klein_services.runtime.settings_report import describe, misspelled
from klein_services.runtime.stage_settings import StageSettings, check_temporary_folder

CHECK_CONFIG = "--check-config"
_STAGE_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "PIL")
"""Packages that the base installation lacks, by the names that they are imported by."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BLOCK_BYTES = 32 << 20
"""Smaller blocks are kept. The largest value that glibc takes; few tensors on the wire are larger."""
_KEPT_BYTES = 64 << 20
"""Free memory at the heap's end beyond this is returned to the system."""
_log = logging.getLogger("klein.server")
_Settings = TypeVar("_Settings", bound=ProcessSettings)


@dataclass(frozen=True)
class EntryPoint(Generic[_Settings]):
    """The process of one kind of server; its `__main__` module makes one."""

    settings_class: type[_Settings]
    make_service: Callable[[_Settings], Any]
    """Called with valid settings. Imports what it needs, so that settings are checked before torch is loaded."""
    serve_service: Callable[[Any, Any], Coroutine[Any, Any, int]] = serve
    """Serves what `make_service` returned until it is stopped; returns the exit code."""

    def cli_main(self, arguments: Sequence[str]) -> int:
        """Runs `python -m PACKAGE [--check-config]` and returns the exit code, 2 for bad arguments or settings.

        Settings come from the environment. `--check-config` prints them and checks them without serving.
        """
        if not arguments:
            return self.main(os.environ, {})
        if list(arguments) != [CHECK_CONFIG]:
            sys.stderr.write(
                f"{arguments[0]} is not understood: only {CHECK_CONFIG} is. Settings are KLEIN_ variables here; "
                "`klein serve` takes them as flags.\n"
            )
            return 2
        try:
            loaded = load_settings(self.settings_class, os.environ, check=True)
        except SettingsError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        sys.stdout.write(describe(loaded) + "\n")
        sys.stderr.writelines(f"{sentence}.\n" for sentence in misspelled(self.settings_class, os.environ))
        return 0

    def main(self, environment: Mapping[str, str], overrides: Mapping[str, object]) -> int:
        """Serves in this process until it is stopped.

        Args:
            environment: usually `os.environ`.
            overrides: settings by name, which win over the environment.

        Returns:
            The exit code: 0 after a clean stop, 2 for bad settings or without a folder for temporary files, 1 when
            the server could not start, lost its device, or needs torch and does not have it.
        """
        try:
            settings = load_settings(self.settings_class, environment, overrides).settings
            if isinstance(settings, StageSettings):
                check_temporary_folder()
            service = self.make_service(settings)
        except (SettingsError, PemError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        except ModuleNotFoundError as error:
            if error.name not in _STAGE_PACKAGES:
                raise
            sys.stderr.write(
                f"This installation cannot run stages: {error.name} is missing. "
                "Install it with: pip install 'klein-suite[stages]'\n"
            )
            return 1
        logs.configure(settings.log_level, settings.log_format)
        for warning in misspelled(self.settings_class, environment):
            _log.warning("%s", warning)
        keep_large_blocks()
        allow_files(settings.max_connections + RESERVED_FILES)
        code = asyncio.run(self.serve_service(settings, service))
        if any(thread.daemon for thread in threading.enumerate()):
            # A thread that nothing can interrupt may still compute; ending the interpreter under it crashes.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)
        return code


def allow_files(count: int) -> None:
    """Lets this process open at least so many files, connections included, or as many as its hard limit permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def keep_large_blocks() -> bool:
    """Keeps glibc from returning large blocks to the system between two uses; returns whether it could.

    glibc maps blocks above 128 KiB and unmaps them when they are freed, so every 1 MiB frame costs 256 page
    faults each time it is copied, and an 8 MiB tensor takes nearly twice as long from process to process
    (`benchmarks/transport.py --stock-allocator`).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))

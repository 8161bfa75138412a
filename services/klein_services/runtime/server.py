"""Keeps the C allocator from giving large blocks back to the system between two uses.

glibc takes blocks above 128 KiB from the system and returns them when they are freed, so every 1 MiB frame
costs 256 page faults each time it is copied. An 8 MiB tensor's hop takes nearly twice the time then, as
`benchmarks/transport.py` shows with `--stock-allocator`.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TypeVar

from klein_core.errors import DeviceFault, KleinError
from klein_services.runtime import logs, metrics, tracing
from klein_services.runtime.health import Readiness, State
from klein_services.runtime.listener import BindError, Listener
from klein_services.runtime.settings import ServerSettings, SettingsError, describe, load_settings, misspelled
from klein_services.runtime.stage import Application, software_version

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BLOCK_BYTES = 32 << 20
"""Smaller blocks are kept. The largest value that glibc takes; few tensors on the wire are larger."""
_KEPT_BYTES = 64 << 20
"""Free memory at the heap's end beyond this goes back to the system."""


def keep_large_blocks() -> bool:
    """Sets it for this process; returns whether the C library is one where it can be set."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


_log = logging.getLogger("klein.server")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals(stop_requested: asyncio.Event, stop_now: asyncio.Event) -> Iterator[None]:
    """Sets `stop_requested` on the first signal and `stop_now` on the second, while the block runs."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        _log.info("signal", extra={"signal": signal.Signals(number).name})
        (stop_now if stop_requested.is_set() else stop_requested).set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


_Settings = TypeVar("_Settings", bound=ServerSettings)
_STAGE_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "PIL")
"""What the base installation lacks, by the names that they are imported by."""


def start(
    settings_class: type[_Settings],
    make_application: Callable[[_Settings], Application],
    environment: Mapping[str, str],
    overrides: Mapping[str, object],
) -> int:
    """Reads the settings and serves; what a `__main__` does.

    Returns:
        The process's exit code: 2 for a setting that it cannot have, 1 without torch where it is needed, else as
        `run`.
    """
    try:
        settings = load_settings(settings_class, environment, overrides).settings
        application = make_application(settings)
    except SettingsError as error:
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
    return run(settings, application, misspelled(settings_class, environment))


def run(settings: ServerSettings, application: Application, warnings: Sequence[str] = ()) -> int:
    """Serves in this process until it is told to stop; for `__main__`. Warnings are logged first.

    Returns:
        The process's exit code: 0 after a clean stop, 1 when it could not start or lost its device.
    """
    logs.configure(settings.log_level, settings.log_format)
    for warning in warnings:
        _log.warning("%s", warning)
    keep_large_blocks()
    code = asyncio.run(serve(settings, application))
    if any(thread.daemon for thread in threading.enumerate()):
        # A thread that nothing can interrupt may still compute; ending the interpreter under it crashes.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


async def serve(settings: ServerSettings, application: Application) -> int:
    """Serves until SIGTERM or SIGINT; a second signal stops at once.

    Returns:
        The exit code: 0 after a clean stop, 1 when it could not start or lost its device.
    """
    tracing.start(settings.otlp_endpoint, application.name, software_version())
    server = Server(settings, application)
    try:
        with stop_signals(server.stop_requested, server.stop_now):
            return await server.live()
    except (BindError, SettingsError, KleinError) as error:
        _log.error("%s", error)
        return 1
    except Exception:
        _log.exception("the server ends because of a fault")
        return 1
    finally:
        await application.close()
        tracing.stop()


@asynccontextmanager
async def running_server(
    application: Application, settings: ServerSettings | None = None
) -> AsyncIterator[str]:
    """Runs a server inside the current event loop, for tests; yields its address once it serves.

    Without settings it listens on a free port of 127.0.0.1, has no metrics port and drains without delay.
    """
    base = settings or ServerSettings(drain_delay_seconds=0, grace_seconds=5, metrics_port=0)
    server = Server(replace(base, host="127.0.0.1"), application)
    try:
        await server.start()
        await server.load()
        yield f"127.0.0.1:{server.port}"
        await server.drain()
    finally:
        await server.abandon()
        await application.close()


class Server:
    """One server and where it is in its life."""

    def __init__(self, settings: ServerSettings, application: Application) -> None:
        self.settings = settings
        self.application = application
        self.readiness = Readiness(application.name, application.service_names)
        self.stop_requested = asyncio.Event()
        self.stop_now = asyncio.Event()
        self._listener = Listener(settings, application, self.readiness, self._lose_device)
        self._lost = False

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._listener.port

    async def live(self) -> int:
        """Goes through the whole life and returns the exit code.

        Raises:
            BindError: a port cannot be had.
            CheckpointError: the model cannot be loaded.
            SettingsError: the model cannot be loaded as the settings say.
        """
        try:
            await self.start()
            if await self._load_unless_stopped():
                await self.stop_requested.wait()
                await self.drain()
        finally:
            await self.abandon()
        return int(self._lost)

    async def start(self) -> None:
        """Binds and answers health, reflection, channelz and metrics; everything else is UNAVAILABLE."""
        application = self.application
        names = (*application.service_names, *application.open_service_names)
        metrics.initialize(application.name, names, application.operations)
        await self.readiness.enter(State.LOADING)
        await self._listener.start()
        _log.info("listening", extra={"port": self.port, "stage": self.application.name})

    async def load(self) -> None:
        """Loads and warms up the model, then takes calls."""
        started_at = time.monotonic()
        await self.application.load()
        seconds = time.monotonic() - started_at
        metrics.LOAD_SECONDS.labels(self.application.name).set(seconds)
        await self.readiness.enter(State.SERVING)
        _log.info("serving", extra={"port": self.port, "load_seconds": round(seconds, 3)})

    async def drain(self) -> None:
        """Says NOT_SERVING, waits until callers know, refuses new calls and lets the running ones finish."""
        await self.readiness.enter(State.DRAINING)
        await self.application.drain()
        _log.info("draining", extra={"delay_seconds": self.settings.drain_delay_seconds})
        await self._sleep_unless_hurried(self.settings.drain_delay_seconds)
        await self.readiness.enter(State.STOPPING)
        stopping = asyncio.create_task(self._listener.stop(self.settings.grace_seconds))
        hurry = asyncio.create_task(self.stop_now.wait())
        await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            await self._listener.stop(0)
        await stopping
        _log.info("stopped")

    async def abandon(self) -> None:
        """Ends whatever still runs; nothing after a drain."""
        await self._listener.stop(0)

    async def _load_unless_stopped(self) -> bool:
        loading = asyncio.create_task(self.load())
        stopping = asyncio.create_task(self.stop_requested.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if loading.done():
            await loading
            return True
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        _log.info("stopped while loading")
        return False

    async def _sleep_unless_hurried(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stop_now.wait(), seconds)
        except TimeoutError:
            return

    def _lose_device(self, fault: DeviceFault) -> None:
        _log.critical("the device failed; draining so that this process is replaced: %s", fault)
        self._lost = True
        self.stop_requested.set()


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
    sys.stderr.writelines(f"{sentence}.\n" for sentence in misspelled(settings_class, environment))
    return 0

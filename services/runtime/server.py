"""A server's life: bind, load, serve, drain, stop.

Health answers from the first moment: liveness (the empty name) is SERVING as long as the event loop turns,
and the application's own service names are SERVING only between the end of loading and the begin of draining.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

from klein_core.errors import DeviceFault, KleinError
from services.runtime import allocator, logs, metrics, tracing
from services.runtime.application import Application
from services.runtime.listener import BindError, Listener
from services.runtime.readiness import Readiness, State
from services.runtime.settings import ServerSettings, SettingsError, load_settings
from services.runtime.settings_report import misspelt
from services.runtime.signals import stop_signals
from services.runtime.stages import software_version

_Settings = TypeVar("_Settings", bound=ServerSettings)
_STAGE_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "PIL")
"""What the base installation lacks, by the names that they are imported by."""
_log = logging.getLogger("klein.server")


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
    return run(settings, application, misspelt(settings_class, environment))


def run(settings: ServerSettings, application: Application, warnings: Sequence[str] = ()) -> int:
    """Serves in this process until it is told to stop; for `__main__`. Warnings are logged first.

    Returns:
        The process's exit code: 0 after a clean stop, 1 when it could not start or lost its device.
    """
    logs.configure(settings.log_level, settings.log_format)
    for warning in warnings:
        _log.warning("%s", warning)
    allocator.keep_large_blocks()
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
        metrics.initialise(application.name, names, application.operations)
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

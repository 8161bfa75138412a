"""Server: the life of one service, from binding its ports to the drain after a signal."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from klein_core.errors import DeviceFault, KleinError
from klein_services.runtime import metrics, tracing
from klein_services.runtime.health import ServerHealth, State
from klein_services.runtime.listener import BindError, Listener
from klein_services.runtime.load_phases import begin_load, process_began_at
from klein_services.runtime.pem import PemError
from klein_services.runtime.settings import ServerSettings, SettingsError
from klein_services.runtime.stage import Service, software_version
from klein_services.runtime.stage_settings import StageSettings
from klein_services.runtime.tls import exposure
from klein_services.runtime.watchdog import Watchdog, end_process

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger("klein.server")


class Server:
    """One server and its state: loading, serving, draining, stopped."""

    def __init__(self, settings: ServerSettings, service: Service, began_at: float | None = None) -> None:
        self.settings = settings
        self.service = service
        self.health = ServerHealth(service.name, service.service_names)
        self.stop_requested = asyncio.Event()
        self.stop_now = asyncio.Event()
        self._listener = Listener(settings, service, self.health, self._on_device_fault)
        self._lost_device = False
        self._began_at = began_at

    @property
    def port(self) -> int:
        """The gRPC port."""
        return self._listener.port

    async def run(self) -> int:
        """Starts, loads, serves until `stop_requested` is set, and drains. Returns the exit code.

        Raises:
            BindError: a port is not available.
            CheckpointError: the model cannot be loaded.
            SettingsError: TLS or the model cannot be loaded as the settings require.
        """
        try:
            await self.start()
            if await self._load_unless_stopped():
                with self._watchdog():
                    await self.stop_requested.wait()
                    await self.drain()
        finally:
            await self.abandon()
        return int(self._lost_device)

    async def start(self) -> None:
        """Binds and answers health, reflection, channelz and metrics; everything else is UNAVAILABLE."""
        service = self.service
        names = (*service.service_names, *service.open_service_names)
        metrics.initialize(service.name, names, service.operations)
        await self.health.set_state(State.LOADING)
        await self._listener.start()
        _log.info("listening", extra={"port": self.port, "stage": service.name})
        asks_for_tokens = service.guard is not None
        if warning := exposure(
            self.settings, self.port, takes_tokens=service.is_public, asks_for_tokens=asks_for_tokens
        ):
            _log.warning("%s", warning)

    async def load(self) -> None:
        """Loads and warms up the service, then takes calls."""
        phases = begin_load(self._began_at)
        await self.service.load()
        seconds = phases.report(self.service.name)
        await self.health.set_state(State.SERVING)
        fields = {f"{phase}_seconds": round(value, 3) for phase, value in seconds.items()}
        total = round(sum(seconds.values()), 3)
        _log.info("serving", extra={"port": self.port, "load_seconds": total} | fields)

    async def drain(self) -> None:
        """Publishes NOT_SERVING, waits until clients notice, refuses new calls and lets running ones finish."""
        await self.health.set_state(State.DRAINING)
        await self.service.drain()
        delay_seconds = self.settings.drain_delay_seconds
        _log.info("draining", extra={"delay_seconds": delay_seconds})
        hurrying = asyncio.create_task(self.stop_now.wait())
        try:
            await asyncio.wait((hurrying,), timeout=delay_seconds)
            await self.health.set_state(State.STOPPING)
            stopping = asyncio.create_task(self._listener.stop(self.settings.grace_seconds))
            await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurrying.cancel()
        if not stopping.done():
            await self._listener.stop(0)
        await stopping
        _log.info("stopped")

    async def abandon(self) -> None:
        """Cancels the calls that still run; there are none after a drain."""
        await self._listener.stop(0)

    async def _load_unless_stopped(self) -> bool:
        """Loads, and returns whether that was not interrupted by a request to stop."""
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

    @contextmanager
    def _watchdog(self) -> Iterator[None]:
        """Watches a stage's work while the block runs, unless the settings turn that off."""
        settings, loop = self.settings, asyncio.get_running_loop()
        if not isinstance(settings, StageSettings) or not settings.watchdog_seconds:
            yield
            return

        def on_hang() -> None:
            asyncio.run_coroutine_threadsafe(self._give_up(), loop)

        watchdog = Watchdog(self.service.name, settings.watchdog_seconds, on_hang, end_process)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()

    async def _give_up(self) -> None:
        """Sends new calls to other replicas; the watchdog ends the process a moment later."""
        await self.health.set_state(State.HUNG)
        await self.service.drain()

    def _on_device_fault(self, fault: DeviceFault) -> None:
        _log.critical("the device failed; draining so that this process is replaced: %s", fault)
        self._lost_device = True
        self.stop_requested.set()


async def serve(settings: ServerSettings, service: Service) -> int:
    """Serves until SIGTERM or SIGINT; a second signal stops at once.

    Returns:
        The exit code: 0 after a clean stop, 1 when the server could not start or lost its device.
    """
    server = Server(settings, service, process_began_at())
    try:
        tracing.start(settings.otlp_endpoint, service.name, software_version())
        async with reload_signal(service):
            with stop_signals(server.stop_requested, server.stop_now):
                return await server.run()
    except (BindError, SettingsError, PemError, KleinError) as error:
        _log.error("%s", error)
        return 1
    except Exception:
        _log.exception("the server ends because of a fault")
        return 1
    finally:
        await service.close()
        tracing.stop()


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


@asynccontextmanager
async def reload_signal(service: Service) -> AsyncIterator[None]:
    """Reloads a service that can on each SIGHUP, while the block runs. Signals during a reload cause one more."""
    if (reload := service.reload) is None:
        yield
        return
    requested = asyncio.Event()

    async def reload_on_request() -> None:
        while await requested.wait():
            requested.clear()
            try:
                await reload()
            except Exception:
                _log.exception("the reload failed because of a fault")

    task = asyncio.create_task(reload_on_request())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, requested.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running_server(service: Service, settings: ServerSettings | None = None) -> AsyncIterator[str]:
    """Runs a server inside the current event loop, for tests; yields its address once it serves.

    Without settings it listens on a free port of 127.0.0.1, has no metrics port and drains without delay.
    """
    base = settings or ServerSettings(drain_delay_seconds=0, grace_seconds=5, metrics_port=0)
    server = Server(replace(base, host="127.0.0.1"), service)
    try:
        await server.start()
        await server.load()
        yield f"127.0.0.1:{server.port}"
        await server.drain()
    finally:
        await server.abandon()
        await service.close()

"""The suite's processes on this machine: their settings, start, readiness and end.

Used by `klein up`, the demo, the end-to-end tests and the benchmarks.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from klein_core.checkpoint.files import TOKENIZER
from klein_core.pico import WEIGHTS
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.model_store import COMPONENTS, PICO, model_files, require_model
from klein_services.cli.ports import (
    LOOPBACK,
    ReservedPort,
    reserve_all_or_free,
    reserve_gateway,
    reserve_public,
)
from klein_services.cli.prerequisites import require_temporary_folder, require_torch
from klein_services.cli.probes import Probes, StartupPhase
from klein_services.cli.process import (
    DENOISER,
    GATEWAY,
    ORCHESTRATOR,
    PROCESSES,
    STAGES,
    SUITE,
    Child,
    ChildSpec,
    ProcessDied,
    inherited_environment,
    wait_for_all,
    with_flags,
)
from klein_services.cli.stage_process import settings_class
from klein_services.runtime.channels import host_for_url
from klein_services.runtime.settings import (
    ProcessSettings,
    ServerSettings,
    SettingsError,
    load_settings,
    variable_name,
)

METRICS_PORTS = range(9464, 9464 + len(PROCESSES))
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05
_EVERY_ADDRESS = ("", "0.0.0.0", "[::]", "::")
_COMMON_FLAGS = {
    "KLEIN_HOST": "--host",
    "KLEIN_PORT": "--port",
    "KLEIN_MODEL_PATH": "--model",
    "KLEIN_TOKENIZER_PATH": "--tokenizer",
    "KLEIN_VARIANT": "--variant",
    "KLEIN_DEVICE": "--device",
    "KLEIN_DTYPE": "--dtype",
    "KLEIN_QUANTIZATION": "--quantization",
    "KLEIN_ADAPTERS_FOLDER": "--adapters",
    "KLEIN_OFFLOAD": "--offload",
    "KLEIN_THREADS": "--threads",
    "KLEIN_TLS_CERTIFICATE": "--tls-certificate",
    "KLEIN_TLS_KEY": "--tls-key",
    "KLEIN_TLS_CLIENT_CA": "--tls-client-ca",
}
"""Variable → flag of `klein up` that sets it for every process."""

_NO_TLS = dict.fromkeys(
    (
        "KLEIN_TLS_CERTIFICATE",
        "KLEIN_TLS_KEY",
        "KLEIN_TLS_CLIENT_CA",
        "KLEIN_TLS_CLIENT_NAMES",
        "KLEIN_HEALTH_PORT",
    ),
    "",
)
_NO_STAGE_TLS = dict.fromkeys(
    ("KLEIN_STAGE_TLS_CA", "KLEIN_STAGE_TLS_CERTIFICATE", "KLEIN_STAGE_TLS_KEY", "KLEIN_STAGE_TLS_NAME"), ""
)

OnChange = Callable[[Mapping[str, StartupPhase]], None]


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Options of a suite."""

    model: str = PICO
    """`pico`, a model's folder in the diffusers layout, one that was pulled by name, or one safetensors file."""
    parts: Mapping[str, Path] = field(default_factory=dict)
    """Component (`transformer`, `vae`, `text_encoder`, `tokenizer`) → file or folder that replaces the model's."""
    variant: str = ""
    """Name of the published model that a bare transformer is."""
    host: str = LOOPBACK
    """Address that the public API listens on."""
    port: int = 0
    """Port of the public API; 0 takes a free one."""
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = NO_QUANTIZATION
    """Format that plain weights of text encoder and transformer are converted to."""
    offload: str = "none"
    """`blocks` keeps the denoiser's blocks in host memory."""
    threads: int = 0
    """CPU threads of each stage; 0 takes `default_threads`."""
    log_folder: Path | None = None
    """`None` creates a temporary folder, which is removed after a clean end."""
    adapters: Path | None = None
    """Folder of the adapters that requests may name."""
    has_gateway: bool = False
    """Whether the gateway is started, too."""
    gateway_port: int | None = None
    """Port of the gateway; 0 takes a free one, `None` 8080 or a free one where that is taken."""
    tls: Mapping[str, Path] = field(default_factory=dict)
    """Setting of the public API's TLS, such as `tls_certificate`, → its file."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further `KLEIN_` variables for every process."""


class Suite:
    """Processes that start and end together. Leaving the `with` block stops them.

    Raises:
        CliError: the model is missing, a setting cannot be used, or the port is taken.
    """

    def __init__(self, options: SuiteOptions) -> None:
        require_torch()
        require_temporary_folder()
        self.options = options
        self.files = model_files(options.model, options.parts, options.variant)
        self.model_name = require_model(self.files)
        if options.adapters is not None and not options.adapters.is_dir():
            raise CliError(f"--adapters {options.adapters} is not a folder.", exit_code=MISUSED)
        self.processes = PROCESSES if options.has_gateway and not self.gateway_problem else SUITE
        """Names of the processes, in the order of their start."""
        self.children: dict[str, Child] = {}
        self._killed: list[str] = []
        with ExitStack() as held:
            reserved = [held.enter_context(ReservedPort()) for _ in STAGES]
            reserved.append(held.enter_context(reserve_public(options.port, options.host)))
            if options.has_gateway:
                reserved.append(held.enter_context(reserve_gateway(options.gateway_port, options.host)))
            preferred = METRICS_PORTS[: len(self.processes)]
            metrics = [held.enter_context(each) for each in reserve_all_or_free(preferred)]
            self.ports = {name: each.port for name, each in zip(self.processes, reserved, strict=True)}
            self.metrics_ports = {name: each.port for name, each in zip(self.processes, metrics, strict=True)}
            self.health_ports: dict[str, int] = {}
            """Plaintext ports for the probes of the processes that speak TLS."""
            for process in self.processes:
                settings = self._check_settings(process)
                if isinstance(settings, ServerSettings) and settings.tls_certificate:
                    port = settings.health_port or held.enter_context(ReservedPort()).port
                    self.health_ports[process] = port
            self.log_folder = options.log_folder or Path(tempfile.mkdtemp(prefix="klein-"))
            try:
                self.log_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                sentence = f"--log-folder {self.log_folder} cannot be made: {error.strerror}."
                raise CliError(sentence, exit_code=MISUSED) from error
            self._reservations = held.pop_all()

    @property
    def target(self) -> str:
        """Address of the public API for clients on this machine."""
        return self._public_address(ORCHESTRATOR)

    @property
    def gateway_problem(self) -> str:
        """Reason for which the gateway cannot call this suite; empty when it can."""
        variable = variable_name("tls_certificate")
        has_tls = self.options.tls or self.options.settings.get(variable) or os.environ.get(variable)
        if not has_tls or os.environ.get(variable_name("target_tls_ca")):
            return ""
        return (
            "the orchestrator speaks TLS, and KLEIN_TARGET_TLS_CA, the authorities that issued its certificate, is "
            "not set"
        )

    @property
    def gateway_url(self) -> str:
        """URL of the gateway for clients on this machine; empty without one."""
        return f"http://{self._public_address(GATEWAY)}" if GATEWAY in self.processes else ""

    @property
    def shares_gpu(self) -> bool:
        """Whether stages share a CUDA device: then the denoiser, which measures memory and speed, starts last."""
        device = self.options.device
        return device.startswith("cuda") or (device == "auto" and Path("/dev/nvidia0").exists())

    @property
    def probe_addresses(self) -> dict[str, str]:
        """Plaintext address of each process that answers its health."""
        addresses = {process: self._address(process) for process in self.processes}
        ports = self.health_ports | {
            name: self.metrics_ports[name] for name in self.processes if name == GATEWAY
        }
        for process, port in ports.items():
            addresses[process] = f"{addresses[process].rpartition(':')[0]}:{port}"
        return addresses

    def __enter__(self) -> Suite:
        try:
            for process in self.processes:
                if process != DENOISER or not self.shares_gpu:
                    self.children[process] = Child(self._child_spec(process))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and not self._killed and self.options.log_folder is None:
            shutil.rmtree(self.log_folder)

    def wait_until_ready(
        self,
        *,
        timeout_seconds: float = math.inf,
        on_change: OnChange = lambda phases: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Waits until all serve; returns false when `cancelled` returned true first.

        Raises:
            ProcessDied: one ended instead.
            CliError: the time passed.
        """
        phases = dict.fromkeys(self.processes, StartupPhase.STARTING)
        end = time.monotonic() + timeout_seconds
        with Probes(self.probe_addresses) as probes:
            while not cancelled():
                self.raise_if_died()
                waiting = [name for name, phase in phases.items() if phase is not StartupPhase.READY]
                # A stage that is too busy to answer has not gone back to its start.
                phases |= {
                    name: phase
                    for name, phase in probes.check(waiting).items()
                    if phase is not StartupPhase.STARTING
                }
                ready = {process for process, phase in phases.items() if phase is StartupPhase.READY}
                if DENOISER not in self.children and ready >= {*STAGES} - {DENOISER}:
                    self.children[DENOISER] = Child(self._child_spec(DENOISER))
                on_change(phases)
                late = [f"{name} ({phase.value})" for name, phase in phases.items() if name not in ready]
                if not late:
                    return True
                if time.monotonic() > end:
                    raise CliError(
                        f"{', '.join(late)} not ready after {timeout_seconds:.0f} s.",
                        f"The logs are in {self.log_folder}.",
                    )
                time.sleep(POLL_SECONDS)
        return False

    def raise_if_died(self) -> None:
        """Raises ProcessDied when one of them has ended."""
        for child in self.children.values():
            if child.exit_code is not None:
                raise ProcessDied(child, flags=self.flags(child.name))

    def restart(self, process: str) -> None:
        """Starts a process that ended once more, on the same ports; its log goes on in the same file."""
        self.children[process] = Child(replace(self._child_spec(process), appends_log=True))

    def stop(self, *, insisted: Callable[[], bool] = lambda: False) -> list[str]:
        """Stops what runs, the public ones first so that their requests can end; kills what takes too long.

        Args:
            insisted: called at each poll; true kills at once.

        Returns:
            Names of the processes that had to be killed, in this call or before.
        """
        alive = [child for child in self.children.values() if child.exit_code is None]
        for names in ((GATEWAY,), (ORCHESTRATOR,), STAGES):
            group = [child for child in alive if child.name in names]
            for child in group:
                child.terminate()
            end = time.monotonic() + GRACE_SECONDS + 2.0
            running = group
            while running and time.monotonic() < end and not insisted():
                running = wait_for_all(running, POLL_SECONDS)
            for child in running:
                child.kill()
            wait_for_all(running, GRACE_SECONDS)
            self._killed += [child.name for child in running]
        self._reservations.close()
        return self._killed

    def flags(self, process: str) -> dict[str, str]:
        """Returns `KLEIN_` variable → flag of `klein up`, for the settings that the flags set."""
        if process == GATEWAY:
            return _COMMON_FLAGS | {"KLEIN_PORT": "--gateway-port"}
        if process == ORCHESTRATOR:
            return _COMMON_FLAGS
        return _COMMON_FLAGS | {"KLEIN_WEIGHTS_PATH": f"--{COMPONENTS[process].replace('_', '-')}"}

    def _check_settings(self, process: str) -> ProcessSettings:
        """Returns the settings of a process.

        Raises:
            CliError: they would stop it at its start; the text has the flags of `klein up`.
        """
        environment = inherited_environment() | self._settings(process)
        try:
            settings = load_settings(settings_class(process), environment, {}).settings
            settings.check()
        except SettingsError as error:
            sentence = with_period(with_flags(str(error), self.flags(process)))
            raise CliError(sentence, "`klein up --help` shows every flag.", MISUSED) from error
        return settings

    def _address(self, process: str) -> str:
        is_public = process in (ORCHESTRATOR, GATEWAY)
        return self._public_address(process) if is_public else f"{LOOPBACK}:{self.ports[process]}"

    def _public_address(self, process: str) -> str:
        host = LOOPBACK if self.options.host in _EVERY_ADDRESS else self.options.host
        return f"{host_for_url(host)}:{self.ports[process]}"

    def _child_spec(self, process: str) -> ChildSpec:
        environment = inherited_environment() | self._settings(process)
        if port := self.health_ports.get(process):
            environment["KLEIN_HEALTH_PORT"] = str(port)
        return ChildSpec(process, self._address(process), environment, self.log_folder / f"{process}.log")

    def _settings(self, process: str) -> dict[str, str]:
        is_public = process in (ORCHESTRATOR, GATEWAY)
        common = {
            "KLEIN_HOST": self.options.host if is_public else LOOPBACK,
            "KLEIN_PORT": str(self.ports[process]),
            "KLEIN_METRICS_PORT": str(self.metrics_ports[process]),
            "KLEIN_MODEL_NAME": self.model_name,
            "KLEIN_LOG_FORMAT": os.environ.get("KLEIN_LOG_FORMAT", "console"),
            # No load balancer has to notice before these processes stop.
            "KLEIN_DRAIN_DELAY_SECONDS": "0",
            "KLEIN_GRACE_SECONDS": f"{GRACE_SECONDS:g}",
        }
        if process == GATEWAY:
            # The user's own target is the one that commands call.
            pages = ",".join(f"{LOOPBACK}:{self.metrics_ports[name]}" for name in SUITE)
            specific = {"KLEIN_TARGET": self.target, "KLEIN_METRICS_TARGETS": pages, **_NO_TLS}
            return common | specific | dict(self.options.settings)
        # Exactly these stages, in plaintext, whatever the user's shell names.
        targets = {"KLEIN_ROUTING_TABLE": "", **_NO_STAGE_TLS} | {
            f"KLEIN_{stage.replace('-', '_').upper()}_TARGET": f"{LOOPBACK}:{self.ports[stage]}"
            for stage in STAGES
        }
        targets |= {variable_name(name): str(path) for name, path in self.options.tls.items()}
        specific = targets if is_public else self._stage_settings(process)
        return common | specific | dict(self.options.settings)

    def _stage_settings(self, stage: str) -> dict[str, str]:
        parts, model = self.options.parts, self.files.model
        return {
            # The user's own variables are for the public API.
            **_NO_TLS,
            "KLEIN_MODEL_PATH": PICO if model in (None, WEIGHTS) else str(model),
            # An empty value masks the user's own variable, which may be for another model.
            "KLEIN_WEIGHTS_PATH": str(parts.get(COMPONENTS[stage], "")),
            "KLEIN_TOKENIZER_PATH": str(parts.get(TOKENIZER, "")),
            "KLEIN_VARIANT": self.options.variant,
            "KLEIN_DEVICE": self.options.device,
            "KLEIN_DTYPE": self.options.dtype,
            "KLEIN_QUANTIZATION": self.options.quantization,
            "KLEIN_ADAPTERS_FOLDER": str(self.options.adapters.resolve()) if self.options.adapters else "",
            "KLEIN_OFFLOAD": self.options.offload,
            "KLEIN_THREADS": str(self.options.threads or default_threads()),
        }


def default_threads() -> int:
    """Returns half of the cores that this process may use.

    Stages mostly take turns, but threads that compete for a core wait for each other at every operation: one too
    many costs more than one too few. Where each core runs two threads, half of them is one per physical core.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // 2)

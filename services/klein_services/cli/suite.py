"""All four processes of the suite on this machine: their start, their life, their end.

Used by `klein up`, the demo, the end-to-end tests and the benchmarks.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from klein_core.checkpoint.files import TOKENIZER
from klein_core.pico import WEIGHTS
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.health import Probes, Readiness
from klein_services.cli.model_store import COMPONENTS, PICO, model_files, require_model
from klein_services.cli.ports import LOOPBACK, free_ports, is_free
from klein_services.cli.process import (
    ORCHESTRATOR,
    PROCESSES,
    STAGES,
    Child,
    ChildSpec,
    StageDied,
    inherited_environment,
    wait_for_all,
)
from klein_services.runtime.channels import host_for_url

FIRST_METRICS_PORT = 9464
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05
_EVERY_ADDRESS = ("", "0.0.0.0", "[::]", "::")

OnChange = Callable[[Mapping[str, Readiness]], None]


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """How the suite is to run."""

    model: str = PICO
    """`pico`, a model's folder in the diffusers layout, one that was pulled by name, or one safetensors file."""
    parts: Mapping[str, Path] = field(default_factory=dict)
    """Component (`transformer`, `vae`, `text_encoder`, `tokenizer`) → its own file or folder, not the model's."""
    variant: str = ""
    """Which published model it is, where no model_index.json tells."""
    host: str = LOOPBACK
    """Where the public API listens."""
    port: int = 0
    """The public API's port; 0 takes a free one."""
    device: str = "auto"
    dtype: str = "checkpoint"
    quantization: str = NO_QUANTIZATION
    """What plain weights of text encoder and transformer are made into."""
    offload: str = "none"
    """`blocks` leaves the denoiser's blocks in the machine's memory."""
    threads: int = 0
    """Threads that each stage computes with; 0 takes `default_threads`."""
    log_folder: Path | None = None
    """`None` makes a folder among the temporary files, which goes when all ended well."""
    adapters: Path | None = None
    """Folder of the adapters that requests may name."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """More KLEIN_* variables for every process."""


class Suite:
    """Four processes that live and end together. Leaving the `with` block stops them.

    Raises:
        CliError: the model is not there.
    """

    def __init__(self, options: SuiteOptions) -> None:
        require_torch()
        self.options = options
        self.files = model_files(options.model, options.parts, options.variant)
        self.model_name = require_model(self.files)
        if options.adapters is not None and not options.adapters.is_dir():
            raise CliError(f"--adapters {options.adapters} is no folder.", exit_code=MISUSED)
        self.log_folder = options.log_folder or Path(tempfile.mkdtemp(prefix="klein-"))
        _make_log_folder(self.log_folder)
        *stage_ports, free = free_ports(len(PROCESSES))
        self.ports = dict(zip(PROCESSES, (*stage_ports, options.port or free), strict=True))
        self.metrics_ports = _metrics_ports()
        self.children: dict[str, Child] = {}
        self._killed: list[str] = []

    @property
    def target(self) -> str:
        """Where clients on this machine reach the public API."""
        host = LOOPBACK if self.options.host in _EVERY_ADDRESS else self.options.host
        return f"{host_for_url(host)}:{self.ports['orchestrator']}"

    def __enter__(self) -> Suite:
        try:
            for process in PROCESSES:
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
        on_change: OnChange = lambda states: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Waits until all four serve; false when `cancelled` said so first.

        Raises:
            StageDied: one ended instead.
            CliError: the time passed.
        """
        states = dict.fromkeys(PROCESSES, Readiness.STARTING)
        end = time.monotonic() + timeout_seconds
        with Probes({process: child.address for process, child in self.children.items()}) as probes:
            while not cancelled():
                self.raise_if_died()
                waiting = [name for name, state in states.items() if state is not Readiness.READY]
                # A stage that is too busy to answer has not gone back to the start.
                states |= {
                    name: state
                    for name, state in probes.check(waiting).items()
                    if state is not Readiness.STARTING
                }
                on_change(states)
                if all(state is Readiness.READY for state in states.values()):
                    return True
                if time.monotonic() > end:
                    raise CliError(
                        f"{_late(states)} not ready after {timeout_seconds:.0f} s.", self.logs_hint
                    )
                time.sleep(POLL_SECONDS)
        return False

    def raise_if_died(self) -> None:
        """Raises StageDied when one of the four no longer runs."""
        for child in self.children.values():
            if child.exit_code is not None:
                raise StageDied(child)

    def stop(self, *, insisted: Callable[[], bool] = lambda: False) -> list[str]:
        """Stops what runs, the orchestrator first so that its requests can end; kills what takes too long.

        Args:
            insisted: asked all the time; true means to kill at once.

        Returns:
            The names of those that had to be killed, now or before.
        """
        running = [child for child in self.children.values() if child.exit_code is None]
        for group in (
            [child for child in running if child.stage == ORCHESTRATOR],
            [child for child in running if child.stage != ORCHESTRATOR],
        ):
            self._killed += _stop_together(group, insisted)
        return self._killed

    @property
    def logs_hint(self) -> str:
        return f"The logs are in {self.log_folder}."

    def _child_spec(self, process: str) -> ChildSpec:
        environment = inherited_environment() | self._settings(process)
        address = self.target if process == ORCHESTRATOR else f"{LOOPBACK}:{self.ports[process]}"
        return ChildSpec(process, address, environment, self.log_folder / f"{process}.log")

    def _settings(self, process: str) -> dict[str, str]:
        is_public = process == ORCHESTRATOR
        common = {
            "KLEIN_HOST": self.options.host if is_public else LOOPBACK,
            "KLEIN_PORT": str(self.ports[process]),
            "KLEIN_METRICS_PORT": str(self.metrics_ports[process]),
            "KLEIN_MODEL_NAME": self.model_name,
            "KLEIN_LOG_FORMAT": os.environ.get("KLEIN_LOG_FORMAT", "console"),
            # Nobody balances over these processes, so there is nobody to wait for before they stop.
            "KLEIN_DRAIN_DELAY_SECONDS": "0",
            "KLEIN_GRACE_SECONDS": f"{GRACE_SECONDS:g}",
        }
        specific = self._orchestrator_settings() if is_public else self._stage_settings(process)
        return common | specific | dict(self.options.settings)

    def _orchestrator_settings(self) -> dict[str, str]:
        targets = {
            f"KLEIN_{stage.replace('-', '_').upper()}_TARGET": f"{LOOPBACK}:{self.ports[stage]}"
            for stage in STAGES
        }
        # Exactly this suite, whatever table the person's own shell names.
        targets["KLEIN_ROUTING_TABLE"] = ""
        return targets | (PICO_LIMITS if self.files.model == WEIGHTS else {})

    def _stage_settings(self, stage: str) -> dict[str, str]:
        parts, model = self.options.parts, self.files.model
        return {
            "KLEIN_MODEL_PATH": PICO if model in (None, WEIGHTS) else str(model),
            # Empty is unset: what the person's own shell says is of another model.
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


PICO_LIMITS = {"KLEIN_DEFAULT_SIZE_PX": "128", "KLEIN_MAXIMUM_PIXEL_COUNT": str(256 * 256)}
"""What pico was trained on; it makes nonsense of larger pictures."""


def default_threads() -> int:
    """Half of the cores that this process may use.

    Stages mostly take turns, but threads that fight for a core wait for each other at every operation: one too
    many costs more than one too few. Where cores run two threads each, half of them is one for each real core.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // 2)


def require_torch() -> None:
    """Raises CliError in an installation that can only be a client or an orchestrator."""
    if find_spec("torch") is None:
        raise CliError(
            "This installation cannot run stages: torch is missing.",
            "Install it with: pip install 'klein-suite[stages]'",
        )


def _make_log_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(
            f"--log-folder {folder} cannot be made: {error.strerror}.", exit_code=MISUSED
        ) from error


def _metrics_ports() -> dict[str, int]:
    wanted = range(FIRST_METRICS_PORT, FIRST_METRICS_PORT + len(PROCESSES))
    ports = list(wanted) if all(is_free(port) for port in wanted) else free_ports(len(PROCESSES))
    return dict(zip(PROCESSES, ports, strict=True))


def _late(states: Mapping[str, Readiness]) -> str:
    return ", ".join(
        f"{name} ({state.value})" for name, state in states.items() if state is not Readiness.READY
    )


def _stop_together(children: list[Child], insisted: Callable[[], bool]) -> list[str]:
    for child in children:
        child.terminate()
    end = time.monotonic() + GRACE_SECONDS + 2.0
    while children and time.monotonic() < end and not insisted():
        children = wait_for_all(children, POLL_SECONDS)
    for child in children:
        child.kill()
    wait_for_all(children, GRACE_SECONDS)
    return [child.stage for child in children]

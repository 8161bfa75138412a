"""Several replicas of each stage as real processes behind one orchestrator, and the faults that tests cause in them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from klein_core.pico import WEIGHTS
from klein_services.cli.ports import ReservedPort
from klein_services.cli.probes import Probes, StartupPhase
from klein_services.cli.process import ORCHESTRATOR, STAGES, Child, ChildSpec, inherited_environment
from tests.e2e.links import Link, Network, running_network
from tests.e2e.preloaded_child import PreloadedChild
from tests.e2e.running_suite import READY_SECONDS

STOP_SECONDS = 30.0


class Replica:
    """One process on a port that stays its own; it may be killed, stopped and started again."""

    def __init__(
        self, stage: str, spec: ChildSpec, port: ReservedPort, metrics_port: ReservedPort | None = None
    ) -> None:
        self.stage = stage
        self._metrics_port = metrics_port
        self._spec = spec
        self._port = port
        self.child: Child = PreloadedChild(spec)
        self.link: Link | None = None
        """Between the orchestrator and this replica, if the fleet has links."""

    @property
    def address(self) -> str:
        return self._spec.address

    @property
    def metrics_address(self) -> str:
        """Address of its metrics page; empty where it has none."""
        return f"127.0.0.1:{self._metrics_port.port}" if self._metrics_port else ""

    def kill(self) -> None:
        """Ends the process at once, as the kernel does when memory runs out."""
        self.child.kill()
        self.child.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Stops the process where it is; its connections stay open."""
        psutil.Process(self.child.pid).send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Lets a stopped process go on."""
        psutil.Process(self.child.pid).send_signal(signal.SIGCONT)

    def drain(self) -> bool:
        """Ends the process as Kubernetes does; returns whether it ended by itself with 0."""
        self.child.terminate()
        return self.child.wait(STOP_SECONDS) and self.child.exit_code == 0

    def start(self, **settings: str) -> None:
        """Starts a process in place of one that has ended, with further `KLEIN_` variables."""
        environment = {**self._spec.environment, **settings}
        self.child = PreloadedChild(replace(self._spec, environment=environment, appends_log=True))

    def wait_until_serving(self, seconds: float = READY_SECONDS) -> None:
        end = time.monotonic() + seconds
        with Probes({self.stage: self.address}) as probes:
            while probes.check([self.stage])[self.stage] is not StartupPhase.READY:
                assert self.child.exit_code is None, "\n".join(self.child.log_tail())
                assert time.monotonic() < end, f"{self.stage} at {self.address} does not serve"
                time.sleep(0.05)

    def close(self) -> None:
        if self.child.exit_code is None:
            # A stopped process takes no other signal.
            self.kill()
        self._port.release()
        if self._metrics_port:
            self._metrics_port.release()


@dataclass(frozen=True)
class Fleet:
    """An orchestrator and its stages' replicas."""

    replicas: Mapping[str, list[Replica]]
    orchestrator: Replica
    network: Network
    """Of the links between them."""

    @property
    def target(self) -> str:
        return self.orchestrator.address

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replica in [self.orchestrator, *(each for pool in self.replicas.values() for each in pool)]:
            replica.close()

    def wait_until_serving(self) -> None:
        for replica in [*(each for pool in self.replicas.values() for each in pool), self.orchestrator]:
            replica.wait_until_serving()

    def logs(self) -> str:
        """Everything that all processes have logged."""
        every = [self.orchestrator, *(each for pool in self.replicas.values() for each in pool)]
        return "\n".join(replica.child.spec.log_file.read_text(errors="replace") for replica in every)


@contextmanager
def running_fleet(
    folder: Path,
    counts: Mapping[str, int],
    *,
    model: Path = WEIGHTS,
    settings: Mapping[str, str] | None = None,
    has_metrics: bool = False,
    has_links: bool = False,
) -> Iterator[Fleet]:
    """Runs `counts` replicas of each stage, and an orchestrator that reaches them by their addresses.

    Args:
        folder: where the logs go.
        counts: replicas by stage; one where a stage is absent.
        model: folder of the model.
        settings: `KLEIN_` variables of all processes.
        has_metrics: whether each process has a metrics page.
        has_links: whether the orchestrator reaches the replicas over links, which may be disturbed.
    """
    common = {
        **inherited_environment(),
        "KLEIN_HOST": "127.0.0.1",
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_MODEL_PATH": str(model),
        "KLEIN_MODEL_NAME": "pico",
        "KLEIN_DEVICE": "cpu",
        "KLEIN_THREADS": "1",
        "KLEIN_DRAIN_DELAY_SECONDS": "0.5",
        **(settings or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        pools: dict[str, list[Replica]] = {}
        for stage in STAGES:
            pools[stage] = [
                _started(held, stage, f"{stage}-{index}", common, folder, has_metrics)
                for index in range(counts.get(stage, 1))
            ]
        network = held.enter_context(running_network())
        if has_links:
            for replica in (each for pool in pools.values() for each in pool):
                replica.link = network.link(replica.address)
        targets = {
            f"KLEIN_{stage.replace('-', '_').upper()}_TARGET": "ipv4:"
            + ",".join((replica.link or replica).address for replica in pool)
            for stage, pool in pools.items()
        }
        environment = {**common, **targets}
        orchestrator = _started(held, ORCHESTRATOR, ORCHESTRATOR, environment, folder, has_metrics)
        fleet = held.enter_context(Fleet(pools, orchestrator, network))
        fleet.wait_until_serving()
        yield fleet


def _started(
    held: ExitStack,
    stage: str,
    name: str,
    environment: Mapping[str, str],
    folder: Path,
    has_metrics: bool,
) -> Replica:
    port, metrics_port = ReservedPort(), ReservedPort() if has_metrics else None
    variables = {**environment, "KLEIN_PORT": str(port.port)}
    if metrics_port is not None:
        variables["KLEIN_METRICS_PORT"] = str(metrics_port.port)
    if stage == ORCHESTRATOR:
        variables = {key: value for key, value in variables.items() if key not in _STAGES_ONLY}
    spec = ChildSpec(stage, f"127.0.0.1:{port.port}", variables, folder / f"{name}.log")
    replica = Replica(stage, spec, port, metrics_port)
    held.callback(replica.close)
    return replica


_STAGES_ONLY = ("KLEIN_MODEL_PATH", "KLEIN_DEVICE", "KLEIN_THREADS")

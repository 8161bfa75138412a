"""The processes of an overlay on this machine: the real servers, with the arguments and variables of its containers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_core.pico import WEIGHTS
from klein_services.cli.ports import LOOPBACK, ReservedPort
from tests.deploy.invariants import servers
from tests.deploy.manifests import Object, Pod, arguments, environment, named, of_kind
from tests.deploy.tools import ROOT
from tests.services.fakes.certificates import Authority

READY_SECONDS = 180
HealthStub = health_pb2_grpc.HealthStub


@dataclass(frozen=True)
class Running:
    """A process of a Deployment, and its ports here."""

    pod: Pod
    process: subprocess.Popen[bytes]
    ports: Mapping[int, int]
    """Port in the container → port on this machine."""

    def address(self, container_port: int) -> str:
        return f"{LOOPBACK}:{self.ports[container_port]}"


class Disk:
    """The volumes of an overlay as folders: the model is pico, certificates are made on the fly, the rest is empty."""

    def __init__(self, folder: Path, all_objects: list[Object]) -> None:
        self.folder = folder
        self._authority: Authority | None = None
        self._objects = all_objects

    def local(self, pod: Pod, value: str) -> str:
        """Returns a variable's value with the local path of a mounted volume in place of its path in the container."""
        for mount in pod.main.get("volumeMounts", []):
            if value == mount["mountPath"] or value.startswith(mount["mountPath"] + "/"):
                (volume,) = [each for each in pod.spec["volumes"] if each["name"] == mount["name"]]
                return str(self._volume(pod, volume)) + value.removeprefix(mount["mountPath"])
        return value

    def _volume(self, pod: Pod, volume: Object) -> Path:
        folder = self.folder / pod.name / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        if "secret" in volume and not (folder / "tls.crt").exists():
            self._issue(volume["secret"]["secretName"], folder)
        if wanted := volume.get("configMap", {}).get("name"):
            for key, text in named(self._objects, "ConfigMap", wanted)["data"].items():
                (folder / key).write_text(text)
        if volume["name"] in ("models", "model"):
            # One name deep where all models are mounted, the folder itself where one is.
            link = folder / "klein-4b"
            if "image" in volume:
                folder.rmdir()
                link = folder
            if not link.exists():
                link.symlink_to(WEIGHTS)
        return folder

    def _issue(self, secret: str, folder: Path) -> None:
        if self._authority is None:
            self._authority = Authority(self.folder)
        (wanted,) = [
            each for each in of_kind(self._objects, "Certificate") if each["spec"]["secretName"] == secret
        ]
        pair = self._authority.issue(*wanted["spec"]["dnsNames"], LOOPBACK)
        (folder / "tls.crt").write_bytes(pair.certificate.read_bytes())
        (folder / "tls.key").write_bytes(pair.key.read_bytes())
        (folder / "ca.crt").write_bytes(self._authority.file.read_bytes())


def variables(pod: Pod, all_objects: list[Object], disk: Disk) -> dict[str, str]:
    """Returns the variables of a Deployment's container, with paths of this machine."""
    return {
        name: disk.local(pod, value) for name, value in environment(pod.main, all_objects).items() if value
    }


def klein(words: list[str]) -> list[str]:
    """Returns the command line of a container's arguments: the images' entry point is `klein`."""
    return [sys.executable, "-m", "klein_services.cli.main", *words]


def base_environment() -> dict[str, str]:
    """Returns this process's variables without any setting of the suite."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KLEIN_")}
    return kept | {"PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in (".", "protos", "services"))}


@contextmanager
def running(all_objects: list[Object], folder: Path) -> Iterator[dict[str, Running]]:
    """Runs every Deployment of an overlay once; yields the processes by name when all take work."""
    disk = Disk(folder, all_objects)
    found: dict[str, Running] = {}
    with ExitStack() as stack:
        numbers = {
            (pod.name, port): stack.enter_context(ReservedPort()).port
            for pod in servers(all_objects)
            for port in pod.ports.values()
        }
        local = {f"dns:///{name}:{port}": f"{LOOPBACK}:{here}" for (name, port), here in numbers.items()}
        for pod in servers(all_objects):
            ports = {port: numbers[pod.name, port] for port in pod.ports.values()}
            given = {
                name: local.get(value, value) for name, value in variables(pod, all_objects, disk).items()
            }
            given |= {
                "KLEIN_HOST": LOOPBACK,
                "KLEIN_PORT": str(ports[pod.ports["grpc"]]),
                "KLEIN_METRICS_PORT": str(ports[pod.ports["metrics"]]),
                "KLEIN_THREADS": "1",
            }
            if "health" in pod.ports:
                given["KLEIN_HEALTH_PORT"] = str(ports[pod.ports["health"]])
            log = stack.enter_context((folder / f"{pod.name}.log").open("wb"))
            process = subprocess.Popen(
                klein(arguments(pod.main, all_objects)),
                env=base_environment() | given,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=tempfile.gettempdir(),
            )
            stack.callback(_end, process)
            found[pod.name] = Running(pod, process, ports)
        for each in found.values():
            _wait(each, folder / f"{each.pod.name}.log")
        yield found


def health(address: str, service: str, timeout_seconds: float = 10) -> str:
    """Returns what the kubelet's probe of a service would get: SERVING, NOT_SERVING or the status of the call."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds, wait_for_ready=True
            )
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _wait(each: Running, log: Path) -> None:
    probe = each.pod.main["startupProbe"]["grpc"]
    address = each.address(probe["port"])
    with grpc.insecure_channel(address) as channel:
        watch = HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=probe["service"]),
            timeout=READY_SECONDS,
            wait_for_ready=True,
        )
        try:
            for answer in watch:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                if each.process.poll() is not None:
                    break
        except grpc.RpcError as error:
            raise AssertionError(f"{each.pod.path}: {error.code().name}\n{log.read_text()}") from error
    raise AssertionError(f"{each.pod.path} ended\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)


def metric_names(text: str) -> set[str]:
    """Returns the names of the suite's metrics in PromQL."""
    return set(re.findall(r"\b(?:klein|grpc_server)_\w+", text))

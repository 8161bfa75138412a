"""Settings of a server: a frozen dataclass, read once from the environment and from command line flags."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from klein_core.checkpoint.files import ModelFiles, access_problem
from klein_core.errors import CheckpointError
from klein_core.model_registry import published_model
from klein_core.pico import WEIGHTS as EMBEDDED_WEIGHTS
from klein_core.quantization.constants import NO_QUANTIZATION, QUANTIZATIONS
from klein_services.runtime.otlp_endpoint import endpoint_problems
from klein_services.runtime.pem import PemError, PemFiles

PREFIX = "KLEIN_"
EMBEDDED_MODEL = "pico"
"""The `model_path` that means the model inside the package; a folder of that name is `./pico`."""
_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d{1,4})?")
_Settings = TypeVar("_Settings", bound="ServerSettings")


class SettingsError(Exception):
    """Settings have bad values; the text has a line for each, with the setting, the value and the limit."""


def setting(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Makes a dataclass field with the limits that `load_settings` checks and the help that flags show.

    Args:
        default: the value when nothing is set.
        help: one sentence with the unit.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        choices: the allowed words; empty means any.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def quantization_setting() -> Any:
    """Makes the field of the stages whose weights can be quantized while they are loaded."""
    return setting(
        NO_QUANTIZATION,
        help="Format to which plain weights are quantized at load; quantized checkpoints stay as they are",
        choices=QUANTIZATIONS,
    )


def metrics_port_setting(default: int) -> Any:
    """Makes the field of the metrics port; servers have different defaults, to run side by side."""
    return setting(
        default,
        help="Port of /metrics (Prometheus) and /healthz over HTTP; 0 turns it off",
        minimum=0,
        maximum=65535,
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of every server."""

    host: str = setting("[::]", help="Address to listen on; [::] is every IPv6 and IPv4 address")
    port: int = setting(0, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9464)
    log_level: str = setting(
        "info", help="Least severe log lines to write", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting(
        "json", help="json for machines, console for terminals", choices=("json", "console")
    )
    drain_delay_seconds: float = setting(
        3.0,
        help="Seconds between NOT_SERVING and refusing calls at shutdown, for clients to notice",
        minimum=0,
        maximum=600,
    )
    grace_seconds: float = setting(
        120.0, help="Seconds that running calls may take to finish at shutdown", minimum=0, maximum=86400
    )
    queue_limit: int = setting(
        64, help="Requests that may wait for the device before more are refused", minimum=1, maximum=100000
    )
    max_connection_age_seconds: float = setting(
        600.0,
        help="Seconds after which a connection is closed, so that clients find new replicas; 0 is never",
        minimum=0,
        maximum=86400,
    )
    max_connection_idle_seconds: float = setting(
        300.0,
        help="Seconds without a call after which a connection is closed; 0 is never",
        minimum=0,
        maximum=86400,
    )
    max_connections: int = setting(
        16384,
        help="Connections that may be open at once; further ones are closed. Fewer where the process may open fewer "
        "files",
        minimum=1,
        maximum=10**6,
    )
    max_connection_streams: int = setting(
        1024, help="Calls that may run at once on one connection; more wait", minimum=1, maximum=10**6
    )
    handshake_timeout_seconds: float = setting(
        10.0,
        help="Seconds within which a new connection must finish TLS and begin HTTP/2",
        minimum=0.1,
        maximum=3600,
    )
    health_port: int = setting(
        0,
        help="Port of a second gRPC server with the health service only, always in plaintext; 0 turns it off",
        minimum=0,
        maximum=65535,
    )
    tls_certificate: str = setting(
        "",
        help="PEM file of the server's certificate and its issuers; empty: connections are in plaintext",
    )
    tls_key: str = setting("", help="PEM file of the certificate's private key")
    tls_client_ca: str = setting(
        "",
        help="PEM file of the authorities one of which must have issued each client's certificate; empty: clients "
        "need none",
    )
    tls_client_names: str = setting(
        "",
        help="Names, separated by commas, one of which a client's certificate must have as a subject alternative "
        "name or common name; empty: any",
    )
    tls_reload_seconds: float = setting(
        10.0, help="Seconds between two looks at certificates and keys", minimum=0.1, maximum=86400
    )
    otlp_endpoint: str = setting(
        "",
        help="OTLP gRPC endpoint for traces, http://host:4317; empty takes OTEL_EXPORTER_OTLP_ENDPOINT, if set",
    )

    @property
    def tls_files(self) -> PemFiles:
        """Files of the server's TLS."""
        fields = ("tls_certificate", "tls_key", "tls_client_ca")
        return pem_files(self.tls_certificate, self.tls_key, self.tls_client_ca, fields)

    @property
    def allowed_client_names(self) -> frozenset[str]:
        """Names in `tls_client_names`."""
        return frozenset(name.strip() for name in self.tls_client_names.split(",") if name.strip())

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each setting whose value is well-formed and cannot be used, such as a path."""
        yield from pem_problems(self.tls_files)
        if self.tls_client_ca and not self.tls_certificate:
            yield "KLEIN_TLS_CLIENT_CA is set without KLEIN_TLS_CERTIFICATE; in plaintext no client can be checked"
        if self.tls_client_names and not self.tls_client_ca:
            yield "KLEIN_TLS_CLIENT_NAMES is set without KLEIN_TLS_CLIENT_CA, which makes clients present a certificate"
        if self.health_port and self.health_port in (self.port, self.metrics_port):
            yield f"KLEIN_HEALTH_PORT is {self.health_port}, which is also the port of another server"
        yield from endpoint_problems(self.otlp_endpoint)

    def check(self) -> None:
        """Checks what `problems` checks, for `--check-config`.

        Raises:
            SettingsError: there are problems; the text has a line for each.
        """
        if found := list(self.problems()):
            raise SettingsError("\n".join(found))


@dataclass(frozen=True, kw_only=True)
class StageSettings(ServerSettings):
    """Settings of every stage."""

    model_path: str = setting(
        "pico",
        help="Model's folder in diffusers layout, or one safetensors file; pico is the embedded model",
    )
    weights_path: str = setting(
        "", help="Safetensors file or folder of this stage's own part, instead of the model's"
    )
    variant: str = setting(
        "", help="Name of the published model, such as klein-4b, where there is no model_index.json"
    )
    model_name: str = setting("", help="Name that requests may give; empty takes the model's file name")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:N or mps; auto takes the first GPU there is")
    dtype: str = setting(
        "auto",
        help="Element type of the weights; checkpoint keeps its own, and so does auto but for bf16 VAEs on CUDA",
        choices=("auto", "checkpoint", "bf16", "f16", "f32"),
    )
    threads: int = setting(
        0, help="CPU threads of one operation; 0 is torch's choice", minimum=0, maximum=1024
    )
    watchdog_seconds: float = setting(
        30.0,
        help="Seconds that a step or operation may always take; beyond them and 20 times the expected time the process "
        "ends. 0 turns it off",
        minimum=0,
        maximum=86400,
    )
    receive_timeout_seconds: float = setting(
        30.0, help="Seconds within which a whole request must arrive", minimum=0.01, maximum=3600
    )

    def __post_init__(self) -> None:
        if not self.model_name:
            # The only way to derive a field of a frozen dataclass from others.
            named_path = self.model_path if self._model is not None else self.weights_path
            object.__setattr__(self, "model_name", model_name(named_path))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not _DEVICE.fullmatch(self.device):
            yield f"KLEIN_DEVICE is {self.device!r}; it must be auto, cpu, cuda, cuda:N or mps"
        if self.variant:
            try:
                published_model(self.variant)
            except CheckpointError as error:
                yield f"KLEIN_VARIANT: {error}"
        if self.model_path != EMBEDDED_MODEL:
            yield from path_problems("model_path", self.model_path)
        yield from path_problems("weights_path", self.weights_path)

    def model_files(self, component: str) -> ModelFiles:
        """Returns the paths of the model's parts; `component` is the one that this stage loads."""
        own = {component: Path(self.weights_path)} if self.weights_path else {}
        return ModelFiles(model=self._model, variant=self.variant, **own)

    @property
    def _model(self) -> Path | None:
        if self.model_path != EMBEDDED_MODEL:
            return Path(self.model_path)
        # With weights of another model, the embedded model's other parts do not apply.
        return None if self.weights_path else EMBEDDED_WEIGHTS


def pem_files(certificate: str, key: str, authorities: str, fields: tuple[str, str, str]) -> PemFiles:
    """Returns PEM files whose messages name the variables of the fields."""
    first, second, third = (variable_name(field) for field in fields)
    return PemFiles(certificate, key, authorities, (first, second, third))


def pem_problems(files: PemFiles) -> Iterator[str]:
    """Yields a sentence when PEM files cannot be used."""
    try:
        files.read()
    except PemError as error:
        yield str(error)


def path_problems(field_name: str, path: str) -> Iterator[str]:
    """Yields a sentence when a setting's path leads nowhere or may not be read; an empty one is not set."""
    if path and (problem := access_problem(Path(path))):
        yield f"{variable_name(field_name)} is {path!r}; {problem}"


def check_temporary_folder() -> None:
    """Checks that a folder for temporary files can be written: importing torch fails without one.

    Raises:
        SettingsError: there is none.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise SettingsError(
            f"Stages need a folder for temporary files: {error.strerror}. "
            "Set TMPDIR to a folder that can be written."
        ) from None


def model_name(path: str) -> str:
    """Returns the default name of a model: the name of its folder or file."""
    return Path(path).resolve().name.removesuffix(".safetensors")


@dataclass(frozen=True)
class LoadedSettings(Generic[_Settings]):
    """Settings and the source of each."""

    settings: _Settings
    sources: Mapping[str, str]
    """For each field: `default`, the environment variable or the flag."""


def load_settings(
    cls: type[_Settings],
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    *,
    check: bool = False,
) -> LoadedSettings[_Settings]:
    """Reads settings: an override wins over `KLEIN_<FIELD>`, which wins over the default.

    Args:
        cls: the settings class.
        environment: usually `os.environ`; empty variables count as unset.
        overrides: values by field name, from flags; `None` values count as not given.
        check: whether to run `ServerSettings.problems`, too.

    Raises:
        SettingsError: values are of the wrong type, outside their limits or, with `check`, of no use, or an
            override is no setting. The text has a line for each.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    types = typing.get_type_hints(cls)
    unknown = given.keys() - types.keys()
    if unknown:
        raise SettingsError(f"{', '.join(sorted(unknown))}: no such setting")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for field in dataclasses.fields(cls):
        variable = variable_name(field.name)
        if field.name in given:
            sources[field.name] = "--" + field.name.replace("_", "-")
            raw: object = given[field.name]
        elif environment.get(variable, ""):
            sources[field.name], raw = variable, environment[variable]
        else:
            sources[field.name] = "default"
            continue
        try:
            values[field.name] = _parsed(sources[field.name], raw, types[field.name], field)
        except SettingsError as error:
            problems.append(str(error))
    settings = cls(**values)
    if check:
        problems += settings.problems()
    if problems:
        raise SettingsError("\n".join(problems))
    return LoadedSettings(settings, sources)


def variable_name(field_name: str) -> str:
    """Returns the environment variable that sets a field."""
    return PREFIX + field_name.upper()


def number_text(value: float) -> str:
    """Returns a number without an exponent and without a trailing `.0`."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def limits_of(field: dataclasses.Field[Any]) -> str:
    """Returns a setting's limits in words; empty when it has none."""
    if field.metadata.get("choices"):
        return "one of " + ", ".join(field.metadata["choices"])
    bounds = [
        f"{word} {number_text(field.metadata[key])}"
        for word, key in (("at least", "minimum"), ("at most", "maximum"))
        if field.metadata.get(key) is not None
    ]
    return " and ".join(bounds)


def _parsed(source: str, raw: object, kind: type, field: dataclasses.Field[Any]) -> Any:
    text, value = str(raw).strip(), None
    try:
        value = _BOOLEANS.get(text.lower()) if kind is bool else kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        reason = f"; {_SERVICE_LINK}" if text.startswith(("tcp://", "udp://")) else ""
        raise SettingsError(f"{source} is {raw!r}; it must be {expected}{reason}") from None
    if value is None:
        raise SettingsError(f"{source} is {raw!r}; it must be true or false")
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    choices = field.metadata.get("choices") or ()
    # Negated so that NaN, which compares false with everything, is refused too.
    too_small = minimum is not None and not value >= minimum
    too_large = maximum is not None and not value <= maximum
    if too_small or too_large or (choices and value not in choices):
        raise SettingsError(f"{source} is {raw!r}; it must be {limits_of(field)}")
    return value


_SERVICE_LINK = (
    "Kubernetes sets such a variable for a Service named klein: set enableServiceLinks to false in the pod"
)
_BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)

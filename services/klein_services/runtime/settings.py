"""Settings of a server: a frozen dataclass, read once from the environment and from command line flags."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from klein_core.checkpoint.files import access_problem
from klein_services.runtime.otlp_endpoint import endpoint_problems
from klein_services.runtime.pem import PemError, PemFiles

PREFIX = "KLEIN_"
TLS_FIELDS = ("tls_certificate", "tls_key", "tls_client_ca")
"""Settings of a server's own certificate, its key and the authorities of its clients."""
_Settings = TypeVar("_Settings", bound="ProcessSettings")


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


def metrics_port_setting(default: int) -> Any:
    """Makes the field of the metrics port; servers have different defaults, to run side by side."""
    return setting(
        default,
        help="Port of /metrics (Prometheus) and /healthz over HTTP; 0 turns it off",
        minimum=0,
        maximum=65535,
    )


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Settings of every process that listens, whatever it speaks."""

    host: str = setting("[::]", help="Address to listen on; [::] is every IPv6 and IPv4 address")
    port: int = setting(0, help="Port to listen on; 0 takes a free one", minimum=0, maximum=65535)
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
    max_connections: int = setting(
        16384,
        help="Connections that may be open at once; further ones are closed. Fewer where the process may open fewer "
        "files",
        minimum=1,
        maximum=10**6,
    )
    tls_certificate: str = setting(
        "",
        help="PEM file of the server's certificate and its issuers; empty: connections are in plaintext",
    )
    tls_key: str = setting("", help="PEM file of the certificate's private key")
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
        return pem_files(self.tls_certificate, self.tls_key, "", TLS_FIELDS)

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each setting whose value is well-formed and cannot be used, such as a path."""
        yield from pem_problems(self.tls_files)
        yield from endpoint_problems(self.otlp_endpoint)

    def check(self) -> None:
        """Checks what `problems` checks, for `--check-config`.

        Raises:
            SettingsError: there are problems; the text has a line for each.
        """
        if found := list(self.problems()):
            raise SettingsError("\n".join(found))


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ProcessSettings):
    """Settings of every gRPC server."""

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

    @property
    def tls_files(self) -> PemFiles:
        """Files of the server's TLS."""
        return pem_files(self.tls_certificate, self.tls_key, self.tls_client_ca, TLS_FIELDS)

    @property
    def allowed_client_names(self) -> frozenset[str]:
        """Names in `tls_client_names`."""
        return frozenset(name.strip() for name in self.tls_client_names.split(",") if name.strip())

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.tls_client_ca and not self.tls_certificate:
            yield "KLEIN_TLS_CLIENT_CA is set without KLEIN_TLS_CERTIFICATE; in plaintext no client can be checked"
        if self.tls_client_names and not self.tls_client_ca:
            yield "KLEIN_TLS_CLIENT_NAMES is set without KLEIN_TLS_CLIENT_CA, which makes clients present a certificate"
        if self.health_port and self.health_port in (self.port, self.metrics_port):
            yield f"KLEIN_HEALTH_PORT is {self.health_port}, which is also the port of another server"


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

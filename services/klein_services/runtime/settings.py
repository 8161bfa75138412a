"""Settings of a server: one frozen dataclass, read once from the environment and from command line flags."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from klein_core.checkpoint.files import ModelFiles
from klein_core.errors import CheckpointError
from klein_core.model_registry import published_model
from klein_core.pico import WEIGHTS as EMBEDDED_WEIGHTS
from klein_core.quantization.constants import NO_QUANTIZATION, QUANTIZATIONS

PREFIX = "KLEIN_"
EMBEDDED_MODEL = "pico"
"""The `model_path` that means the model inside the package; a folder of that name is `./pico`."""
_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d{1,4})?")
_Settings = TypeVar("_Settings", bound="ServerSettings")


class SettingsError(Exception):
    """A setting has a value that it cannot have; the text names the setting, the value and the limit."""


def setting(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Makes a dataclass field with what its reader and its user need to know.

    Args:
        default: the value when nothing is set; its type is the setting's type.
        help: one sentence with the unit, shown by `describe`.
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
        help="What plain weights are made into at load; quantized checkpoints stay as they are",
        choices=QUANTIZATIONS,
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What every server can be told."""

    host: str = setting("[::]", help="Address to listen on; [::] is every IPv6 and IPv4 address")
    port: int = setting(0, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = setting(
        9464, help="Port of Prometheus metrics over HTTP; 0 turns them off", minimum=0, maximum=65535
    )
    log_level: str = setting(
        "info", help="Least severe log lines to write", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting(
        "json", help="json for machines, console for people", choices=("json", "console")
    )
    drain_delay_seconds: float = setting(
        3.0,
        help="Seconds between NOT_SERVING and refusing calls at shutdown, so that callers learn of it",
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
        help="Seconds after which a connection is closed, so that callers find new replicas; 0 is never",
        minimum=0,
        maximum=86400,
    )
    otlp_endpoint: str = setting("", help="OTLP gRPC endpoint for traces, http://host:4317; empty is off")

    def check(self) -> None:
        """Checks what the settings name outside of themselves, for `--check-config`.

        Raises:
            SettingsError: a file cannot be used.
        """


@dataclass(frozen=True, kw_only=True)
class StageSettings(ServerSettings):
    """What every stage can be told beside that."""

    model_path: str = setting(
        "pico",
        help="Model's folder in diffusers layout, or one safetensors file; pico is the embedded model",
    )
    weights_path: str = setting(
        "", help="Safetensors file or folder of this stage's own part, instead of the model's"
    )
    variant: str = setting(
        "", help="Which published model it is, such as klein-4b, where no model_index.json tells"
    )
    model_name: str = setting("", help="Name that requests may give; empty takes the model's file name")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:N or mps; auto takes the first GPU there is")
    dtype: str = setting(
        "checkpoint",
        help="Element type of the weights; checkpoint keeps its own",
        choices=("checkpoint", "bf16", "f16", "f32"),
    )
    threads: int = setting(
        0, help="CPU threads of one operation; 0 is torch's choice", minimum=0, maximum=1024
    )
    receive_timeout_seconds: float = setting(
        30.0, help="Seconds within which a whole request must arrive", minimum=0.01, maximum=3600
    )

    def __post_init__(self) -> None:
        if not self.model_name:
            # Frozen settings have no other way to derive one field from another.
            object.__setattr__(self, "model_name", model_name(self._named_path))

    def check(self) -> None:
        super().check()
        if not _DEVICE.fullmatch(self.device):
            raise SettingsError(f"KLEIN_DEVICE is {self.device!r}; it must be auto, cpu, cuda, cuda:N or mps")
        if self.variant:
            _check_variant(self.variant)
        if self.model_path != EMBEDDED_MODEL:
            require_place("model_path", self.model_path)
        if self.weights_path:
            require_place("weights_path", self.weights_path)

    def model_files(self, component: str) -> ModelFiles:
        """Returns where the parts of the model lie; `component` is the one that this stage loads."""
        own = {component: Path(self.weights_path)} if self.weights_path else {}
        return ModelFiles(model=self._model, variant=self.variant, **own)

    @property
    def _model(self) -> Path | None:
        if self.model_path != EMBEDDED_MODEL:
            return Path(self.model_path)
        # Weights of one's own are no part of the embedded model.
        return None if self.weights_path else EMBEDDED_WEIGHTS

    @property
    def _named_path(self) -> str:
        return self.model_path if self._model is not None else self.weights_path


def _check_variant(name: str) -> None:
    try:
        published_model(name)
    except CheckpointError as error:
        raise SettingsError(f"KLEIN_VARIANT: {error}") from error


def require_place(field_name: str, place: str) -> None:
    """Raises SettingsError when a path that a setting names leads nowhere."""
    if not Path(place).exists():
        raise SettingsError(f"{variable_name(field_name)} is {place!r}; there is no such folder or file")


def model_name(path: str) -> str:
    """Returns what a model is called that is a folder or a file."""
    return Path(path).resolve().name.removesuffix(".safetensors")


@dataclass(frozen=True)
class LoadedSettings(Generic[_Settings]):
    """Settings and where each came from."""

    settings: _Settings
    sources: Mapping[str, str]
    """For each field: `default`, the environment variable or the flag."""


def load_settings(
    cls: type[_Settings], environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> LoadedSettings[_Settings]:
    """Reads settings: an override wins over `KLEIN_<FIELD>`, which wins over the default.

    Args:
        cls: the settings class.
        environment: usually `os.environ`; empty variables count as unset.
        overrides: values by field name, from flags; `None` values count as not given.

    Raises:
        SettingsError: a value is of the wrong type or outside its limits, or an override is no setting.
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    types = typing.get_type_hints(cls)
    unknown = given.keys() - types.keys()
    if unknown:
        raise SettingsError(f"{', '.join(sorted(unknown))}: no such setting")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
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
        values[field.name] = _parsed(sources[field.name], raw, types[field.name], field)
    return LoadedSettings(cls(**values), sources)


def variable_name(field_name: str) -> str:
    """Returns the environment variable that sets a field."""
    return PREFIX + field_name.upper()


def number_text(value: float) -> str:
    """Returns a number as a person would write it: no exponent, no `.0`."""
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
    value = _converted(source, raw, kind)
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
_BOOLEANS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def _converted(source: str, raw: object, kind: type) -> Any:
    text = str(raw).strip()
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise SettingsError(f"{source} is {raw!r}; it must be true or false")
        return _BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        reason = f"; {_SERVICE_LINK}" if text.startswith(("tcp://", "udp://")) else ""
        raise SettingsError(f"{source} is {raw!r}; it must be {expected}{reason}") from None


_LIKENESS = 0.93
"""Of a misspelled name: one or two letters of it are wrong, missing or too many."""


def misspelled(cls: type[ServerSettings], environment: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each `KLEIN_` variable that nothing here reads but that looks like one that is read.

    Variables that look like none are left alone: stages may share an environment.
    """
    known = [variable_name(field.name) for field in dataclasses.fields(cls)]
    unread = sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS) for name in unread}
    return [
        f"{name} is no setting of this server and is not read; {meant[0]} is one"
        for name, meant in nearest.items()
        if meant
    ]


def describe(loaded: LoadedSettings[Any]) -> str:
    """Returns a table of every setting: variable, value, source, help."""
    fields = dataclasses.fields(loaded.settings)
    rows = [
        (variable_name(field.name), _shown(getattr(loaded.settings, field.name)), loaded.sources[field.name])
        for field in fields
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{text}  {_help_of(field)}" for text, field in zip(cells, fields, strict=True))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return number_text(value) if isinstance(value, float) else str(value) or '""'


def _help_of(field: dataclasses.Field[Any]) -> str:
    limits = limits_of(field)
    return f"{field.metadata.get('help', '')}{f' ({limits})' if limits else ''}"

"""Routing table: the models that requests can name and the stage processes that serve them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from klein_core.params import SIZE_MULTIPLE_PX, Limits, default_side_px
from klein_services.runtime.errors import ModelNotAllowed, UnknownModel
from klein_services.runtime.settings import SettingsError

TEXT_ENCODER = "text-encoder"
DENOISER = "denoiser"
VAE_DECODER = "vae-decoder"


class RoutingError(SettingsError):
    """The routing table cannot be used; `problems` names every key that is wrong."""

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        self.problems = problems
        super().__init__(f"{source}: " + "; ".join(problems))


@dataclass(frozen=True)
class StageAddress:
    """A pool of processes of one stage that serve one model."""

    stage: str
    """text-encoder, denoiser or vae-decoder."""
    target: str
    """A gRPC target, for example `dns:///denoiser:50052`."""
    model: str
    """The name that the stage gives its model."""

    @property
    def may_have_replicas(self) -> bool:
        """Whether the target may stand for several processes: it is a name, or a list of addresses."""
        return self.target.startswith("dns:") or "," in self.target


@dataclass(frozen=True)
class Route:
    """One row: a model that requests can name and the stages that serve it."""

    name: str
    text_encoder: StageAddress
    denoiser: StageAddress
    vae_decoder: StageAddress
    default_size_px: int = 1024
    """Width and height of a request that gives none and has no reference."""
    maximum_pixel_count: int = Limits().pixel_count
    """Most pixels of one image."""

    @property
    def stages(self) -> tuple[StageAddress, StageAddress, StageAddress]:
        """The stages in the order of a request's life."""
        return self.text_encoder, self.denoiser, self.vae_decoder

    def narrowed(self, trained_size_px: int, trained_pixel_count: int) -> Route:
        """Returns the route with the smaller one of its sizes and those that the model was trained for.

        Args:
            trained_size_px: width and height; 0 when unknown.
            trained_pixel_count: most pixels; 0 when unknown.
        """
        pixel_count = min(self.maximum_pixel_count, trained_pixel_count or self.maximum_pixel_count)
        side_px = min(self.default_size_px, trained_size_px or self.default_size_px)
        return replace(
            self, default_size_px=default_side_px(side_px, pixel_count), maximum_pixel_count=pixel_count
        )


@dataclass(frozen=True)
class RoutingTable:
    """Every model that the orchestrator offers."""

    routes: Mapping[str, Route]
    default_model: str
    """The model of a request that names none."""
    allowed: tuple[str, ...] | None = None
    """Names that a caller may use at all, also those without a row; `None` means every name."""

    @property
    def addresses(self) -> tuple[StageAddress, ...]:
        """Every pool of the table, once."""
        return tuple(dict.fromkeys(address for route in self.routes.values() for address in route.stages))

    def route(self, model: str) -> Route:
        """Returns the row of a request's model; an empty name means the default.

        Raises:
            ModelNotAllowed: the caller may not use the name, whether there is such a row or not.
            UnknownModel: there is no such row.
        """
        name = model or self.default_model
        if name in self.routes:
            return self.routes[name]
        if self.allowed is not None and name not in self.allowed:
            raise ModelNotAllowed(name, self.allowed)
        raise UnknownModel("model", name, sorted(self.routes))

    def limited_to(self, models: Sequence[str]) -> RoutingTable:
        """Returns the table as a caller sees it that may use only these models.

        The default model is this table's if the caller may use it, else the first of `models`, if possible one that
        has a row.
        """
        routes = {name: self.routes[name] for name in models if name in self.routes}
        default = self.default_model if self.default_model in routes else next(iter(routes), models[0])
        return RoutingTable(routes, default, tuple(models))


@dataclass(frozen=True)
class _Row:
    """A row of the file, before defaults and checks."""

    text_encoder: Any = None
    denoiser: Any = None
    vae_decoder: Any = None
    text_encoder_model: Any = None
    denoiser_model: Any = None
    vae_decoder_model: Any = None
    default_size_px: Any = Route.default_size_px
    maximum_pixel_count: Any = Route.maximum_pixel_count


_ROW_KEYS = tuple(field.name for field in fields(_Row))
_TARGET_KEYS = _ROW_KEYS[:3]
_MODEL_KEYS = _ROW_KEYS[3:6]


def read_routing_table(path: Path) -> RoutingTable:
    """Reads a TOML file of `default_model` and one `[models.NAME]` for each model.

    Raises:
        RoutingError: the file cannot be read, or keys are missing, unknown or wrong; all of them are named.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RoutingError(str(path), (f"cannot be read: {error.strerror or error}",)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RoutingError(str(path), (f"is not TOML: {error}",)) from None
    problems = tuple(_document_problems(document))
    if problems:
        raise RoutingError(str(path), problems)
    routes = {name: _route(name, _Row(**row)) for name, row in document["models"].items()}
    return RoutingTable(routes, document.get("default_model", next(iter(routes))))


def single_route_table(
    model: str, text_encoder: str, denoiser: str, vae_decoder: str, size_px: int, pixel_count: int
) -> RoutingTable:
    """Returns the table of a suite that serves one model under the same name at every stage.

    Raises:
        RoutingError: a value is wrong; all of them are named.
    """
    row = {
        "text_encoder": text_encoder,
        "denoiser": denoiser,
        "vae_decoder": vae_decoder,
        "default_size_px": size_px,
        "maximum_pixel_count": pixel_count,
    }
    problems = tuple(_row_problems("", row))
    if problems:
        raise RoutingError("settings", problems)
    return RoutingTable({model: _route(model, _Row(**row))}, model)


def _route(name: str, row: _Row) -> Route:
    return Route(
        name,
        StageAddress(TEXT_ENCODER, row.text_encoder, row.text_encoder_model or name),
        StageAddress(DENOISER, row.denoiser, row.denoiser_model or name),
        StageAddress(VAE_DECODER, row.vae_decoder, row.vae_decoder_model or name),
        row.default_size_px,
        row.maximum_pixel_count,
    )


def _document_problems(document: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(document.keys() - {"default_model", "models"}):
        yield f"{key} is unknown; known are default_model and models"
    models = document.get("models")
    if not isinstance(models, dict) or not models:
        yield "models is missing; add a table [models.NAME] for each model"
        return
    for name, row in models.items():
        if isinstance(row, dict):
            yield from _row_problems(f"models.{name}.", row)
        else:
            yield f"models.{name} must be a table"
    default, names = document.get("default_model"), ", ".join(models)
    if default is None:
        if len(models) > 1:
            yield f"default_model is missing; choose one of {names}"
    elif default not in models:
        yield f"default_model is {default!r}, which has no table; choose one of {names}"


def _row_problems(prefix: str, row: Mapping[str, Any]) -> Iterator[str]:
    for key in row:
        if key not in _ROW_KEYS:
            yield f"{prefix}{key} is unknown; known are {', '.join(_ROW_KEYS)}"
    for key in _TARGET_KEYS:
        value = row.get(key)
        if value is None:
            yield f"{prefix}{key} is missing; give the stage's gRPC target, for example 'localhost:50051'"
        elif not isinstance(value, str) or not value.strip():
            yield f"{prefix}{key} is {value!r}; must be a gRPC target, for example 'localhost:50051'"
    for key in _MODEL_KEYS:
        value = row.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            yield f"{prefix}{key} is {value!r}; must be the name that the stage gives its model"
    limits = Limits()
    size = row.get("default_size_px", Route.default_size_px)
    pixels = row.get("maximum_pixel_count", Route.maximum_pixel_count)
    size_is_good = type(size) is int and size >= limits.side_px and size % SIZE_MULTIPLE_PX == 0
    if not size_is_good:
        yield (
            f"{prefix}default_size_px is {size!r}; must be a multiple of {SIZE_MULTIPLE_PX}, "
            f"at least {limits.side_px}"
        )
    if type(pixels) is not int or not limits.side_px**2 <= pixels <= limits.pixel_count:
        yield (
            f"{prefix}maximum_pixel_count is {pixels!r}; must be an integer in "
            f"[{limits.side_px**2}, {limits.pixel_count}]"
        )
    elif size_is_good and size**2 > pixels:
        yield f"{prefix}default_size_px is {size}, and its square is over maximum_pixel_count, {pixels}"

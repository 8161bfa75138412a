"""Catalog of models that can be pulled: a name → the repositories of its parts and its folder's name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from klein_core.model_registry import (
    PUBLISHED_MODELS,
    SMALL_DECODER,
    HubFile,
    PublishedModel,
    PublishedVae,
    other_family,
)
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

BF16 = "bf16"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_DECODER_SUFFIX = f"-{SMALL_DECODER.name}"


@dataclass(frozen=True)
class Choice:
    """One model to pull: a whole repository, or one with parts from others."""

    name: str
    """Name of its folder, and an identifier of the same model."""
    repository: str
    """Holds everything in diffusers' layout."""
    variant: PublishedModel | None = None
    """The published model; `None` for any other repository."""
    transformer: HubFile | None = None
    """Replaces the repository's own transformer weights."""
    vae: PublishedVae | None = None
    """Replaces the repository's own autoencoder."""

    @property
    def repositories(self) -> tuple[str, ...]:
        """Repositories of the files, the main one first."""
        others = [part.repository for part in (self.transformer, self.vae) if part is not None]
        return (self.repository, *others)


def choose(identifier: str, precision: str | None = None, *, small_decoder: bool = False) -> Choice:
    """Resolves an identifier: a known name, a name with its precision, or `owner/repository`.

    Raises:
        CliError: it is none of these, it is of another family, or the model is not published in this precision.
    """
    if identifier.lower() in (SMALL_DECODER.name, SMALL_DECODER.repository.lower()):
        raise CliError(
            f"{identifier} is an autoencoder, not a whole model.",
            f"Add it to one: `klein pull {next(iter(PUBLISHED_MODELS))} --small-decoder`.",
            MISUSED,
        )
    if identifier.lower().endswith(_SMALL_DECODER_SUFFIX):
        identifier, small_decoder = identifier[: -len(_SMALL_DECODER_SUFFIX)], True
    refuse_named_family(identifier)
    choice = _without_options(identifier, precision)
    if small_decoder:
        choice = replace(choice, name=choice.name + _SMALL_DECODER_SUFFIX, vae=SMALL_DECODER)
    return choice


def refuse_named_family(identifier: str) -> None:
    """Raises CliError when a model's or repository's name is that of another family of models."""
    family = other_family(identifier)
    if family is not None:
        raise CliError(f"{identifier} is {family}.", _known_names(), MISUSED)


def is_known(identifier: str) -> bool:
    """Whether this is the name of a published model, with or without a precision and the small decoder."""
    return identifier.lower().removesuffix(_SMALL_DECODER_SUFFIX) in _identifiers()


def _without_options(identifier: str, precision: str | None) -> Choice:
    known = _identifiers().get(identifier.lower())
    if known is not None:
        row, named = known
        if named and precision and precision != named:
            raise CliError(f"{identifier} is {named}, not {precision}.", exit_code=MISUSED)
        precision = named or precision or BF16
        if precision == BF16:
            return Choice(row.name, row.repository, row)
        if precision not in row.quantized:
            published = ", ".join((BF16, *row.quantized))
            raise CliError(
                f"{row.name} is not published as {precision}.", f"Take one of {published}.", MISUSED
            )
        return Choice(f"{row.name}-{precision}", row.repository, row, row.quantized[precision])
    if not _REPOSITORY.fullmatch(identifier):
        near = difflib.get_close_matches(identifier.lower(), _identifiers(), n=1)
        question = f" Did you mean {near[0]}?" if near else ""
        raise CliError(f"{identifier!r} is not a known model.{question}", _known_names(), MISUSED)
    if precision and precision != BF16:
        raise CliError(
            f"--precision {precision} is for known models: {identifier} is pulled as it is.",
            _known_names(),
            MISUSED,
        )
    return Choice(identifier.replace("/", "--"), identifier)


def _identifiers() -> dict[str, tuple[PublishedModel, str | None]]:
    """Returns names and repositories, in lower case → the published model and the precision that the name includes."""
    found: dict[str, tuple[PublishedModel, str | None]] = {}
    for row in PUBLISHED_MODELS.values():
        found |= {row.name: (row, None), row.repository.lower(): (row, None)}
        for precision, file in row.quantized.items():
            found[f"{row.name}-{precision}"] = found[file.repository.lower()] = (row, precision)
    return found


def _known_names() -> str:
    return f"Known: {', '.join(PUBLISHED_MODELS)}; or give any OWNER/REPOSITORY in diffusers' layout."

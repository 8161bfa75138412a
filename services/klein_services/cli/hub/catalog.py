"""What a person means by a model's name: which repositories its parts come from, and its folder's name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER, HubFile, PublishedModel, PublishedVae
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

BF16 = "bf16"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL_DECODER_SUFFIX = f"-{SMALL_DECODER.name}"


@dataclass(frozen=True)
class Choice:
    """One model to pull: a whole repository, or one with parts from others."""

    name: str
    """Its folder's name; given as an identifier it means the same model."""
    repository: str
    """Holds everything in diffusers' layout."""
    variant: PublishedModel | None = None
    """The table's row; `None` for a repository that is not in it."""
    transformer: HubFile | None = None
    """Instead of the repository's own transformer weights."""
    vae: PublishedVae | None = None
    """Instead of the repository's own autoencoder."""

    @property
    def repositories(self) -> tuple[str, ...]:
        """All that something is fetched from, the main one first."""
        others = [part.repository for part in (self.transformer, self.vae) if part is not None]
        return (self.repository, *others)


def choose(identifier: str, precision: str | None = None, *, small_decoder: bool = False) -> Choice:
    """Finds what an identifier means: a known name, a name with its precision, or `owner/repository`.

    Raises:
        CliError: it is none of these, or there are no such weights of it.
    """
    if identifier.lower() in (SMALL_DECODER.name, SMALL_DECODER.repository.lower()):
        raise CliError(
            f"{identifier} is an autoencoder, not a whole model.",
            f"Add it to one: `klein pull {next(iter(PUBLISHED_MODELS))} --small-decoder`.",
            MISUSED,
        )
    if identifier.lower().endswith(_SMALL_DECODER_SUFFIX):
        identifier, small_decoder = identifier[: -len(_SMALL_DECODER_SUFFIX)], True
    choice = _without_options(identifier, precision)
    if small_decoder:
        choice = replace(choice, name=choice.name + _SMALL_DECODER_SUFFIX, vae=SMALL_DECODER)
    return choice


def is_known(identifier: str) -> bool:
    """Whether this is a name of the table, with or without what can follow it."""
    return identifier.lower().removesuffix(_SMALL_DECODER_SUFFIX) in _identifiers()


def _without_options(identifier: str, precision: str | None) -> Choice:
    known = _identifiers().get(identifier.lower())
    if known is not None:
        row, said = known
        if said and precision and precision != said:
            raise CliError(f"{identifier} is {said}, not {precision}.", exit_code=MISUSED)
        return _of_row(row, said or precision or BF16)
    if not _REPOSITORY.fullmatch(identifier):
        raise _unknown(identifier)
    if precision and precision != BF16:
        raise CliError(
            f"--precision {precision} is for known models: {identifier} is pulled as it is.",
            _known_names(),
            MISUSED,
        )
    return Choice(identifier.replace("/", "--"), identifier)


def _identifiers() -> dict[str, tuple[PublishedModel, str | None]]:
    """Everything that names a row, in lower case, with the precision that it names as well."""
    found: dict[str, tuple[PublishedModel, str | None]] = {}
    for row in PUBLISHED_MODELS.values():
        found |= {row.name: (row, None), row.repository.lower(): (row, None)}
        for precision, file in row.quantized.items():
            found[f"{row.name}-{precision}"] = found[file.repository.lower()] = (row, precision)
    return found


def _of_row(row: PublishedModel, precision: str) -> Choice:
    if precision == BF16:
        return Choice(row.name, row.repository, row)
    if precision not in row.quantized:
        published = ", ".join((BF16, *row.quantized))
        raise CliError(f"{row.name} is not published as {precision}.", f"Take one of {published}.", MISUSED)
    return Choice(f"{row.name}-{precision}", row.repository, row, row.quantized[precision])


def _unknown(identifier: str) -> CliError:
    near = difflib.get_close_matches(identifier.lower(), _identifiers(), n=1)
    question = f" Did you mean {near[0]}?" if near else ""
    return CliError(f"{identifier!r} is no known model.{question}", _known_names(), MISUSED)


def _known_names() -> str:
    return f"Known: {', '.join(PUBLISHED_MODELS)}; or give any OWNER/REPOSITORY in diffusers' layout."

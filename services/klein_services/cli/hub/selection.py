"""Selection of the files that this suite needs: configuration, tokenizer, and one copy of the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from klein_core.checkpoint.config import (
    SCHEDULER_FOLDER,
    TEXT_ENCODER_FOLDER,
    TOKENIZER_FOLDER,
    TRANSFORMER_FOLDER,
    VAE_FOLDER,
    read_text_encoder_config,
)
from klein_core.checkpoint.key_maps import is_past
from klein_core.model_registry import HubFile, family_among
from klein_core.variants import read_json
from klein_services.cli.errors import CliError
from klein_services.cli.hub.catalog import Choice

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_DEFAULT_STEMS = ("diffusion_pytorch_model", "model")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".jinja", ".model")
_LICENSE = re.compile(r"licen[cs]e(\.\w+)?", re.IGNORECASE)
_CONFIGURATIONS = (
    "model_index.json",
    f"{SCHEDULER_FOLDER}/scheduler_config.json",
    f"{TEXT_ENCODER_FOLDER}/config.json",
    f"{TRANSFORMER_FOLDER}/config.json",
    f"{VAE_FOLDER}/config.json",
)


@dataclass(frozen=True)
class WantedFile:
    """One file to download."""

    repository: str
    name: str
    """Path in the repository."""
    folder: str = ""
    """Folder of the model that takes the place of the repository's root."""

    @property
    def path(self) -> str:
        """Path in the model's folder."""
        return f"{self.folder}/{self.name}" if self.folder else self.name


def configuration_files(choice: Choice, listings: Mapping[str, Iterable[str]]) -> list[WantedFile]:
    """Returns the small files, which are checked before the weights are selected.

    Args:
        choice: the model.
        listings: the file names of each of its repositories.

    Raises:
        CliError: the main repository is not in diffusers' layout.
    """
    names = set(listings[choice.repository])
    _require(choice.repository, _CONFIGURATIONS, names)
    chosen = {*_CONFIGURATIONS, *filter(_LICENSE.fullmatch, names)}
    for name in names:
        path = PurePosixPath(name)
        if path.parts[:-1] == (TOKENIZER_FOLDER,) and path.suffix in _TOKENIZER_SUFFIXES:
            chosen.add(name)
    components = _own_components(choice)
    sources = {weight_source(choice.repository, names, component) for component in components}
    chosen |= {name for name in sources if name.endswith(_INDEX_SUFFIX)}
    files = {name: WantedFile(choice.repository, name) for name in chosen}
    if choice.vae is not None:
        _require(choice.vae.repository, ["config.json"], set(listings[choice.vae.repository]))
        config = WantedFile(choice.vae.repository, "config.json", VAE_FOLDER)
        files[config.path] = config
    return [files[path] for path in sorted(files)]


def weight_files(choice: Choice, listings: Mapping[str, Iterable[str]], folder: Path) -> list[WantedFile]:
    """Returns the weights: exactly one copy of each component.

    Args:
        choice: the model.
        listings: the file names of each of its repositories.
        folder: holds the configuration files.

    Raises:
        CliError: weights are missing, exist only as pickles, or in several sets.
    """
    names = set(listings[choice.repository])
    wanted = []
    for component in _own_components(choice):
        source = weight_source(choice.repository, names, component)
        shards = [source] if source.endswith(_SUFFIX) else _needed_shards(folder, source)
        _require(choice.repository, shards, names)
        wanted += [WantedFile(choice.repository, shard) for shard in shards]
    for component, part in ((TRANSFORMER_FOLDER, choice.transformer), (VAE_FOLDER, choice.vae)):
        if part is not None:
            names = set(listings[part.repository])
            is_listed = isinstance(part, HubFile) and part.name in names
            name = part.name if is_listed else weight_source(part.repository, names, "")
            wanted.append(WantedFile(part.repository, name, component))
    return wanted


def weight_source(repository: str, names: Iterable[str], component: str) -> str:
    """Returns a component's index, or its only file, by the loader's own rule.

    Raises:
        CliError: the folder has no weights, only pickles, or several sets.
    """
    inside = [name for name in names if str(PurePosixPath(name).parent) == (component or ".")]
    indexes = [name for name in inside if name.endswith(_INDEX_SUFFIX)]
    shards = re.compile(r"-\d+-of-\d+" + re.escape(_SUFFIX) + "$")
    sources = indexes + [name for name in inside if name.endswith(_SUFFIX) and not shards.search(name)]
    default = [name for name in sources if PurePosixPath(name).name.split(_SUFFIX)[0] in _DEFAULT_STEMS]
    match default or sources:
        case [only]:
            return only
        case []:
            pickles = any(name.endswith(PICKLES) for name in inside)
            why = "has only pickle files, which are never read" if pickles else f"has no *{_SUFFIX} file"
            raise CliError(f"{component or 'the root'} of {repository} {why}.")
        case several:
            listed = ", ".join(sorted(several))
            raise CliError(
                f"{component or 'the root'} of {repository} has several sets of weights: {listed}."
            )


def _own_components(choice: Choice) -> list[str]:
    """Returns the components whose weights come from the main repository."""
    replaced = {TRANSFORMER_FOLDER: choice.transformer, VAE_FOLDER: choice.vae}
    parts = (TEXT_ENCODER_FOLDER, TRANSFORMER_FOLDER, VAE_FOLDER)
    return [part for part in parts if replaced.get(part) is None]


def _needed_shards(folder: Path, index: str) -> list[str]:
    """Returns the shards with tensors that are loaded: layers past the last tapped one are not."""
    component = index.split("/")[0]
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CliError(f"{index} has no weight_map of tensor names to file names.")
    if component == TEXT_ENCODER_FOLDER:
        past = is_past(read_text_encoder_config(folder))
        weight_map = {tensor: name for tensor, name in weight_map.items() if not past(tensor)}
    return sorted({f"{component}/{name}" for name in weight_map.values()})


def _require(repository: str, needed: Iterable[str], names: set[str]) -> None:
    missing = [name for name in needed if name not in names]
    family = family_among(names) if missing else None
    if family is not None:
        raise CliError(f"By the names of its files, {repository} is {family}.")
    if missing:
        raise CliError(
            f"{repository} is not a whole model in diffusers' layout: {', '.join(missing)} is missing.",
            "A single weights file goes beside a whole model: `klein up --model MODEL --transformer FILE`.",
        )

"""Which files of a repository this suite needs: its configuration, the tokenizer, and one copy of the weights."""

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
from klein_core.model_registry import HubFile, PublishedVae
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
class Wanted:
    """One file to fetch."""

    repository: str
    name: str
    place: str
    """Where it goes in the model's folder."""


def configuration_files(choice: Choice, listings: Mapping[str, Iterable[str]]) -> list[Wanted]:
    """Lists the small files, which decide about the large ones.

    Args:
        choice: the model.
        listings: the file names of each of its repositories.

    Raises:
        CliError: the main repository is not in diffusers' layout.
    """
    names = set(listings[choice.repository])
    _require(choice.repository, _CONFIGURATIONS, names)
    chosen = {*_CONFIGURATIONS, *filter(_is_tokenizer_file, names), *filter(_LICENSE.fullmatch, names)}
    components = _own_components(choice)
    sources = {weight_source(choice.repository, names, component) for component in components}
    chosen |= {name for name in sources if name.endswith(_INDEX_SUFFIX)}
    wanted = {name: Wanted(choice.repository, name, name) for name in chosen}
    if choice.vae is not None:
        place = f"{VAE_FOLDER}/config.json"
        _require(choice.vae.repository, ["config.json"], set(listings[choice.vae.repository]))
        wanted[place] = Wanted(choice.vae.repository, "config.json", place)
    return [wanted[place] for place in sorted(wanted)]


def weight_files(choice: Choice, listings: Mapping[str, Iterable[str]], folder: Path) -> list[Wanted]:
    """Lists the weights, of each part exactly one copy.

    Args:
        choice: the model.
        listings: the file names of each of its repositories.
        folder: holds the configuration files.

    Raises:
        CliError: weights are missing, are only pickles, or there are several sets of them.
    """
    names = set(listings[choice.repository])
    wanted = []
    for component in _own_components(choice):
        source = weight_source(choice.repository, names, component)
        shards = [source] if source.endswith(_SUFFIX) else _needed_shards(folder, source)
        _require(choice.repository, shards, names)
        wanted += [Wanted(choice.repository, shard, shard) for shard in shards]
    for component, part in ((TRANSFORMER_FOLDER, choice.transformer), (VAE_FOLDER, choice.vae)):
        if part is not None:
            name = _single_file(part, set(listings[part.repository]))
            wanted.append(Wanted(part.repository, name, f"{component}/{name}"))
    return wanted


def weight_source(repository: str, names: Iterable[str], component: str) -> str:
    """Picks a component's index, or its only file, by the rule that the loader follows."""
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
    """The parts whose weights come from the main repository."""
    replaced = {TRANSFORMER_FOLDER: choice.transformer, VAE_FOLDER: choice.vae}
    parts = (TEXT_ENCODER_FOLDER, TRANSFORMER_FOLDER, VAE_FOLDER)
    return [part for part in parts if replaced.get(part) is None]


def _single_file(part: HubFile | PublishedVae, names: set[str]) -> str:
    """The file that the table names, else the only one there is."""
    if isinstance(part, HubFile) and part.name in names:
        return part.name
    return weight_source(part.repository, names, "")


def _needed_shards(folder: Path, index: str) -> list[str]:
    """The shards that hold a tensor which is loaded; some of a text encoder's hold none."""
    component = index.split("/")[0]
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CliError(f"{index} has no weight_map of tensor names to file names.")
    if component == TEXT_ENCODER_FOLDER:
        past = is_past(read_text_encoder_config(folder))
        weight_map = {tensor: name for tensor, name in weight_map.items() if not past(tensor)}
    return sorted({f"{component}/{name}" for name in weight_map.values()})


def _is_tokenizer_file(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parts[:-1] == (TOKENIZER_FOLDER,) and path.suffix in _TOKENIZER_SUFFIXES


def _require(repository: str, needed: Iterable[str], names: set[str]) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        raise CliError(
            f"{repository} is not a whole model in diffusers' layout: {', '.join(missing)} is missing.",
            "A single weights file goes beside a whole model: `klein up --model MODEL --transformer FILE`.",
        )

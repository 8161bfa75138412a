"""Reader of `model_description.json`: what a model is, which image sizes it was trained for and which words it needs.

The file is optional and lies next to `model_index.json`. It is untrusted like every other file of a checkpoint.
Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.checkpoint.files import ModelFiles, is_inside
from klein_core.checkpoint.header import open_regular
from klein_core.errors import CheckpointError, listed
from klein_core.params import DEFAULT_LIMITS, SIZE_MULTIPLE_PX

FILE_NAME = "model_description.json"
_FILE_BYTES = 64 * 1024
_DESCRIPTION_CHARACTERS = 2000
_SUBJECT_WORDS = 500
_WORD_CHARACTERS = 64
_REQUIRED_KEYS = ("description", "default_size_px", "pixel_count")
_KEYS = (*_REQUIRED_KEYS, "subject_words")


@dataclass(frozen=True)
class ModelDescription:
    """A model as its author describes it."""

    description: str
    """What the model is and what it can do, in one paragraph."""
    default_size_px: int
    """Width and height that it was trained for."""
    pixel_count: int
    """Most pixels of one image that it was trained for."""
    subject_words: tuple[str, ...] = ()
    """Words or phrases of which a prompt must contain at least one; empty when the model understands any prompt."""


def read_description(files: ModelFiles | Path | str) -> ModelDescription | None:
    """Reads the description in a model's folder; `None` when the model has none.

    Raises:
        CheckpointError: the file cannot be read, is a link that leaves the folder, or a key is missing, unknown or
            wrong; all such keys are named.
    """
    folder = ModelFiles.of(files).model
    if folder is None or not (folder / FILE_NAME).exists():
        return None
    path = folder / FILE_NAME
    if not is_inside(path, folder):
        raise CheckpointError(f"{path} is a link that leaves {folder}")
    with open_regular(path) as file:
        text = file.read(_FILE_BYTES + 1)
    if len(text) > _FILE_BYTES:
        raise CheckpointError(f"{path} is larger than {_FILE_BYTES} bytes")
    try:
        values = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    if problems := list(_problems(values)):
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    return ModelDescription(**values | {"subject_words": tuple(values.get("subject_words", ()))})


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    if missing := set(_REQUIRED_KEYS) - values.keys():
        yield f"missing: {listed(missing)}"
    if unknown := values.keys() - set(_KEYS):
        yield f"unknown: {listed(unknown)}; known are {', '.join(_KEYS)}"
    description = values.get("description", "unset")
    if not isinstance(description, str) or not description.isprintable() or not description.strip():
        yield "description must be one paragraph of printable text"
    elif len(description) > _DESCRIPTION_CHARACTERS:
        yield f"description has {len(description)} characters; at most {_DESCRIPTION_CHARACTERS} are allowed"
    limits = DEFAULT_LIMITS
    pixels = values.get("pixel_count", limits.pixel_count)
    if type(pixels) is not int or not limits.side_px**2 <= pixels <= limits.pixel_count:
        yield f"pixel_count must be an integer in [{limits.side_px**2}, {limits.pixel_count}]"
        pixels = limits.pixel_count
    size = values.get("default_size_px", limits.side_px)
    if type(size) is not int or size < limits.side_px or size % SIZE_MULTIPLE_PX:
        yield f"default_size_px must be a multiple of {SIZE_MULTIPLE_PX}, at least {limits.side_px}"
    elif size**2 > pixels:
        yield f"default_size_px is {size}, and its square is over pixel_count, {pixels}"
    words = values.get("subject_words", [])
    if not isinstance(words, list) or len(words) > _SUBJECT_WORDS:
        yield f"subject_words must be a list of at most {_SUBJECT_WORDS} words"
    elif not all(
        isinstance(word, str)
        and len(word) <= _WORD_CHARACTERS
        and word.isprintable()
        and any(map(str.isalnum, word))
        for word in words
    ):
        yield f"subject_words must be printable texts of 1 to {_WORD_CHARACTERS} characters with a letter or digit"

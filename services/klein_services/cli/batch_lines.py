"""Lines of a batch: requests as JSON objects, one a line, checked before any of them is sent."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from klein_client import ImageOptions, InvalidRequest
from klein_client.request import image_spec
from klein_client.sources import is_url
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

MOST_LINES = 100_000
LONGEST_LINE_BYTES = 1 << 20
_SHOWN_PROBLEMS = 20
_STEMS = 64
"""Images of one request whose names are checked. No server makes more."""
_KEYS = (
    "id",
    "prompt",
    *(
        name
        for name in ImageOptions.__annotations__
        # One connection has one token, every line of a batch is of the class `batch`, and a line's key follows from it.
        if name not in ("token", "metadata", "idempotency_key", "priority", "timeout_seconds")
    ),
)
_FILES = ("initial_image", "mask")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch."""

    number: int
    """Its line in the file, from 1."""
    id: str
    """Its name in the results and in the files of its images."""
    prompt: str
    options: ImageOptions
    digest: str
    """Identifies the request without its id: a result of another one is not taken for this one's."""

    @property
    def stems(self) -> list[str]:
        """Returns the names of its images without their suffix: its id, numbered if there are several."""
        count = self.options.get("count") or 1
        return (
            [self.id] if count == 1 else [f"{self.id}-{number + 1}" for number in range(min(count, _STEMS))]
        )


def read_lines(file: Path) -> list[BatchLine]:
    """Returns the requests of a file; empty lines are skipped.

    Raises:
        CliError: the file cannot be read, or has lines that cannot be sent; lists them with their numbers and keys.
    """
    lines: list[BatchLine] = []
    owners: dict[str, int] = {}
    problems: list[str] = []
    try:
        with file.open("rb") as content:
            number = 0
            while data := content.readline(LONGEST_LINE_BYTES + 1):
                number += 1
                if number > MOST_LINES:
                    raise CliError(
                        f"{file} has more than {MOST_LINES} lines.", "Split it into several files.", MISUSED
                    )
                if len(data) > LONGEST_LINE_BYTES:
                    raise CliError(
                        f"{file}: line {number} has more than {LONGEST_LINE_BYTES} bytes.", exit_code=MISUSED
                    )
                if not data.strip():
                    continue
                try:
                    line = _parse(data, number, file.parent)
                except InvalidRequest as error:
                    problems.append(f"line {number}: {error}")
                    continue
                lines.append(line)
                taken = [owners.setdefault(stem, number) for stem in line.stems]
                if other := next((owner for owner in taken if owner != number), 0):
                    problems.append(
                        f"line {number}: id {line.id!r} would give the file names of line {other}"
                    )
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror}.", exit_code=MISUSED) from error
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more")
        counted = f"{file}: {len(problems)} line{'s' if len(problems) > 1 else ''} cannot be used, nothing was sent:"
        raise CliError("\n  ".join([counted, *shown]), exit_code=MISUSED)
    if not lines:
        raise CliError(f"{file} has no requests.", 'A line is such as {"prompt": "a red ring"}.', MISUSED)
    return lines


def _parse(data: bytes, number: int, folder: Path) -> BatchLine:
    """Returns a line; raises InvalidRequest with the key that cannot be used."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"is no JSON object but of type {type(given).__name__}")
    arguments: dict[str, Any] = given
    for key in arguments:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, 1)
            raise InvalidRequest.of(key, f"is no key{f'; did you mean {close[0]}?' if close else ''}")
    line_id = arguments.pop("id", f"line-{number}")
    if not isinstance(line_id, str) or not _ID.fullmatch(line_id):
        raise InvalidRequest.of(
            "id",
            "must have 1 to 128 letters, digits, dots, hyphens and underscores, the first a letter or digit",
        )
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    prompt = arguments.pop("prompt", None)
    if not isinstance(prompt, str):
        raise InvalidRequest.of("prompt", "is missing" if prompt is None else "must be a text")
    options = cast("ImageOptions", arguments)
    # Without its files: they are read when their line is sent.
    image_spec(prompt, options, {})
    references = arguments.get("references")
    if references is not None:
        named = references if isinstance(references, list) else [references]
        arguments["references"] = [
            _source(each, f"references[{index}]", folder) for index, each in enumerate(named)
        ]
    for key in _FILES:
        if arguments.get(key) is not None:
            arguments[key] = _source(arguments[key], key, folder)
    return BatchLine(number, line_id, prompt, options, digest)


def _source(name: object, field: str, folder: Path) -> str | Path:
    """Returns a URL as it is, and a file's path relative to the folder of the batch."""
    if not isinstance(name, str):
        raise InvalidRequest.of(field, "must be a path or a URL")
    if is_url(name):
        return name
    path = folder / name
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise InvalidRequest.of(field, f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest.of(field, f"is no path: {error}") from error

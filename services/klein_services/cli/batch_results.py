"""Results of a batch: image files in a folder, and a JSON line for each request that ended."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from klein_client import Generation, KleinError
from klein_services.cli.batch_lines import BatchLine
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

RESULTS = "results.jsonl"
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "raw": ".raw"}


class BatchResults:
    """Results in a folder, locked against a second batch. Each is appended by one write.

    Args:
        folder: made if it does not exist.

    Raises:
        CliError: the folder cannot be used, is in use, or its results cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / RESULTS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CliError(f"{folder} cannot be used: {error.strerror}.", exit_code=MISUSED) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._done = self._read()
        except OSError as error:
            os.close(self._file)
            raise CliError(
                f"Another klein batch works in {folder}.", "Wait for it, or name another folder.", MISUSED
            ) from error
        except CliError:
            os.close(self._file)
            raise

    def __enter__(self) -> BatchResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def missing(self, lines: list[BatchLine]) -> list[BatchLine]:
        """Returns the lines without a result, or whose images are gone.

        Raises:
            CliError: a result of the same id is that of another request.
        """
        wanted = []
        for line in lines:
            result = self._done.get(line.id)
            if result is None:
                wanted.append(line)
                continue
            if result["digest"] != line.digest:
                raise CliError(
                    f"line {line.number}: the id {line.id!r} has a result of another request in {self._folder}.",
                    "Give the line another id, or name another folder with --out.",
                    MISUSED,
                )
            if not all((self._folder / name).is_file() for name in result["files"]):
                wanted.append(line)
        return wanted

    def add(self, line: BatchLine, generation: Generation) -> None:
        """Writes the images, each at once under its name, and then the result.

        Raises:
            CliError: a file cannot be written.
        """
        names = []
        try:
            for stem, image in zip(line.stems, generation, strict=True):
                name = f"{stem}{_SUFFIXES[image.format]}"
                # A name that no id has.
                partial = self._folder / f".{name}.partial"
                partial.write_bytes(image.data)
                partial.replace(self._folder / name)
                names.append(name)
            summary = generation.summary
            self._append(
                line,
                files=names,
                seeds=[image.seed for image in generation],
                sizes_px=[[image.width_px, image.height_px] for image in generation],
                model=summary.model,
                flow=summary.flow,
                request_id=summary.request_id,
                total_ms=round(summary.total_seconds * 1000),
                warnings=list(summary.warnings),
            )
        except OSError as error:
            raise CliError(f"{self._folder} cannot be written: {error.strerror}.") from error

    def add_failure(self, line: BatchLine, error: KleinError) -> None:
        """Writes why a line failed; the next run sends it again.

        Raises:
            CliError: the results cannot be written.
        """
        fields = [violation.argument for violation in error.violations]
        described = {"code": error.code.name, "reason": error.reason, "fields": fields, "message": str(error)}
        try:
            self._append(line, error=described)
        except OSError as failure:
            raise CliError(f"{self._path} cannot be written: {failure.strerror}.") from failure

    def _append(self, line: BatchLine, **fields: object) -> None:
        record = {"id": line.id, "line": line.number, "digest": line.digest, **fields}
        data = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        end = os.fstat(self._file).st_size
        if os.write(self._file, data) != len(data):
            # The disk is full; half a line would be no JSON.
            os.ftruncate(self._file, end)
            raise OSError(0, "no space left for a result", str(self._path))

    def _read(self) -> dict[str, dict[str, Any]]:
        """Returns the results of requests that succeeded, by id. A last line that was cut off is removed."""
        with self._path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        done: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                result = json.loads(line)
                name, files = result["id"], result.get("files")
                result["digest"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CliError(
                    f"{self._path}: line {number} is no result of klein batch.",
                    "Correct or remove it.",
                    MISUSED,
                ) from error
            if files is not None:
                done[name] = result
        return done

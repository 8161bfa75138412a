"""Download of a model: into a hidden folder next to the target, renamed to the target when it is complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.client import Hub, Listing, RemoteFile
from klein_services.cli.hub.selection import WantedFile
from klein_services.cli.model_store import RECEIPT
from klein_services.cli.output import file_size

SPARE_BYTES = 64 * 2**20
"""Disk space that a download leaves free."""


class ModelDownload:
    """The hidden folder of one download. Within its `with` block no other process downloads the same model."""

    def __init__(self, target: Path) -> None:
        self.target = target.expanduser().absolute()
        self.folder = self.target.with_name(f".{self.target.name}.partial")
        self._lock = -1

    def __enter__(self) -> ModelDownload:
        """Creates and locks the folder.

        Raises:
            CliError: the target cannot be replaced, or another process downloads this model.
        """
        if self.target.is_mount():
            raise CliError(
                f"{self.target} is where a volume is mounted: a folder cannot be renamed to it.",
                f"Name a folder in it: --to {self.target / 'model'}.",
                MISUSED,
            )
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CliError(
                f"{self.target} is there already and was not pulled by klein.",
                "Name another folder with --to, or remove it.",
                MISUSED,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        # The folder itself is the lock: no file stays behind, and the lock ends with its process.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CliError(f"Another `klein pull` is writing {self.target}.", "Wait for it.") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def bytes_here(self, wanted: WantedFile, remote: RemoteFile) -> int:
        """Returns the size of a file that an earlier run finished, else 0."""
        path = self.folder / wanted.path
        size = path.stat().st_size if path.is_file() else 0
        return size if size == remote.size_bytes else 0

    def check_space(self, missing_bytes: int) -> None:
        """Raises CliError when the disk has no space for `missing_bytes`."""
        free_bytes = shutil.disk_usage(self.folder).free
        if missing_bytes + SPARE_BYTES > free_bytes:
            raise CliError(
                f"{self.target.parent} has {file_size(free_bytes)} free; {file_size(missing_bytes)} are to come.",
                "Make room, or name another place with --to.",
            )

    def fetch(self, hub: Hub, listing: Listing, wanted: WantedFile, on_bytes: Callable[[int], None]) -> None:
        """Downloads one file and verifies its digest; huggingface_hub itself compares only sizes.

        Raises:
            CliError: the content is not what the repository lists; the file is deleted.
            Exception: as `Hub.download`.
        """
        remote = listing.files[wanted.name]
        path = hub.download(listing, wanted.name, self.folder / wanted.folder, on_bytes)
        size = path.stat().st_size
        if size != (remote.size_bytes or size) or not _has_digest(path, remote):
            path.unlink()
            raise CliError(
                f"{wanted.name} of {wanted.repository} is not what its repository lists ({size} bytes arrived).",
                "It was deleted: run the same command again.",
            )

    def finish(self, receipt: Mapping[str, Any], paths: Iterable[str]) -> None:
        """Deletes files that are not in `paths`, writes the receipt, and renames the folder to the target.

        Raises:
            OSError: the target cannot be replaced.
        """
        kept = {self.folder / path for path in paths}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        (self.folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        self.folder.replace(self.target)


def _has_digest(path: Path, remote: RemoteFile) -> bool:
    if remote.sha256 is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == (remote.blob_id or blob.hexdigest())

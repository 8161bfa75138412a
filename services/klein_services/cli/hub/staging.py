"""A model's folder while it is not whole: hidden beside its place, and renamed into it at the end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import try_to_load_from_cache

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.client import DigestKind, Hub, Listing, RemoteFile
from klein_services.cli.hub.selection import Wanted
from klein_services.cli.model_store import RECEIPT
from klein_services.cli.output import file_size

SPARE_BYTES = 64 * 2**20
"""Left free beside what is fetched."""
_STATE = ".klein-pull"
"""Holds unfinished files and the note of finished ones; goes when the folder is whole."""

OnBytes = Callable[[int], None]


class Staging:
    """One pull's folder. Within its `with` block no other pull of the same model runs."""

    def __init__(self, target: Path) -> None:
        target = target.expanduser().absolute()
        self.target = target
        self.folder = target.with_name(f".{target.name}.partial")
        self._state = self.folder / _STATE
        self._lock = -1
        self._finished: dict[str, str] = {}

    def __enter__(self) -> Staging:
        self._check_target()
        self._state.mkdir(parents=True, exist_ok=True)
        # The folder itself is the lock: it leaves nothing behind and goes when its process goes.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CliError(f"Another `klein pull` is writing {self.target}.", "Wait for it.") from None
        self._finished = self._read_finished()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def has(self, wanted: Wanted, remote: RemoteFile) -> bool:
        """Whether this file with this content was finished before."""
        path = self.folder / wanted.place
        return self._finished.get(wanted.place) == remote.digest and path.is_file()

    def bytes_here(self, wanted: Wanted, remote: RemoteFile) -> int:
        """How much of a file is here already."""
        if self.has(wanted, remote):
            return remote.size_bytes or 0
        part = self._part(remote)
        here = part.stat().st_size if part.exists() else 0
        if remote.size_bytes is not None and here > remote.size_bytes:
            part.unlink()
            return 0
        return here

    def check_space(self, missing_bytes: int) -> None:
        """Raises CliError when the disk cannot take what is missing."""
        free_bytes = shutil.disk_usage(self.folder).free
        if missing_bytes + SPARE_BYTES > free_bytes:
            raise CliError(
                f"{self.target.parent} has {file_size(free_bytes)} free; {file_size(missing_bytes)} are to come.",
                "Make room, or name another place with --to.",
            )

    def fetch(self, hub: Hub, listing: Listing, wanted: Wanted, on_bytes: OnBytes) -> None:
        """Brings one file here: from where it stopped, or from huggingface_hub's own cache.

        Raises:
            CliError: the content is not what the repository lists.
            Exception: as `Hub.read`.
        """
        remote = listing.files[wanted.name]
        if self.has(wanted, remote):
            return
        part = self._part(remote)
        self._take_from_cache(listing, wanted, part, on_bytes)
        start = self.bytes_here(wanted, remote)
        if start == 0 or start != remote.size_bytes:
            with part.open("ab") as file:
                hub.read(listing, wanted.name, file, start=start, on_bytes=on_bytes)
        _check_content(part, remote, wanted)
        path = self.folder / wanted.place
        path.parent.mkdir(exist_ok=True)
        part.replace(path)
        self._note_finished(wanted, remote)

    def finish(self, receipt: Mapping[str, Any], places: set[str]) -> None:
        """Removes what is not part of the model and puts the folder in its place, in one step.

        Raises:
            OSError: the place cannot be taken.
        """
        (self.folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
        for path in self.folder.rglob("*"):
            place = path.relative_to(self.folder)
            if path.is_file() and place.parts[0] != _STATE and str(place) not in {*places, RECEIPT}:
                path.unlink()
        shutil.rmtree(self._state)
        self.folder.replace(self.target)

    def _check_target(self) -> None:
        if self.target.is_mount():
            raise CliError(
                f"{self.target} is where a volume is mounted: it cannot appear there in one step.",
                f"Name a folder in it: --to {self.target / 'model'}.",
                MISUSED,
            )
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise CliError(
                f"{self.target} is there already and was not pulled by klein.",
                "Name another folder with --to, or remove it.",
                MISUSED,
            )

    def _take_from_cache(self, listing: Listing, wanted: Wanted, part: Path, on_bytes: OnBytes) -> None:
        """Copies a file that another program of huggingface_hub's downloaded earlier."""
        cached = try_to_load_from_cache(listing.repository, wanted.name, revision=listing.commit)
        if isinstance(cached, str) and not part.exists():
            copied = part.with_suffix(".copy")
            shutil.copyfile(cached, copied)
            copied.replace(part)
            on_bytes(part.stat().st_size)

    def _part(self, remote: RemoteFile) -> Path:
        return self._state / f"{remote.digest}.part"

    def _note_finished(self, wanted: Wanted, remote: RemoteFile) -> None:
        self._finished[wanted.place] = remote.digest
        note = self._state / "finished.new"
        note.write_text(json.dumps(self._finished), encoding="utf-8")
        note.replace(self._state / "finished.json")

    def _read_finished(self) -> dict[str, str]:
        try:
            noted = json.loads((self._state / "finished.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(place): str(digest) for place, digest in noted.items()} if isinstance(noted, dict) else {}


def _check_content(part: Path, remote: RemoteFile, wanted: Wanted) -> None:
    """Compares what arrived with the listing; what differs is thrown away, as more of it would not help."""
    size = part.stat().st_size
    has_size = remote.size_bytes is None or size == remote.size_bytes
    if not has_size or _digest(part, remote) != remote.digest:
        part.unlink()
        raise CliError(
            f"{wanted.name} of {wanted.repository} is not what its repository lists ({size} bytes arrived).",
            "It was thrown away: run the same command again.",
        )


def _digest(path: Path, remote: RemoteFile) -> str:
    """Returns the content's digest of the kind that was listed; where none was, that itself."""
    match remote.digest_kind:
        case DigestKind.SHA256:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        case DigestKind.GIT:
            content = path.read_bytes()
            blob = b"blob %d\0" % len(content) + content
            return hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        case DigestKind.NONE:
            return remote.digest

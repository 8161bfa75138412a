"""The hub as this suite sees it: what a repository lists, and one file's bytes from any position on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented there

LISTING_TIMEOUT_SECONDS = 30.0


class DigestKind(Enum):
    """How a file's digest comes from its content."""

    SHA256 = "sha256"
    """Of large files."""
    GIT = "git"
    """SHA-1 of git's header and the content."""
    NONE = "none"
    """It only names the file and its commit."""


@dataclass(frozen=True)
class RemoteFile:
    """One file as its repository lists it."""

    size_bytes: int | None
    digest: str
    """Of its content; the same digest is the same content."""
    digest_kind: DigestKind


@dataclass(frozen=True)
class Listing:
    """One repository at one commit."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]
    license: str
    """What its card says, or nothing."""


class Hub:
    """The endpoint, token and proxies that huggingface_hub is configured for."""

    def __init__(self) -> None:
        # What it would warn about on its own is told by our errors and progress.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._api = HfApi()

    @property
    def endpoint(self) -> str:
        return str(constants.ENDPOINT)

    @property
    def has_token(self) -> bool:
        return get_token() is not None

    def page(self, repository: str) -> str:
        """Where a person reads about a repository and accepts its license."""
        return f"{self.endpoint}/{repository}"

    def listing(self, repository: str) -> Listing:
        """Asks for a repository's files at its newest commit.

        Raises:
            Exception: huggingface_hub's and its HTTP library's own; `explain` turns them into sentences.
        """
        info = self._api.model_info(repository, files_metadata=True, timeout=LISTING_TIMEOUT_SECONDS)
        commit = info.sha or "main"
        files = {file.rfilename: _remote_file(file, commit) for file in info.siblings or ()}
        return Listing(repository, commit, files, _license(info.card_data))

    def read(
        self,
        listing: Listing,
        name: str,
        into: BinaryIO,
        *,
        start: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Appends a file's bytes from `start` on to `into`, which holds those before; reconnects a few times.

        Raises:
            OSError: `into` cannot take them, or they end too early.
            Exception: as `listing`.
        """
        http_get(
            hf_hub_url(listing.repository, name, revision=listing.commit),
            into,
            resume_size=start,
            headers=build_hf_headers(library_name="klein-suite"),
            expected_size=listing.files[name].size_bytes,
            displayed_filename=name,
            tqdm_class=_counter(on_bytes),
        )


def _remote_file(file: Any, commit: str) -> RemoteFile:
    if file.lfs is not None:
        return RemoteFile(file.size, file.lfs.sha256, DigestKind.SHA256)
    if file.blob_id is not None:
        return RemoteFile(file.size, file.blob_id, DigestKind.GIT)
    return RemoteFile(file.size, f"{commit}-{file.rfilename.replace('/', '-')}", DigestKind.NONE)


def _license(card: Any) -> str:
    """The card's own name for a license that is none of the usual ones says more than `other`."""
    if card is None:
        return ""
    named = getattr(card, "license_name", None)
    return str(named or getattr(card, "license", None) or "")


def _counter(on_bytes: Callable[[int], None]) -> Any:
    """Returns a class with as much of tqdm as a download uses."""

    class Counter:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            on_bytes(count)

    return Counter

"""Client of the Hugging Face Hub: a repository's listing, and one file into a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # documented there

LISTING_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """One file as its repository lists it."""

    size_bytes: int | None
    sha256: str | None
    """Digest of the content of a large file; `None` for files that git holds itself."""
    blob_id: str | None
    """Git's own digest: of the content, where `sha256` is `None`."""


@dataclass(frozen=True)
class Listing:
    """One repository at one commit."""

    repository: str
    commit: str
    files: Mapping[str, RemoteFile]
    license: str
    """License that the model card names, or an empty string."""


class Hub:
    """The endpoint, token and proxies that huggingface_hub is configured for."""

    def __init__(self) -> None:
        # Its warnings repeat what our errors and progress show.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self._api = HfApi()

    @property
    def endpoint(self) -> str:
        return str(constants.ENDPOINT)

    @property
    def has_token(self) -> bool:
        return get_token() is not None

    def page(self, repository: str) -> str:
        """Returns the URL where users read about a repository and accept its license."""
        return f"{self.endpoint}/{repository}"

    def listing(self, repository: str) -> Listing:
        """Requests the files of a repository at its newest commit.

        Raises:
            Exception: huggingface_hub's and its HTTP library's own; `explain` turns them into sentences.
        """
        info = self._api.model_info(repository, files_metadata=True, timeout=LISTING_TIMEOUT_SECONDS)
        files = {
            file.rfilename: RemoteFile(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in info.siblings or ()
        }
        card = info.card_data
        # A license that is not one of the usual ones has identifier `other` and a name.
        named = getattr(card, "license_name", None) or getattr(card, "license", None) or ""
        return Listing(repository, info.sha or "main", files, str(named))

    def download(self, listing: Listing, name: str, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        """Downloads one file into `folder`, unless it is there already, and returns its path.

        huggingface_hub chooses the transport (Xet or HTTP), reconnects, and copies from its cache what is there.

        Args:
            listing: repository and commit.
            name: path in the repository, and in `folder`.
            folder: where the file goes.
            on_bytes: called with the count of every piece that arrives.

        Raises:
            OSError: the file cannot be written, or ends too early.
            Exception: as `listing`.
        """
        path = hf_hub_download(
            listing.repository,
            name,
            revision=listing.commit,
            local_dir=folder,
            library_name="klein-suite",
            tqdm_class=_counter(on_bytes),
        )
        return Path(path)


def _counter(on_bytes: Callable[[int], None]) -> type[Any]:
    """Returns a progress bar class that draws nothing and reports bytes."""

    class Counter(tqdm):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignores bytes on the network: with Xet they differ from those of the file, which `update` counts."""

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            """Ignores the network's speed, as `update_transfer`."""

    return Counter

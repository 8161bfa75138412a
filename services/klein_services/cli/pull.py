"""`klein pull`: downloads a model from the Hugging Face Hub into one folder that `klein up` loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from klein_core.checkpoint.config import read_variant
from klein_core.errors import CheckpointError
from klein_core.model_registry import variants_of_shape
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.catalog import Choice, choose
from klein_services.cli.hub.client import Hub, Listing
from klein_services.cli.hub.download import ModelDownload
from klein_services.cli.hub.errors import AGAIN, EXPLAINED, explain
from klein_services.cli.hub.selection import WantedFile, configuration_files, weight_files
from klein_services.cli.model_store import default_folder, read_receipt
from klein_services.cli.output import file_size

_NON_COMMERCIAL = re.compile(r"non-?commercial|(^|-)nc(-|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """Options of the command line."""

    identifier: str
    precision: str | None = None
    small_decoder: bool = False
    to: Path | None = None
    license_accepted: bool = False


@dataclass(frozen=True)
class Terms:
    """License of a model."""

    name: str
    non_commercial: bool


def run_pull(options: PullOptions, out: Console, progress_console: Console) -> None:
    """Downloads a model, shows progress, and prints the command that starts it.

    Raises:
        CliError: the download failed, and the target folder does not exist; or it holds another pulled model.
    """
    choice = choose(options.identifier, options.precision, small_decoder=options.small_decoder)
    folder = options.to or default_folder(choice)
    receipt = read_receipt(folder)
    if receipt is not None and receipt.get("model") != choice.name:
        raise CliError(
            f"{folder} holds {receipt.get('model')}.", "Name another folder with --to, or remove it.", MISUSED
        )
    if receipt is None:
        pull = _Pull(choice, options, out)
        try:
            pull.run(folder, progress_console)
        except KeyboardInterrupt:
            progress_console.print(AGAIN, soft_wrap=True)
            raise
    model = str(options.to) if options.to else choice.name
    out.print(
        f"{choice.name} is in {folder}. Start it:\n    klein up --model {model}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


class _Pull:
    """One run of the command."""

    def __init__(self, choice: Choice, options: PullOptions, out: Console) -> None:
        self._choice = choice
        self._options = options
        self._out = out
        self._hub = Hub()
        if choice.variant is not None:
            license = choice.variant.license
            self._agree(Terms(license.name, license.non_commercial))
        self._listings: dict[str, Listing] = {}
        for repository in dict.fromkeys(choice.repositories):
            try:
                self._listings[repository] = self._hub.listing(repository)
            except EXPLAINED as error:
                raise explain(error, self._hub, repository) from error
        if choice.variant is None:
            name = self._listings[choice.repository].license
            self._agree(Terms(name or "none is named", bool(_NON_COMMERCIAL.search(name))))

    def run(self, folder: Path, progress_console: Console) -> None:
        """Downloads into a hidden folder and renames it to `folder`; raises CliError when it fails."""
        try:
            with ModelDownload(folder) as download, DownloadProgress(progress_console) as progress:
                configuration = configuration_files(self._choice, self._names)
                self._fetch(configuration, download, progress)
                self._check_configuration(download.folder)
                weights = weight_files(self._choice, self._names, download.folder)
                self._fetch(weights, download, progress)
                files = {file.path: file for file in (*configuration, *weights)}
                receipt = {
                    "model": self._choice.name,
                    "commits": {name: listing.commit for name, listing in self._listings.items()},
                    "files": {
                        path: {"repository": files[path].repository, "name": files[path].name}
                        for path in sorted(files)
                    },
                }
                download.finish(receipt, files)
        except OSError as error:
            raise explain(error, self._hub, self._choice.repository) from error

    @property
    def _names(self) -> Mapping[str, Mapping[str, object]]:
        return {repository: listing.files for repository, listing in self._listings.items()}

    def _agree(self, terms: Terms) -> None:
        """Prints the license.

        Raises:
            CliError: it must be accepted and was not.
        """
        page = self._hub.page(self._choice.repository)
        restriction = ", not for commercial use" if terms.non_commercial else ""
        self._out.print(
            f"License: {terms.name}{restriction}; the text is at {page}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        if terms.non_commercial and not self._options.license_accepted:
            raise CliError(
                f"{self._choice.name} may not be used commercially: its license must be accepted first.",
                "Read it and add --accept-license.",
                MISUSED,
            )

    def _check_configuration(self, folder: Path) -> None:
        """Refuses a model that this suite cannot load before its weights are downloaded."""
        try:
            variant = read_variant(folder)
        except CheckpointError as error:
            sentence = str(error).replace(str(folder), self._choice.repository)
            raise CliError(f"This suite cannot load it: {sentence}.") from error
        if self._choice.variant is None:
            # Fine-tunes inherit the license of the published models of their shape.
            origins = variants_of_shape(variant.transformer)
            if origins and all(row.license.non_commercial for row in origins):
                self._agree(Terms(f"{origins[0].license.name} (that of all models of this shape)", True))

    def _fetch(self, wanted: list[WantedFile], download: ModelDownload, progress: DownloadProgress) -> None:
        remotes = [self._listings[file.repository].files[file.name] for file in wanted]
        here = [download.bytes_here(file, remote) for file, remote in zip(wanted, remotes, strict=True)]
        total = sum(remote.size_bytes or 0 for remote in remotes)
        download.check_space(total - sum(here))
        progress.expect(total, sum(here))
        for file, remote in zip(wanted, remotes, strict=True):
            progress.begin(file, remote.size_bytes)
            try:
                download.fetch(self._hub, self._listings[file.repository], file, progress.advance)
            except EXPLAINED as error:
                raise explain(error, self._hub, file.repository) from error


class DownloadProgress:
    """Progress of a download: a bar over all bytes on a terminal, one line per file elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("asking", total=0)

    def __enter__(self) -> DownloadProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, total_bytes: int, here_bytes: int) -> None:
        """Adds files of `total_bytes`, of which `here_bytes` need no download."""
        known = self._bar.tasks[self._task].total or 0
        self._bar.update(self._task, total=known + total_bytes, advance=here_bytes)

    def begin(self, file: WantedFile, size_bytes: int | None) -> None:
        self._bar.update(self._task, description=file.path)
        if not self._console.is_terminal:
            size = f" ({file_size(size_bytes)})" if size_bytes is not None else ""
            self._console.print(f"{file.path}{size}", highlight=False, soft_wrap=True, markup=False)

    def advance(self, byte_count: int) -> None:
        self._bar.update(self._task, advance=byte_count)

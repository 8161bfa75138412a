"""`klein pull`: a model from the hub into one folder that `klein up` loads."""

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
from klein_core.variants import TransformerConfig
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.catalog import Choice, choose
from klein_services.cli.hub.client import Hub, Listing
from klein_services.cli.hub.errors import AGAIN, EXPLAINED, explain
from klein_services.cli.hub.selection import Wanted, configuration_files, weight_files
from klein_services.cli.hub.staging import Staging
from klein_services.cli.model_store import default_folder, read_receipt
from klein_services.cli.output import file_size

_NON_COMMERCIAL = re.compile(r"non-?commercial|(^|-)nc(-|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """What the command line said."""

    identifier: str
    precision: str | None = None
    small_decoder: bool = False
    to: Path | None = None
    license_accepted: bool = False


@dataclass(frozen=True)
class Terms:
    """A model's license as it is shown."""

    name: str
    non_commercial: bool


def run_pull(options: PullOptions, out: Console, progress_console: Console) -> None:
    """Downloads a model, shows how it goes, and says how to start it.

    Raises:
        CliError: with what to do about it; nothing is where a whole model would be.
    """
    choice = choose(options.identifier, options.precision, small_decoder=options.small_decoder)
    folder = options.to or default_folder(choice)
    if not _is_here(choice, folder):
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


def _is_here(choice: Choice, folder: Path) -> bool:
    """Whether an earlier pull ended well.

    Raises:
        CliError: what was pulled into the folder is another model.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        return False
    if receipt.get("model") != choice.name:
        raise CliError(
            f"{folder} holds {receipt.get('model')}.", "Name another folder with --to, or remove it.", MISUSED
        )
    return True


class _Pull:
    """One model's way here."""

    def __init__(self, choice: Choice, options: PullOptions, out: Console) -> None:
        self._choice = choice
        self._options = options
        self._out = out
        self._hub = Hub()
        if choice.variant is not None:
            license = choice.variant.license
            self._agree(Terms(license.name, license.non_commercial))
        self._listings = {name: self._listing(name) for name in dict.fromkeys(choice.repositories)}
        if choice.variant is None:
            name = self._listings[choice.repository].license
            self._agree(Terms(name or "none is named", bool(_NON_COMMERCIAL.search(name))))

    def run(self, folder: Path, progress_console: Console) -> None:
        try:
            with Staging(folder) as staging:
                self._fetch_into(staging, progress_console)
        except OSError as error:
            raise explain(error, self._hub, self._choice.repository) from error

    def _fetch_into(self, staging: Staging, progress_console: Console) -> None:
        configuration = configuration_files(self._choice, self._names)
        with DownloadProgress(progress_console) as progress:
            self._fetch(configuration, staging, progress)
            self._check_configuration(staging.folder)
            weights = weight_files(self._choice, self._names, staging.folder)
            self._fetch(weights, staging, progress)
        wanted = [*configuration, *weights]
        staging.finish(self._receipt(wanted), {file.place for file in wanted})

    @property
    def _names(self) -> Mapping[str, Mapping[str, object]]:
        return {repository: listing.files for repository, listing in self._listings.items()}

    def _listing(self, repository: str) -> Listing:
        try:
            return self._hub.listing(repository)
        except EXPLAINED as error:
            raise explain(error, self._hub, repository) from error

    def _agree(self, terms: Terms) -> None:
        """Shows the license.

        Raises:
            CliError: it has to be accepted and was not.
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
                f"{self._choice.name} may not be used commercially: its license has to be accepted first.",
                "Read it and add --accept-license.",
                MISUSED,
            )

    def _check_configuration(self, folder: Path) -> None:
        """Refuses what this suite would not load before anything large is fetched."""
        try:
            variant = read_variant(folder)
        except CheckpointError as error:
            sentence = str(error).replace(str(folder), self._choice.repository)
            raise CliError(f"This suite cannot load it: {sentence}.") from error
        if self._choice.variant is None:
            self._agree_to_origin(variant.transformer)

    def _agree_to_origin(self, shape: TransformerConfig) -> None:
        """A model of a published shape descends from one: its card may forget the terms that came with that."""
        origins = variants_of_shape(shape)
        if origins and all(row.license.non_commercial for row in origins):
            self._agree(Terms(f"{origins[0].license.name} (that of all models of this shape)", True))

    def _fetch(self, wanted: list[Wanted], staging: Staging, progress: DownloadProgress) -> None:
        files = [(file, self._listings[file.repository]) for file in wanted]
        remotes = [(file, listing.files[file.name]) for file, listing in files]
        here = sum(staging.bytes_here(file, remote) for file, remote in remotes)
        total = sum(remote.size_bytes or 0 for _, remote in remotes)
        staging.check_space(total - here)
        progress.expect(total, here)
        for file, listing in files:
            progress.begin(file, listing.files[file.name].size_bytes)
            try:
                staging.fetch(self._hub, listing, file, progress.advance)
            except EXPLAINED as error:
                raise explain(error, self._hub, file.repository) from error

    def _receipt(self, wanted: list[Wanted]) -> dict[str, object]:
        return {
            "model": self._choice.name,
            "commits": {name: listing.commit for name, listing in self._listings.items()},
            "files": {
                file.place: {"repository": file.repository, "name": file.name}
                for file in sorted(wanted, key=lambda file: file.place)
            },
        }


class DownloadProgress:
    """Bytes of the whole model on a terminal; elsewhere one line a file."""

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
        """Adds files of which a part may be here already."""
        known = self._bar.tasks[self._task].total or 0
        self._bar.update(self._task, total=known + total_bytes, advance=here_bytes)

    def begin(self, file: Wanted, size_bytes: int | None) -> None:
        self._bar.update(self._task, description=file.place)
        if not self._console.is_terminal:
            size = f" ({file_size(size_bytes)})" if size_bytes is not None else ""
            self._console.print(f"{file.place}{size}", highlight=False, soft_wrap=True, markup=False)

    def advance(self, byte_count: int) -> None:
        self._bar.update(self._task, advance=byte_count)

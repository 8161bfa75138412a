"""`klein batch`: many requests from a file, several at once, in the class that waits for all others."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from klein_client import AsyncClient, Generation, KleinError, PermissionDenied, Unauthenticated, Unavailable
from klein_services.cli.batch_lines import BatchLine, read_lines
from klein_services.cli.batch_results import RESULTS, BatchResults
from klein_services.cli.errors import call_error
from klein_services.cli.exit_codes import FAILED
from klein_services.cli.target import Target, connection
from klein_services.runtime.status import CONTENT_DENIED

STATUS_SECONDS = 10.0
UNAVAILABLE_SECONDS = 60.0
"""Time for which a suite that has answered may be gone before the batch ends."""
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0


def run_batch(
    file: Path,
    folder: Path,
    target: Target | str,
    *,
    concurrency: int,
    timeout_seconds: float,
    console: Console,
    token: str = "",
) -> int:
    """Makes the images of all lines that have no result yet; returns 0 only when every line has one.

    Raises:
        CliError: a line or the folder cannot be used, or the suite cannot be called.
        KeyboardInterrupt: Ctrl-C; the same command goes on later.
    """
    lines = read_lines(file)
    with BatchResults(folder) as results:
        batch = _Batch(results.missing(lines), results, target, timeout_seconds, console, len(lines))
        try:
            asyncio.run(batch.run(concurrency, token))
        except KeyboardInterrupt:
            console.print(f"{batch.done_count} of {len(lines)} are made. The same command makes the others.")
            raise
    console.print(
        f"{batch.done_count} of {len(lines)} are made; results are in {folder / RESULTS}.",
        highlight=False,
        soft_wrap=True,
    )
    if batch.failed_count:
        console.print("The same command sends the lines that failed again.")
    return FAILED if batch.failed_count else 0


class _Batch:
    """A batch in progress."""

    def __init__(
        self,
        lines: list[BatchLine],
        results: BatchResults,
        target: Target | str,
        timeout_seconds: float,
        console: Console,
        total: int,
    ) -> None:
        self.done_count = total - len(lines)
        self.failed_count = 0
        self._lines = lines
        self._results = results
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._console = console
        self._total = total
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    async def run(self, concurrency: int, token: str) -> None:
        """Sends all lines, so many at once.

        Raises:
            CliError: the suite cannot be called, or a result cannot be written.
        """
        if not self._lines:
            return
        async with AsyncClient(
            **connection(self._target, token), timeout_seconds=self._timeout_seconds
        ) as client:
            try:
                await client.status(timeout_seconds=STATUS_SECONDS)
            except KleinError as error:
                raise call_error(error, self._target) from error
            waiting = iter(self._lines)
            with self._progress:
                task = self._progress.add_task("batch", total=self._total, completed=self.done_count)
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(concurrency, len(self._lines))):
                            group.create_task(self._work(client, waiting, task))
                except ExceptionGroup as failures:
                    # All clients of a suite that is gone end for the same reason.
                    raise failures.exceptions[0] from failures

    async def _work(self, client: AsyncClient, waiting: Iterator[BatchLine], task: TaskID) -> None:
        for line in waiting:
            try:
                generation = await self._ask(client, line)
            except (Unavailable, Unauthenticated) as error:
                raise call_error(error, self._target) from error
            except KleinError as error:
                if isinstance(error, PermissionDenied) and error.reason != CONTENT_DENIED:
                    raise call_error(error, self._target) from error
                self.failed_count += 1
                self._results.add_failure(line, error)
                self._progress.console.print(
                    Text(f"line {line.number}, {line.id}: {error}", "red"), soft_wrap=True
                )
            else:
                self._results.add(line, generation)
                self.done_count += 1
                for warning in generation.warnings:
                    text = Text(f"line {line.number}, {line.id}: {warning}", "yellow")
                    self._progress.console.print(text, soft_wrap=True)
            self._progress.advance(task)

    async def _ask(self, client: AsyncClient, line: BatchLine) -> Generation:
        """Makes the images of one line, and waits for a suite that restarts."""
        # The same line has the same key, and with it the same seed, in the next run.
        options = line.options.copy()
        options["idempotency_key"] = hashlib.sha256(f"{line.id} {line.digest}".encode()).hexdigest()
        options["priority"] = "batch"
        loop = asyncio.get_running_loop()
        pause, end = _FIRST_PAUSE_SECONDS, None
        while True:
            try:
                return await client.generate(line.prompt, **options)
            except Unavailable:
                end = end or loop.time() + UNAVAILABLE_SECONDS
                if loop.time() + pause > end:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

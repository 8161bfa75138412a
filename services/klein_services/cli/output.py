"""Output for the user: the console of messages, sizes as text, progress of a request."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from klein_client import Event

_FILE_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_GIB = 1 << 30
_MIB = 1 << 20


def messages() -> Console:
    """Returns the console for progress and errors: standard error, so that output can be piped."""
    return Console(stderr=True)


def file_size(byte_count: float) -> str:
    """Formats a size of files or disks, in powers of 1000 with three digits: 7.75 GB."""
    unit = 0
    while byte_count >= 1000 and unit < len(_FILE_UNITS) - 1:
        byte_count, unit = byte_count / 1000, unit + 1
    number = f"{byte_count:.3g}" if unit and byte_count < 1000 else f"{byte_count:,.0f}"
    return f"{number} {_FILE_UNITS[unit]}"


def memory_size(byte_count: int) -> str:
    """Formats a size of device memory, in powers of 1024: 7.22 GiB."""
    return f"{byte_count / _GIB:.2f} GiB" if byte_count >= _GIB else f"{byte_count / _MIB:.0f} MiB"


class GenerationProgress:
    """Progress line of one request, from its events; removed at the end unless `keep` is set."""

    def __init__(self, console: Console, *, keep: bool = False) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=not keep,
            disable=not keep and not console.is_terminal,
        )
        self._task = self._progress.add_task("encoding", total=None, count="")
        self._image_count = 0

    def __enter__(self) -> GenerationProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def handle(self, event: Event) -> None:
        """Shows one event."""
        # Imported here: this module is loaded by commands that call nothing.
        from klein_client import Image, Queued, Step, Summary

        match event:
            case Queued(position=position, estimated_wait_seconds=wait):
                text = f"{position} ahead in the queue"
                if wait:
                    text += f", about {wait:.0f} s"
                self._describe(text if position else "next in the queue")
            case Step(step=step, step_count=step_count):
                self._progress.update(
                    self._task,
                    description="decoding" if step == step_count else "denoising",
                    completed=step,
                    total=step_count + 1,  # The last part of the bar is the decoding.
                    count=f"{step}/{step_count} steps",
                )
            case Image():
                self._image_count += 1
                self._describe(f"{self._image_count} made")
            case Summary():
                total = self._progress.tasks[self._task].total or 1
                self._progress.update(self._task, description="done", completed=total, total=total)

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)

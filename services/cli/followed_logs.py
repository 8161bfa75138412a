"""The stages' log files as they grow, each line with its stage's name."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from services.cli.processes import PROCESSES

_COLOURS = dict(zip(PROCESSES, ("cyan", "magenta", "green", "yellow"), strict=True))


class FollowedLogs:
    """Shows what was logged since it was last asked; nothing where `console` is None."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self._console = console
        self._files = {process: folder / f"{process}.log" for process in PROCESSES}
        self._offsets = dict.fromkeys(PROCESSES, 0)

    def show_new(self) -> None:
        if self._console is None:
            return
        for process in PROCESSES:
            for line in self._new_lines(process):
                self._console.print(
                    Text.assemble((f"{process:<13} ", _COLOURS[process]), line), soft_wrap=True
                )

    def _new_lines(self, process: str) -> list[str]:
        if not self._files[process].exists():
            return []
        with self._files[process].open("rb") as log:
            log.seek(self._offsets[process])
            complete, newline, _ = log.read().rpartition(b"\n")
        self._offsets[process] += len(complete) + len(newline)
        return complete.decode(errors="replace").splitlines()

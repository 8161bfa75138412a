"""`python -m klein_services.cli.demo`: starts the suite, makes pictures through its public API, stops it."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_services.cli.client import OPERATIONS, Generation, connect, generate
from klein_services.cli.errors import CliError, call_error
from klein_services.cli.exit_codes import FAILED, INTERRUPTED
from klein_services.cli.output import GenerationProgress
from klein_services.cli.process import inherited_environment
from klein_services.cli.startup import wait_with_progress
from klein_services.cli.suite import Suite, SuiteOptions

FOLDER = Path("out")
SHEET = "contact-sheet.png"
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class DemoPicture:
    """One request of the demo."""

    name: str
    title: str
    prompt: str
    seed: int
    references: tuple[str, ...] = ()
    """Names of pictures made before."""

    def image_spec(self, references: Sequence[bytes]) -> api.ImageSpec:
        return api.ImageSpec(
            prompt=self.prompt, references=references, seed=self.seed, format=image_pb2.IMAGE_FORMAT_PNG
        )

    def file_in(self, folder: Path) -> Path:
        return folder / f"{self.name}.png"


PICTURES = (
    DemoPicture("1-text-to-image", "text to image", "a large red heart on a yellow background", 1),
    DemoPicture("2-edit", "edit", "make the background blue", 2, ("1-text-to-image",)),
    DemoPicture("3-second-reference", "text to image", "a green star on a white background", 3),
    DemoPicture(
        "4-composition",
        "two references",
        "put the shape of image 1 on the left and the shape of image 2 on the right",
        4,
        ("1-text-to-image", "3-second-reference"),
    ),
)


def main() -> int:
    """Runs the demo; returns the exit code."""
    console = Console()
    try:
        run_demo(FOLDER, console, SuiteOptions())
    except CliError as error:
        error.show(console)
        return error.exit_code
    except OSError as error:
        CliError(f"{error.filename or 'A file'} cannot be written: {error.strerror}.").show(console)
        return FAILED
    except KeyboardInterrupt:
        console.print("Cancelled.")
        return INTERRUPTED
    return 0


def run_demo(folder: Path, console: Console, options: SuiteOptions) -> None:
    """Starts the suite, makes the pictures and the sheet, stops the suite.

    Raises:
        CliError: with what to do about it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console.print("Starting the four services ...")
    with Suite(options) as suite:
        wait_with_progress(suite, console)
        try:
            made = asyncio.run(make_pictures(suite.target, folder, console))
        except CliError:
            suite.raise_if_died()
            raise
    draw_sheet(folder)
    console.print(times_table(made))
    console.print(f"The pictures are in {folder}/, all of them on {folder / SHEET}.", highlight=False)
    klein = klein_command()
    console.print(
        f"Make your own: `{klein} up` in one terminal, `{klein} generate --help` in another.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def klein_command() -> str:
    """Returns how a shell in this folder finds the `klein` of this installation."""
    own = Path(sys.executable).with_name("klein")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m klein_services.cli.main"
    if shutil.which("klein") == str(own):
        return "klein"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


async def make_pictures(target: str, folder: Path, console: Console) -> dict[str, Generation]:
    """Makes all pictures of the demo and writes them into `folder`.

    Raises:
        CliError: a call failed.
    """
    made: dict[str, Generation] = {}
    async with connect(target) as stub:
        for picture in PICTURES:
            spec = picture.image_spec([made[name].images[0].data for name in picture.references])
            console.print(Text.assemble((f"{picture.title}: ", "bold"), picture.prompt))
            with GenerationProgress(console, keep=True) as progress:
                try:
                    made[picture.name] = await generate(
                        stub, spec, timeout_seconds=TIMEOUT_SECONDS, on_event=progress.handle
                    )
                except grpc.aio.AioRpcError as error:
                    raise call_error(error, target) from error
            picture.file_in(folder).write_bytes(made[picture.name].images[0].data)
    return made


def draw_sheet(folder: Path) -> None:
    """Draws the contact sheet in a process of its own, as this one has no image library.

    Raises:
        CliError: it failed.
    """
    pairs = [f"{picture.title}: {picture.prompt}={picture.file_in(folder)}" for picture in PICTURES]
    command = [sys.executable, "-m", "klein_core.pico.contact_sheet", str(folder / SHEET), *pairs]
    done = subprocess.run(command, env=inherited_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CliError(f"The contact sheet could not be drawn: {reason}.")


def times_table(made: Mapping[str, Generation]) -> Table:
    """How long each picture took in each stage, in milliseconds, as the orchestrator saw it."""
    table = Table("milliseconds", *OPERATIONS, "total", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, generation in made.items():
        summary = generation.summary
        took = {timing.operation: timing.call_duration.ToMilliseconds() for timing in summary.stage_timings}
        cells = [str(took.get(operation, "–")) for operation in OPERATIONS]
        table.add_row(name, *cells, str(summary.total_duration.ToMilliseconds()))
    return table


if __name__ == "__main__":
    sys.exit(main())

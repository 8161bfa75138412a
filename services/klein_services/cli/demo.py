"""`python -m klein_services.cli.demo`: starts the suite, makes images through its public API, stops it."""

from __future__ import annotations

import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klein_client import Generation, ImageOptions, KleinError
from klein_client.results import OPERATIONS, Collector
from klein_services.cli.errors import CliError, call_error
from klein_services.cli.exit_codes import FAILED, INTERRUPTED
from klein_services.cli.output import GenerationProgress
from klein_services.cli.process import inherited_environment
from klein_services.cli.startup import wait_with_progress
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.cli.target import open_client

FOLDER = Path("out")
SHEET = "contact-sheet.png"
MASK_PX = 128
"""Side of the masked edit's mask, that of pico's images."""
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class DemoImage:
    """One request of the demo."""

    name: str
    title: str
    prompt: str
    seed: int
    references: tuple[str, ...] = ()
    """Names of earlier images of the demo."""
    initial: str = ""
    """Name of the earlier image whose right half is painted over; empty for none."""

    def options(self, made: Mapping[str, Generation]) -> ImageOptions:
        """Returns the options of the request; `made` has the earlier images by name."""
        return ImageOptions(
            references=[made[name].image for name in self.references],
            initial_image=made[self.initial].image if self.initial else None,
            mask=right_half_mask(MASK_PX) if self.initial else None,
            seed=self.seed,
            format="png",
            timeout_seconds=TIMEOUT_SECONDS,
        )

    def file_in(self, folder: Path) -> Path:
        return folder / f"{self.name}.png"


IMAGES = (
    DemoImage("1-text-to-image", "text to image", "a large red heart on a yellow background", 1),
    DemoImage("2-edit", "edit", "make the background blue", 2, ("1-text-to-image",)),
    DemoImage("3-masked-edit", "masked edit", "make the heart green", 5, initial="1-text-to-image"),
    DemoImage("4-second-reference", "text to image", "a green star on a white background", 3),
    DemoImage(
        "5-composition",
        "two references",
        "put the shape of image 1 on the left and the shape of image 2 on the right",
        4,
        ("1-text-to-image", "4-second-reference"),
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
    """Starts the suite, makes the images and the contact sheet, stops the suite.

    Raises:
        CliError: the suite cannot start, a call failed, or the sheet cannot be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console.print("Starting the four services ...")
    with Suite(options) as suite:
        wait_with_progress(suite, console)
        try:
            made = make_images(suite.target, folder, console)
        except CliError:
            suite.raise_if_died()
            raise
    draw_sheet(folder)
    console.print(times_table(made))
    console.print(f"The images are in {folder}/, all of them on {folder / SHEET}.", highlight=False)
    klein = klein_command()
    console.print(
        f"Make your own: `{klein} up` in one terminal, `{klein} generate --help` in another.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def klein_command() -> str:
    """Returns the command by which a shell in this folder runs the `klein` of this installation."""
    own = Path(sys.executable).with_name("klein")
    if not own.exists():
        return f"{shlex.quote(sys.executable)} -m klein_services.cli.main"
    if shutil.which("klein") == str(own):
        return "klein"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


def make_images(target: str, folder: Path, console: Console) -> dict[str, Generation]:
    """Makes all images of the demo and writes them to `folder`.

    Raises:
        CliError: a call failed.
    """
    made: dict[str, Generation] = {}
    with open_client(target) as client:
        for image in IMAGES:
            collector = Collector()
            console.print(Text.assemble((f"{image.title}: ", "bold"), image.prompt))
            with GenerationProgress(console, keep=True) as progress:
                try:
                    with client.stream(image.prompt, **image.options(made)) as events:
                        for event in events:
                            progress.handle(event)
                            collector.add(event)
                    made[image.name] = collector.generation()
                except KleinError as error:
                    raise call_error(error, target) from error
            made[image.name].save(image.file_in(folder))
    return made


def right_half_mask(side_px: int) -> bytes:
    """Returns a square mask whose right half is white, as a BMP file of one bit a pixel.

    Args:
        side_px: a multiple of 64, so that each half of a row is a number of 32-bit words.
    """
    row = bytes(side_px // 16) + b"\xff" * (side_px // 16)
    pixels, palette = row * side_px, b"\0\0\0\0\xff\xff\xff\0"
    offset = 54 + len(palette)
    head = struct.pack("<2sIII", b"BM", offset + len(pixels), 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, side_px, side_px, 1, 1, 0, len(pixels), 0, 0, 2, 0)
    return head + info + palette + pixels


def draw_sheet(folder: Path) -> None:
    """Draws the contact sheet in another process, because this one imports no image library.

    Raises:
        CliError: it failed.
    """
    pairs = [f"{image.title}: {image.prompt}={image.file_in(folder)}" for image in IMAGES]
    command = [sys.executable, "-m", "klein_core.pico.contact_sheet", str(folder / SHEET), *pairs]
    done = subprocess.run(command, env=inherited_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CliError(f"The contact sheet could not be drawn: {reason}.")


def times_table(made: Mapping[str, Generation]) -> Table:
    """Returns the milliseconds of each image in each stage, as the orchestrator measured them."""
    # Spaces, at which a narrow terminal breaks the line.
    columns = [operation.replace("-", " ") for operation in OPERATIONS]
    table = Table("milliseconds", *columns, "total", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, generation in made.items():
        summary = generation.summary
        took = {timing.operation: round(timing.call_seconds * 1000) for timing in summary.timings}
        cells = [str(took.get(operation, "–")) for operation in OPERATIONS]
        table.add_row(name, *cells, str(round(summary.total_seconds * 1000)))
    return table


if __name__ == "__main__":
    sys.exit(main())

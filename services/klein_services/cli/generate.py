"""`klein generate`: one request, from the command line's words to files."""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import grpc
from rich.console import Console

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_services.cli.client import Generation, connect, generate
from klein_services.cli.errors import CliError, call_error
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.output import GenerationProgress

STANDARD_OUTPUT = Path("-")
_MOST_IMAGES = 64
"""Of one request, whatever a server's settings."""
_FORMATS = {
    "png": image_pb2.IMAGE_FORMAT_PNG,
    "jpeg": image_pb2.IMAGE_FORMAT_JPEG,
    "webp": image_pb2.IMAGE_FORMAT_WEBP,
}
_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What the command line said; `None` leaves a choice to the server."""

    prompt: str
    output: Path
    references: tuple[Path, ...] = ()
    negative_prompt: str | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    count: int | None = None
    image_format: str | None = None
    quality: int | None = None
    model: str = ""
    adapters: tuple[str, ...] = ()
    """NAME or NAME:SCALE each."""

    def image_spec(self) -> api.ImageSpec:
        """The request. Limits are the server's to check, as only it knows them.

        Raises:
            CliError: a reference cannot be read, a size or an adapter cannot be understood, a number or a text fits no
                request.
        """
        width_px, height_px = parse_size(self.size) if self.size else (None, None)
        try:
            return api.ImageSpec(
                model=self.model,
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                references=[_read(path) for path in self.references],
                width_px=width_px,
                height_px=height_px,
                step_count=self.steps,
                guidance_scale=self.guidance,
                seed=self.seed,
                image_count=self.count,
                format=_FORMATS[self.format_name()],
                quality=self.quality,
                priority=image_pb2.PRIORITY_INTERACTIVE,
                adapters=[parse_adapter(text) for text in self.adapters],
            )
        except UnicodeEncodeError as error:
            raise CliError("The words given are not valid UTF-8.", exit_code=MISUSED) from error
        except ValueError as error:
            raise CliError(f"A number is far outside its limits: {error}.", exit_code=MISUSED) from error

    def format_name(self) -> str:
        """The format asked for, else the one that the file's suffix names."""
        if self.image_format:
            return self.image_format
        if self.output == STANDARD_OUTPUT:
            return "png"
        try:
            return _SUFFIXES[self.output.suffix.lower()]
        except KeyError:
            raise CliError(
                f"{self.output} does not tell the format.",
                f"End it in {', '.join(_SUFFIXES)}, or give --format.",
                MISUSED,
            ) from None

    def check_output(self) -> None:
        """Raises CliError when what will be made could not be written, before work is spent on it."""
        if self.output == STANDARD_OUTPUT:
            if (self.count or 1) > 1:
                raise CliError("Only one image fits on standard output.", "Name a file with -o.", MISUSED)
            return
        # A count beyond what any server allows is the server's to refuse.
        for index in range(min(self.count or 1, _MOST_IMAGES)):
            _check_writable(self.file_of(index))

    def file_of(self, index: int) -> Path:
        """Where image `index` goes: FILE, or FILE-1, FILE-2 … when there are several."""
        if (self.count or 1) == 1:
            return self.output
        return self.output.with_name(f"{self.output.stem}-{index + 1}{self.output.suffix}")


def run_generate(options: GenerateOptions, target: str, timeout_seconds: float, console: Console) -> None:
    """Makes the images, shows how it goes, writes the files, prints a line about them.

    Raises:
        CliError: with what to do about it.
    """
    options.check_output()
    spec = options.image_spec()
    generation = asyncio.run(_generate(spec, target, timeout_seconds, console))
    files, failures = _write_all(options, generation)
    out = console if options.output == STANDARD_OUTPUT else Console()
    # Also after a failure: its seeds make the same images again.
    out.print(summary_line(generation, files), highlight=False, soft_wrap=True, markup=False)
    if generation.summary.prompt_truncated:
        console.print("The prompt was too long: its end was cut off.", style="yellow")
    if failures:
        raise failures[0]


async def _generate(spec: api.ImageSpec, target: str, timeout_seconds: float, console: Console) -> Generation:
    with GenerationProgress(console) as progress:
        try:
            async with connect(target) as stub:
                return await generate(stub, spec, timeout_seconds=timeout_seconds, on_event=progress.handle)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, target) from error


def summary_line(generation: Generation, files: list[str]) -> str:
    """Files, seeds, size, and how long each stage took."""
    images, summary = generation.images, generation.summary
    seeds = ", ".join(str(image.seed) for image in images)
    size = " ".join(dict.fromkeys(f"{image.width_px}×{image.height_px}" for image in images))
    timings = " · ".join(
        f"{timing.operation} {timing.call_duration.ToMilliseconds()} ms" for timing in summary.stage_timings
    )
    total_seconds = summary.total_duration.ToMilliseconds() / 1000
    word = "seed" if len(images) == 1 else "seeds"
    where = ", ".join(files) or "No file"
    return f"{where}: {size}, {word} {seeds}, {summary.model}, {total_seconds:.2f} s ({timings})"


def parse_size(text: str) -> tuple[int, int]:
    """Reads `1024x768`, or `1024` for a square.

    Raises:
        CliError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", text.strip())
    if match is None:
        raise CliError(f"--size {text!r} is no size.", "Write WIDTHxHEIGHT, for example 1024x768.", MISUSED)
    width_px = int(match[1])
    return width_px, int(match[2]) if match[2] else width_px


def parse_adapter(text: str) -> image_pb2.Adapter:
    """Reads `NAME` or `NAME:SCALE`.

    Raises:
        CliError: the scale is no number.
    """
    name, colon, scale = text.partition(":")
    try:
        return image_pb2.Adapter(name=name, scale=float(scale) if colon else None)
    except ValueError:
        raise CliError(
            f"--adapter {text!r} has no number after the colon.", "Write NAME or NAME:0.8.", MISUSED
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CliError(
            f"The reference {path} cannot be read: {error.strerror}.", exit_code=MISUSED
        ) from error


def _check_writable(path: Path) -> None:
    """Tries to write without leaving a trace.

    Raises:
        CliError: it cannot be done.
    """
    if path.is_dir():
        raise CliError(f"{path} is a folder.", "Name a file with -o.", MISUSED)
    if not path.parent.is_dir():
        raise CliError(f"The folder {path.parent} does not exist.", "Make it first.", MISUSED)
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}.", exit_code=MISUSED) from error


def _write_all(options: GenerateOptions, generation: Generation) -> tuple[list[str], list[CliError]]:
    """Writes what can be written; returns the files' names and what went wrong with others."""
    files: list[str] = []
    failures: list[CliError] = []
    for image in generation.images:
        path = options.file_of(image.index)
        try:
            _write(path, image.data)
            files.append(str(path))
        except OSError as error:
            failures.append(CliError(f"{path} cannot be written: {error.strerror}."))
    return files, failures


def _write(path: Path, data: bytes) -> None:
    if path == STANDARD_OUTPUT:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        path.write_bytes(data)

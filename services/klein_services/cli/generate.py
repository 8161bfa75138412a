"""`klein generate`: one request, from the command line's options to image files."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from klein_client import Generation, ImageOptions, KleinError
from klein_client.results import PROMPT_TRUNCATED, Collector
from klein_services.cli.errors import CliError, call_error
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.image_files import STANDARD_STREAM, ImageFiles
from klein_services.cli.output import GenerationProgress
from klein_services.cli.status import fetch_status, model_text
from klein_services.cli.target import Target, open_client

_DESCRIPTION_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of the command line; `None` leaves a choice to the server."""

    prompt: str
    """The prompt; `-` reads it from standard input."""
    output: Path | None = None
    references: tuple[Path, ...] = ()
    """Image files; `-` reads one from standard input."""
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
    embed_prompt: bool = False
    initial: Path | None = None
    """Image file that is painted over; `-` reads it from standard input, as with the mask."""
    mask: Path | None = None
    mask_alpha: bool = False
    strength: float | None = None
    mask_padding: int | None = None
    expand: str | None = None
    """LEFT,TOP,RIGHT,BOTTOM in pixels."""
    no_preserve: bool = False
    force: bool = False
    as_json: bool = False

    @property
    def reference_names(self) -> tuple[str, ...]:
        """Names of the references for messages."""
        return tuple("standard input" if path == STANDARD_STREAM else str(path) for path in self.references)

    def request(self) -> tuple[str, ImageOptions]:
        """Returns the prompt and the client's options. Only the server knows its limits, so it checks them.

        Raises:
            CliError: an image file cannot be read, or a size, an expansion, an adapter or the prompt cannot be parsed.
        """
        inputs = [*self.references, self.initial, self.mask, Path(self.prompt)]
        if inputs.count(STANDARD_STREAM) > 1:
            raise CliError("Standard input can be read only once.", "Give `-` only once.", MISUSED)
        width_px, height_px = parse_size(self.size) if self.size else (None, None)
        prompt = self.prompt
        if prompt == "-":
            try:
                prompt = sys.stdin.buffer.read().decode().rstrip("\r\n")
            except UnicodeError as error:
                raise CliError("The prompt or a name is not valid UTF-8.", exit_code=MISUSED) from error
        return prompt, ImageOptions(
            model=self.model or None,
            negative_prompt=self.negative_prompt,
            references=[_read("--reference", path) for path in self.references],
            width=width_px,
            height=height_px,
            steps=self.steps,
            guidance_scale=self.guidance,
            seed=self.seed,
            count=self.count,
            quality=self.quality,
            priority="interactive",
            adapters=[parse_adapter(text) for text in self.adapters],
            embed_prompt=self.embed_prompt or None,
            initial_image=None if self.initial is None else _read("--initial", self.initial),
            mask=None if self.mask is None else _read("--mask", self.mask),
            mask_is_alpha=self.mask_alpha or None,
            strength=self.strength,
            mask_padding=self.mask_padding,
            expand=parse_expansion(self.expand) if self.expand else None,
            preserve_unmasked=False if self.no_preserve else None,
        )


def run_generate(
    options: GenerateOptions, target: Target | str, timeout_seconds: float, console: Console, token: str = ""
) -> None:
    """Requests the images, shows progress, writes the files, prints a line or a JSON object about them.

    Raises:
        CliError: an option cannot be used, the call failed, or a file could not be written.
    """
    files = ImageFiles(options.output, options.image_format, options.count or 1, force=options.force)
    if options.as_json and files.is_standard_output:
        raise CliError("--json and -o - both need standard output.", "Name a file with -o.", MISUSED)
    prompt, request = options.request()
    request["format"] = files.format_name
    request["timeout_seconds"] = timeout_seconds
    collector = Collector()
    with GenerationProgress(console) as progress:
        try:
            with open_client(target, token) as client, client.stream(prompt, **request) as events:
                for event in events:
                    progress.handle(event)
                    collector.add(event)
            generation = collector.generation()
        except KleinError as error:
            raise call_error(error, target, options.reference_names) from error
    written, failures = _write_all(files, generation)
    # Also after a failure: its seeds make the same images again.
    if options.as_json:
        sys.stdout.write(json.dumps(as_json(generation, written)) + "\n")
    else:
        out = console if files.is_standard_output else Console()
        out.print(summary_line(generation, written), highlight=False, soft_wrap=True, markup=False)
    for warning in generation.warnings:
        console.print(Text(f"Warning: {warning}", "yellow"), soft_wrap=True)
    if set(generation.warnings) - {PROMPT_TRUNCATED}:
        name = generation.summary.model
        try:
            models = fetch_status(target, _DESCRIPTION_SECONDS, token).models
            about = next((model_text(model) for model in models if model.name == name), name)
        except CliError:
            # The images are made and written; a missing description is no failure.
            about = f"`klein status --target {target}` describes the model."
        console.print(Text(about), soft_wrap=True)
    if failures:
        raise failures[0]


def _write_all(files: ImageFiles, generation: Generation) -> tuple[list[str | None], list[CliError]]:
    """Writes each image; returns the files' names, `None` for those that failed, and the failures."""
    names: list[str | None] = []
    failures: list[CliError] = []
    for image in generation.images:
        try:
            names.append(files.write(image.index, image.data))
        except CliError as error:
            names.append(None)
            failures.append(error)
    return names, failures


def summary_line(generation: Generation, names: list[str | None]) -> str:
    """Returns files, size, seeds, model, and the milliseconds of each operation in a request's order."""
    images, summary = generation.images, generation.summary
    seeds = ", ".join(str(image.seed) for image in images)
    size = " ".join(dict.fromkeys(f"{image.width_px}×{image.height_px}" for image in images))
    timings = " · ".join(
        f"{timing.operation} {_milliseconds(timing.call_seconds)} ms" for timing in summary.timings
    )
    word = "seed" if len(images) == 1 else "seeds"
    where = ", ".join(name for name in names if name is not None) or "No file"
    return f"{where}: {size}, {word} {seeds}, {summary.model}, {summary.total_seconds:.2f} s ({timings})"


def as_json(generation: Generation, names: list[str | None]) -> dict[str, object]:
    """Returns the object that `--json` prints; files and seeds are in the images' order."""
    images, summary = generation.images, generation.summary
    return {
        "files": names,
        "seeds": [image.seed for image in images],
        "sizes_px": [[image.width_px, image.height_px] for image in images],
        "model": summary.model,
        "flow": summary.flow,
        "request_id": summary.request_id,
        "step_count": summary.step_count,
        "guidance_scale": summary.guidance_scale,
        "prompt_token_count": summary.prompt_token_count,
        "timings": [
            {
                "stage": timing.stage,
                "operation": timing.operation,
                "call_count": timing.call_count,
                "queue_ms": _milliseconds(timing.queue_seconds),
                "compute_ms": _milliseconds(timing.compute_seconds),
                "call_ms": _milliseconds(timing.call_seconds),
            }
            for timing in summary.timings
        ],
        "total_ms": _milliseconds(summary.total_seconds),
        "warnings": list(summary.warnings),
    }


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def parse_size(text: str) -> tuple[int, int]:
    """Parses `1024x768`, or `1024` for a square, into width and height.

    Raises:
        CliError: the text is neither.
    """
    match = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", text.strip())
    if match is None:
        raise CliError(
            f"--size {text!r} is not a size.", "Write WIDTHxHEIGHT, for example 1024x768.", MISUSED
        )
    width_px = int(match[1])
    return width_px, int(match[2]) if match[2] else width_px


def parse_expansion(text: str) -> tuple[int, int, int, int]:
    """Parses `LEFT,TOP,RIGHT,BOTTOM`, each a number of pixels.

    Raises:
        CliError: the text is anything else.
    """
    sides = text.split(",")
    if len(sides) != 4 or not all(re.fullmatch(r"\s*\d{1,9}\s*", side, re.ASCII) for side in sides):
        raise CliError(
            f"--expand {text!r} is not four numbers of pixels.",
            "Write LEFT,TOP,RIGHT,BOTTOM, for example 0,0,256,0.",
            MISUSED,
        )
    left, top, right, bottom = map(int, sides)
    return left, top, right, bottom


def parse_adapter(text: str) -> tuple[str, float | None]:
    """Parses `NAME` or `NAME:SCALE`.

    Raises:
        CliError: the scale is not a number.
    """
    name, colon, scale = text.partition(":")
    try:
        return name, float(scale) if colon else None
    except ValueError:
        raise CliError(
            f"--adapter {text!r} has no number after the colon.", "Write NAME or NAME:0.8.", MISUSED
        ) from None


def _read(flag: str, path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == STANDARD_STREAM else path.read_bytes()
    except OSError as error:
        raise CliError(f"{flag} {path} cannot be read: {error.strerror}.", exit_code=MISUSED) from error

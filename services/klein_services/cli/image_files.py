"""Files that generated images go to: their names, their format, and checks before work is spent on them."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryFile

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

STANDARD_STREAM = Path("-")
"""Standard input where a file is read, standard output where one is written."""
DEFAULT_STEM = "klein"
DEFAULT_FORMAT = "png"
_FORMAT_OF_SUFFIX = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_MOST_IMAGES = 64
"""Files that are checked. No server makes more images for one request."""


class ImageFiles:
    """Destination of the images of one request.

    Args:
        output: `--output`; `-` is standard output. `None` numbers files klein-1, klein-2 … in the current folder,
            from the first number after which all are free.
        image_format: `--format`: png, jpeg or webp; `None` takes the one of the output's suffix, else PNG.
        image_count: `--count`.
        force: whether existing files are replaced.

    Raises:
        CliError: the images could not be written there.
    """

    def __init__(
        self, output: Path | None, image_format: str | None, image_count: int = 1, *, force: bool = False
    ) -> None:
        self._count = image_count
        self._force = force
        self._output = output
        if output is not None and output.is_dir():
            raise _is_folder(output)
        self.format_name = _format_name(output, image_format)
        self._first_number = 1
        if self.is_standard_output:
            if image_count > 1:
                raise CliError("Only one image fits on standard output.", "Name a file with -o.", MISUSED)
            if sys.stdout.isatty():
                raise CliError(
                    "Standard output is a terminal, which cannot show an image file.",
                    "Name a file with -o, or pipe the output: klein generate … -o - | …",
                    MISUSED,
                )
            return
        # A count beyond every server's limit is refused by the server.
        indices = range(min(image_count, _MOST_IMAGES))
        if output is None:
            while any(self.path_of(index).exists() for index in indices):
                self._first_number += 1
        for index in indices:
            _check_writable(self.path_of(index), force=force)

    @property
    def is_standard_output(self) -> bool:
        return self._output == STANDARD_STREAM

    def path_of(self, index: int) -> Path:
        """Returns the file of image `index`: FILE, or FILE-1, FILE-2 … when there are several."""
        if self._output is None:
            return Path(f"{DEFAULT_STEM}-{self._first_number + index}.{self.format_name}")
        if self._count == 1:
            return self._output
        return self._output.with_name(f"{self._output.stem}-{index + 1}{self._output.suffix}")

    def write(self, index: int, data: bytes) -> str:
        """Writes image `index` and returns the file's name.

        Raises:
            CliError: it cannot be written, or a file of that name has appeared meanwhile.
        """
        path = self.path_of(index)
        try:
            if self.is_standard_output:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
                return str(path)
            while self._output is None and path.exists():
                # Another command has taken the number meanwhile.
                self._first_number += 1
                path = self.path_of(index)
            with path.open("wb" if self._force else "xb") as file:
                file.write(data)
        except OSError as error:
            raise CliError(f"{path} cannot be written: {error.strerror}.") from error
        return str(path)


def _format_name(output: Path | None, image_format: str | None) -> str:
    """Returns the format; raises CliError when the file's suffix names none or another than `--format`."""
    if output is None or output == STANDARD_STREAM:
        return image_format or DEFAULT_FORMAT
    suffix = output.suffix.lower()
    of_suffix = _FORMAT_OF_SUFFIX.get(suffix)
    if image_format and of_suffix not in (None, image_format):
        raise CliError(
            f"-o {output} ends in {output.suffix}, but --format is {image_format}.",
            "Leave --format out, or give the file the suffix of that format.",
            MISUSED,
        )
    if image_format or of_suffix:
        return image_format or str(of_suffix)
    raise CliError(
        f"The name {output} does not show the format.",
        f"End it in {', '.join(_FORMAT_OF_SUFFIX)}, or give --format.",
        MISUSED,
    )


def _is_folder(path: Path) -> CliError:
    return CliError(f"{path} is a folder.", "Name a file with -o.", MISUSED)


def _check_writable(path: Path, *, force: bool) -> None:
    """Tries to write without leaving a trace; raises CliError when that fails."""
    if path.is_dir():
        raise _is_folder(path)
    if not path.parent.is_dir():
        raise CliError(f"The folder {path.parent} does not exist.", "Make it first.", MISUSED)
    if path.exists() and not force:
        raise CliError(
            f"{path} exists already.", "--force replaces it; or name another file with -o.", MISUSED
        )
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror}.", exit_code=MISUSED) from error

"""`python -m klein_core.pico.contact_sheet SHEET CAPTION=FILE …`: several pictures on one page."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURE_PX = 256
MARGIN_PX = 24
CAPTION_PX = 76
CAPTION_COLUMNS = 30
COLUMN_LIMIT = 4
_PAPER = (255, 255, 255)
_INK = (40, 40, 44)


def contact_sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Draws pictures side by side, at most four in a row, each with its caption below.

    Args:
        pictures: caption and picture of each, at least one.
    """
    column_count = min(len(pictures), COLUMN_LIMIT)
    row_count = -(-len(pictures) // COLUMN_LIMIT)
    cell_width, cell_height = PICTURE_PX + MARGIN_PX, PICTURE_PX + CAPTION_PX
    size = (column_count * cell_width + MARGIN_PX, row_count * cell_height + MARGIN_PX)
    sheet = Image.new("RGB", size, _PAPER)
    for index, (caption, picture) in enumerate(pictures):
        row, column = divmod(index, COLUMN_LIMIT)
        _draw_cell(sheet, MARGIN_PX + column * cell_width, MARGIN_PX + row * cell_height, caption, picture)
    return sheet


def _draw_cell(sheet: Image.Image, left: int, top: int, caption: str, picture: Image.Image) -> None:
    scaled = picture.convert("RGB")
    factor = PICTURE_PX / max(scaled.size)
    scaled = scaled.resize(
        (round(scaled.width * factor), round(scaled.height * factor)), Image.Resampling.LANCZOS
    )
    sheet.paste(scaled, (left, top + PICTURE_PX - scaled.height))
    draw = ImageDraw.Draw(sheet)
    frame = (left - 1, top + PICTURE_PX - scaled.height - 1, left + scaled.width, top + PICTURE_PX)
    draw.rectangle(frame, outline=_INK)
    text = textwrap.fill(caption, CAPTION_COLUMNS)
    draw.multiline_text((left, top + PICTURE_PX + 8), text, _INK, ImageFont.load_default(16), spacing=4)


def main(arguments: Sequence[str]) -> int:
    """Reads the pictures, writes the sheet."""
    sheet_file, *pairs = arguments
    pictures = []
    for pair in pairs:
        caption, _, file = pair.rpartition("=")
        with Image.open(file) as picture:
            pictures.append((caption, picture.copy()))
    contact_sheet(pictures).save(Path(sheet_file))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

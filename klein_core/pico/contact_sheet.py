"""`python -m klein_core.pico.contact_sheet SHEET CAPTION=FILE …`: draws several images on one sheet."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

IMAGE_PX = 256
MARGIN_PX = 24
CAPTION_PX = 76
CAPTION_COLUMNS = 30
COLUMN_LIMIT = 3
_PAPER = (255, 255, 255)
_INK = (40, 40, 44)


def contact_sheet(images: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Draws images side by side, at most three in a row, each with its caption below.

    Args:
        images: caption and image of each, at least one.
    """
    column_count = min(len(images), COLUMN_LIMIT)
    row_count = -(-len(images) // COLUMN_LIMIT)
    cell_width, cell_height = IMAGE_PX + MARGIN_PX, IMAGE_PX + CAPTION_PX
    size = (column_count * cell_width + MARGIN_PX, row_count * cell_height + MARGIN_PX)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(images):
        row, column = divmod(index, COLUMN_LIMIT)
        left, bottom = MARGIN_PX + column * cell_width, MARGIN_PX + row * cell_height + IMAGE_PX
        factor = IMAGE_PX / max(image.size)
        width, height = round(image.width * factor), round(image.height * factor)
        scaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(scaled, (left, bottom - height))
        draw.rectangle((left - 1, bottom - height - 1, left + width, bottom), outline=_INK)
        text = textwrap.fill(caption, CAPTION_COLUMNS)
        draw.multiline_text((left, bottom + 8), text, _INK, ImageFont.load_default(16), spacing=4)
    return sheet


def main(arguments: Sequence[str]) -> int:
    """Reads the images and writes the sheet; returns the exit code."""
    sheet_file, *pairs = arguments
    images = []
    for pair in pairs:
        caption, _, file = pair.rpartition("=")
        with Image.open(file) as image:
            images.append((caption, image.copy()))
    contact_sheet(images).save(Path(sheet_file))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

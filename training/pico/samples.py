"""Sheet of samples, all with seed 0: `python -m training.pico.samples`."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from klein_core.pico import WEIGHTS
from training.pico.painter import Painter, PaintRequest, Picture
from training.pico.world import Background, Item, Scene, render

SHEET = WEIGHTS.parent / "samples.png"
_SIDE = 128
_CAPTION_PX = 46
_GAP_PX = 12
_COLUMNS = 8

_RED_CIRCLE = Scene(Background.plain("blue"), (Item("circle", "red"),))
_STAR = Scene(Background.plain("black"), (Item("star", "yellow", "left", "large"),))
_PAIR = Scene(Background.plain("white"), (Item("heart", "red", "left"), Item("ring", "green", "right")))
_SQUARE = Scene(Background("orange", "purple"), (Item("square", "white", "center", "large"),))

PROMPTS: tuple[tuple[str, tuple[Scene, ...]], ...] = (
    ("a red circle on a blue background", ()),
    ("a large yellow star in the top left corner on a black background", ()),
    ("a small green heart at the bottom on white", ()),
    ("a white ring on a gradient from blue to purple", ()),
    ("an orange triangle above a purple square", ()),
    ("a red heart to the left of a green ring on yellow", ()),
    ("a huge black square on the right on an orange background", ()),
    ("a gradient from black to red", ()),
    ("make it green", (_RED_CIRCLE,)),
    ("turn the circle into a star", (_RED_CIRCLE,)),
    ("move it to the bottom right corner", (_RED_CIRCLE,)),
    ("make the background a gradient from orange to purple", (_STAR,)),
    ("make the star smaller", (_STAR,)),
    ("add a small white ring on the right", (_STAR,)),
    ("remove the heart", (_PAIR,)),
    ("paint the ring blue", (_PAIR,)),
    ("put the object of image 1 on the background of image 2", (_RED_CIRCLE, _SQUARE)),
    ("the shape of image 1 in the color of image 2", (_RED_CIRCLE, _STAR)),
    ("put the object of image 1 on the left and the object of image 2 on the right", (_RED_CIRCLE, _STAR)),
    ("the object of image 1 above the object of image 2", (_STAR, _SQUARE)),
)


@dataclass(frozen=True)
class _Cell:
    pictures: tuple[Picture, ...]
    caption: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.pico.samples", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint folder")
    parser.add_argument("--output", type=Path, default=SHEET, help="PNG file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    paint_sheet(Painter(arguments.weights)).save(arguments.output, optimize=True)


def paint_sheet(painter: Painter) -> Image.Image:
    """Paints every sample with seed 0 and lays them out, references to the left of their result."""
    requests = [
        PaintRequest(prompt, _SIDE, _SIDE, 0, references, ((_SIDE, _SIDE),) * len(references))
        for prompt, references in PROMPTS
    ]
    cells = [
        _Cell((*(render(scene, _SIDE, _SIDE) for scene in references), picture), prompt)
        for (prompt, references), picture in zip(PROMPTS, painter.paint(requests), strict=True)
    ]
    return _laid_out(_rows(cells))


def _rows(cells: list[_Cell]) -> list[list[_Cell]]:
    rows: list[list[_Cell]] = [[]]
    for cell in cells:
        used = sum(len(other.pictures) for other in rows[-1])
        starts_new_flow = bool(rows[-1]) and len(rows[-1][0].pictures) != len(cell.pictures)
        if used + len(cell.pictures) > _COLUMNS or starts_new_flow:
            rows.append([])
        rows[-1].append(cell)
    return rows


def _laid_out(rows: list[list[_Cell]]) -> Image.Image:
    pitch = _SIDE + _GAP_PX
    sheet = Image.new(
        "RGB", (_COLUMNS * pitch + _GAP_PX, len(rows) * (pitch + _CAPTION_PX) + _GAP_PX), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, row in enumerate(rows):
        column, top = 0, _GAP_PX + number * (pitch + _CAPTION_PX)
        for cell in row:
            left = _GAP_PX + column * pitch
            for index, picture in enumerate(cell.pictures):
                at = left + index * pitch
                sheet.paste(Image.fromarray(picture), (at, top))
                draw.rectangle((at - 1, top - 1, at + _SIDE, top + _SIDE), outline=(190, 190, 190))
            width = 22 * len(cell.pictures)
            draw.text((left, top + _SIDE + 3), textwrap.fill(cell.caption, width), (40, 40, 44), font)
            column += len(cell.pictures)
    return sheet


if __name__ == "__main__":
    main()

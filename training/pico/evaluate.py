"""Evaluation of pico on prompts with known right images: `python -m training.pico.evaluate`.

Scenes, prompts and noise come from fixed seeds that training does not use. `measure` defines "right".
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from klein_core.pico import WEIGHTS
from training.pico.measure import Judgment, judge
from training.pico.painter import Painter, PaintRequest
from training.pico.scenes import any_background, any_item, any_scene, double_scene
from training.pico.tasks import (
    EDIT_KINDS,
    TWO_REFERENCE_KINDS,
    Task,
    edit,
    text_to_image,
    two_references,
)
from training.pico.world import Background, Item, Scene, is_held_out, render

_HERE = Path(__file__).resolve().parent
PARAPHRASES = _HERE / "paraphrases.json"
BLIND_PARAPHRASES = _HERE / "blind_paraphrases.json"
"""Written from a description of the world alone, by an author who had seen neither templates nor other prompts."""
USUAL: tuple[int, int] = (128, 128)
SIZES = ((64, 64), (96, 96), (160, 160), (192, 192), (256, 256), (64, 128), (128, 64), (192, 128), (128, 256),
         (256, 96), (112, 208), (240, 176))  # fmt: skip
OTHER_REFERENCES = ((64, 64), (128, 192), (192, 192), (96, 96), (256, 128))
COLUMNS = ("background", "color", "shape", "place", "size", "everything", "overlap")
PARTS = ("all", "words", "references", "rest")
_SEED = 20_260_000


@dataclass(frozen=True)
class Row:
    """One line of the table: shares of right pictures, and the mean overlap."""

    name: str
    count: int
    background: float
    color: float
    shape: float
    place: float
    size: float
    everything: float
    overlap: float

    @classmethod
    def of(cls, name: str, judgments: Sequence[Judgment]) -> Row:
        shares = {
            column: sum(float(getattr(judgment, column)) for judgment in judgments) / len(judgments)
            for column in COLUMNS
        }
        return cls(name, len(judgments), **shares)


def held_out_scene(rng: random.Random) -> Scene:
    """Draws one item of a combination that training never sees."""
    while True:
        background = any_background(rng)
        item = any_item(rng, background)
        if is_held_out(item):
            return Scene(background, (item,))


class Evaluation:
    """Paints and judges; every group's scenes depend on the group's name and the count only."""

    def __init__(self, painter: Painter, report: Callable[[Row], None]) -> None:
        self._painter = painter
        self._report = report
        self.rows: list[Row] = []

    def add(self, name: str, judgments: Sequence[Judgment]) -> None:
        row = Row.of(name, judgments)
        self.rows.append(row)
        self._report(row)

    def tasks(
        self,
        make: Callable[[random.Random], Task],
        name: str,
        count: int,
        size: tuple[int, int] = USUAL,
        reference_size: tuple[int, int] | None = None,
    ) -> list[Judgment]:
        """Paints `count` tasks at one size; references have the same size unless another is given."""
        rng = _random(name)
        drawn = [make(rng) for _ in range(count)]
        requests = [
            PaintRequest(
                task.prompt,
                *size,
                seed=_SEED + index,
                references=task.references,
                reference_sizes=(reference_size or size,) * len(task.references),
            )
            for index, task in enumerate(drawn)
        ]
        pictures = self._painter.paint(requests)
        return [judge(picture, task.target) for picture, task in zip(pictures, drawn, strict=True)]

    def text_to_image(self, count: int) -> None:
        """Adds two rows whose prompts are templates', and two in free words, which are harder to read."""
        for wording, free_share in (("", 0.0), (", in free words", 1.0)):
            for title, draw in (("one object, held-out", held_out_scene), ("two objects", double_scene)):
                judged = self.tasks(
                    lambda rng, draw=draw, share=free_share: text_to_image(rng, draw(rng), share),  # type: ignore[misc]
                    title,
                    count,
                )
                self.add(title + wording, judged)

    def kinds(
        self, title: str, kinds: Sequence[str], make: Callable[[str, random.Random], Task], count: int
    ) -> None:
        """Adds one row for each kind and one for all of them."""
        everything: list[Judgment] = []
        for kind in kinds:
            judged = self.tasks(lambda rng, kind=kind: make(kind, rng), kind, -(-count // len(kinds)))  # type: ignore[misc]
            self.add(f"  {kind}", judged)
            everything += judged
        self.add(title, everything)

    def sizes(self, count: int) -> None:
        """Adds a row for each size, of tasks as `any_task` draws them."""
        for size in SIZES:
            name = f"{size[0]}x{size[1]}"
            self.add(f"  {name}", self.tasks(any_task, name, -(-count // len(SIZES)), size))

    def other_references(self, count: int) -> None:
        judged: list[Judgment] = []
        for size in OTHER_REFERENCES:
            name = f"reference {size}"
            judged += self.tasks(any_edit, name, -(-count // len(OTHER_REFERENCES)), USUAL, size)
        self.add("references of another size", judged)

    def paraphrases(self, title: str, path: Path, count: int) -> None:
        """Paints every hand-written prompt of a file with several seeds, about `count` pictures in all."""
        written = [paraphrase(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        drawn = [task for task in written for _ in range(max(1, count // len(written)))]
        requests = [
            PaintRequest(task.prompt, *USUAL, seed=_SEED + index, references=task.references,
                  reference_sizes=(USUAL,) * len(task.references))
            for index, task in enumerate(drawn)
        ]  # fmt: skip
        judged = [judge(p, task.target) for p, task in zip(self._painter.paint(requests), drawn, strict=True)]
        self.add(f"{title} ({len(written)} hand-written)", judged)

    def controls(self, count: int) -> None:
        """Judges true pictures, and true pictures that went through the autoencoder."""
        rng = _random("controls")
        scenes = [any_scene(rng) for _ in range(count)]
        pictures = [render(scene, *USUAL) for scene in scenes]
        self.add("control: true images", [judge(p, s) for p, s in zip(pictures, scenes, strict=True)])
        passed = [self._painter.round_trip(picture) for picture in pictures]
        self.add("control: VAE round trip", [judge(p, s) for p, s in zip(passed, scenes, strict=True)])


def any_edit(rng: random.Random) -> Task:
    """Draws an edit or a two-reference task of any kind."""
    if rng.random() < 0.6:
        return edit(rng.choice(EDIT_KINDS), rng)
    return two_references(rng.choice(TWO_REFERENCE_KINDS), rng)


def any_task(rng: random.Random) -> Task:
    """Draws text-to-image in half of all cases, else an edit of one reference or a task of two."""
    return text_to_image(rng) if rng.random() < 0.5 else any_edit(rng)


def paraphrase(entry: dict[str, Any]) -> Task:
    """Reads one hand-written prompt with its right answer."""
    reference = entry.get("reference")
    references = (_scene(reference),) if reference else ()
    return Task("paraphrase", entry["prompt"], _scene(entry), references)


def _scene(entry: dict[str, Any]) -> Scene:
    colors = entry["background"].split()
    items = []
    for words in entry["items"]:
        shape, color, *place, size = words.split()
        items.append(Item(shape, color, " ".join(place), size))
    return Scene(Background(colors[0], colors[-1]), tuple(items))


def _random(name: str) -> random.Random:
    return random.Random(_SEED + zlib.crc32(name.encode()))


def _print_row(row: Row) -> None:
    shares = "  ".join(f"{getattr(row, column):10.3f}" for column in COLUMNS)
    sys.stdout.write(f"{row.name:36} {row.count:5}  {shares}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.pico.evaluate", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="pictures of each group")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of weights and activations"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="checkpoint folder")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="all",
        help="words: text-to-image and paraphrases; references: edits and two references; rest: sizes and controls",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    count: int = arguments.count
    header = "  ".join(f"{column:>10}" for column in COLUMNS)
    sys.stdout.write(f"{'4 steps, ' + arguments.dtype:36} {'n':>5}  {header}\n")
    evaluation = Evaluation(Painter(arguments.weights, dtype), _print_row)
    if arguments.part in ("all", "words"):
        evaluation.text_to_image(count)
        evaluation.paraphrases("paraphrases", PARAPHRASES, count)
        evaluation.paraphrases("blind paraphrases", BLIND_PARAPHRASES, count)
    if arguments.part in ("all", "references"):
        evaluation.kinds("edits, all kinds", EDIT_KINDS, edit, count)
        evaluation.kinds("two references, all kinds", TWO_REFERENCE_KINDS, two_references, count)
    if arguments.part in ("all", "rest"):
        evaluation.other_references(count // 2)
        evaluation.sizes(count)
        evaluation.controls(count)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in evaluation.rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

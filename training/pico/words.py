"""Vocabulary of pico: words for shapes, colors and sizes, and phrases for places and backgrounds."""

from __future__ import annotations

import random
import re
from functools import lru_cache

from training.pico.world import Background, Item

_SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "dot", "ball", "round shape", "filled circle"),
    "square": ("square", "square", "square", "box", "block", "tile", "square shape"),
    "triangle": ("triangle", "triangle", "triangle", "triangular shape", "pyramid"),
    "star": ("star", "star", "star", "five-pointed star", "star shape", "starlet"),
    "heart": ("heart", "heart", "heart", "love heart", "heart shape", "valentine heart"),
    "ring": ("ring", "ring", "ring", "donut", "doughnut", "hoop", "hollow circle", "annulus"),
}
_COLOR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "red", "red", "crimson", "scarlet", "bright red"),
    "orange": ("orange", "orange", "orange", "orange", "bright orange", "tangerine"),
    "yellow": ("yellow", "yellow", "yellow", "yellow", "bright yellow", "golden", "lemon yellow"),
    "green": ("green", "green", "green", "green", "emerald", "grass green", "dark green"),
    "blue": ("blue", "blue", "blue", "blue", "deep blue", "royal blue", "azure"),
    "purple": ("purple", "purple", "purple", "violet", "deep purple", "lilac"),
    "black": ("black", "black", "black", "black", "jet black", "pitch black"),
    "white": ("white", "white", "white", "white", "snow white", "pure white"),
}
_SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "small", "tiny", "little", "mini", "very small", "teeny"),
    "medium": ("medium", "medium", "medium-sized", "mid-sized", "normal-sized", "middle-sized"),
    "large": ("large", "large", "large", "big", "big", "huge", "giant", "very large", "massive", "enormous"),
}
_CENTER = (
    "in the center", "in the middle", "at the center", "in the centre", "centered", "centred",
    "in the very center", "right in the middle", "in the middle of the picture", "in the center of the image",
)  # fmt: skip
_CORNER_ROWS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}


def article(words: str) -> str:
    """Puts the indefinite article before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def subject_words() -> tuple[str, ...]:
    """Returns the words and phrases for shapes, plain names first, then synonyms, then all of them in the plural.

    A phrase that contains another of them as a word is left out.
    """
    known = dict.fromkeys((*_SHAPE_WORDS, *(word for words in _SHAPE_WORDS.values() for word in words)))
    shortest = [word for word in known if not any(other in word.split() for other in known if other != word)]
    return *shortest, *(f"{word}es" if word.endswith(("s", "x")) else f"{word}s" for word in shortest)


def shape_word(shape: str, rng: random.Random) -> str:
    return rng.choice(_SHAPE_WORDS[shape])


def color_word(color: str, rng: random.Random) -> str:
    """Returns a word for a color; its plain name four times in five."""
    draw = rng.random()
    if draw < 0.03 and color not in ("black", "white"):
        return f"{rng.choice(('dark', 'strong', 'vivid', 'rich', 'bold'))} {color}"
    return color if draw < 0.6 else rng.choice(_COLOR_WORDS[color])


def size_word(size: str, rng: random.Random) -> str:
    return rng.choice(_SIZE_WORDS[size])


def color_pair(background: Background, rng: random.Random) -> tuple[str, str]:
    """Returns words for both colors of a gradient, the top one first."""
    return color_word(background.top, rng), color_word(background.bottom, rng)


def noun(item: Item, rng: random.Random, *, say_medium: float = 0.12) -> str:
    """Names an item without an article: size, color and shape in one of several orders."""
    shape, color = shape_word(item.shape, rng), color_word(item.color, rng)
    if item.size == "medium" and rng.random() >= say_medium:
        return f"{color} {shape}" if rng.random() < 0.93 else f"{shape} in {color}"
    size = size_word(item.size, rng)
    usual = f"{size} {color} {shape}"
    if rng.random() < 0.8:
        return usual
    return rng.choice((
        f"{size}, {color} {shape}",
        f"{color} {size} {shape}",
        f"{size} {shape} in {color}",
        f"{size} {shape} that is {color}",
        f"{color} {shape} of {size.removesuffix('-sized')} size",
        f"{color}, {size} {shape}",
    ))  # fmt: skip


def place_phrase(place: str, rng: random.Random) -> str:
    """Returns a phrase for a place, as in "in the top left corner"."""
    if place == "center":
        return rng.choice(_CENTER)
    if place in ("left", "right"):
        return rng.choice((
            f"on the {place}", f"on the {place}", f"on the {place} side", f"at the {place}", f"to the {place}",
            f"at the {place} edge", f"in the {place} half", f"at the {place} hand side",
            f"on the {place}-hand side", f"near the {place} edge", f"in the middle of the {place} side",
            f"{place} of center",
        ))  # fmt: skip
    if place in ("top", "bottom"):
        upper = _CORNER_ROWS[place][1]
        return rng.choice((
            f"at the {place}", f"at the {place}", f"on the {place}", f"near the {place}", f"in the {upper} half",
            f"at the {place} edge", f"in the {upper} part", f"at the very {place}", f"at the {place} center",
            f"in the {place} middle", f"{'above' if place == 'top' else 'below'} the center",
        ))  # fmt: skip
    return _corner_phrase(place, rng)


def _corner_phrase(place: str, rng: random.Random) -> str:
    row, side = place.split()
    upper = rng.choice(_CORNER_ROWS[row])
    return rng.choice((
        f"in the {upper} {side} corner", f"in the {upper} {side} corner", f"in the {upper}-{side} corner",
        f"at the {upper} {side}", f"in the {upper} {side}", f"in the {side} {upper} corner",
        f"on the {upper} {side}", f"near the {upper} {side} corner", f"in the corner at the {upper} {side}",
        f"{upper} {side}",
    ))  # fmt: skip


def destination_phrase(place: str, rng: random.Random) -> str:
    """Returns a phrase for the destination of a move, as in "to the top left corner"."""
    if rng.random() < 0.25:
        return place_phrase(place, rng)
    if place == "center":
        return rng.choice(
            ("to the center", "to the middle", "to the centre", "into the middle", "into the center")
        )
    if place in PLAIN_SIDES:
        return rng.choice(
            (f"to the {place}", f"to the {place}", f"to the {place} side", f"to the {place} edge")
        )
    row, side = place.split()
    upper = rng.choice(_CORNER_ROWS[row])
    return rng.choice((
        f"to the {upper} {side}", f"to the {upper} {side} corner", f"into the {upper} {side} corner",
        f"to the {upper}-{side} corner", f"into the {side} {upper} corner",
    ))  # fmt: skip


PLAIN_SIDES = ("left", "right", "top", "bottom")


def background_phrase(background: Background, rng: random.Random) -> str:
    """Returns a phrase for a background, as in "on a blue background"."""
    if background.is_plain:
        color = color_word(background.top, rng)
        return rng.choice((
            f"on {article(color)} background", f"on {article(color)} background", f"on {color}",
            f"with {article(color)} background", f"over {article(color)} background", f"with {color} behind it",
            f"against {article(color)} background", f"in front of {article(color)} background",
            f"on {article(color)} canvas", f"on {article(color)} backdrop", f"where the background is {color}",
            f"and the background is {color}", f"against {article(color)} backdrop", f"on plain {color}",
            f"on {article(color)} surface", f"on a background of {color}",
        ))  # fmt: skip
    top, bottom = color_pair(background, rng)
    return rng.choice((
        f"on a gradient from {top} to {bottom}", f"with a gradient background from {top} to {bottom}",
        f"on {article(top)} to {bottom} gradient background", f"over {article(top)} to {bottom} gradient",
        f"on a gradient background from {top} at the top to {bottom} at the bottom",
        f"on a background that fades from {top} to {bottom}", f"on a vertical gradient from {top} to {bottom}",
        f"in front of a {top}-{bottom} gradient", f"with a background fading from {top} into {bottom}",
        f"on a background going from {top} to {bottom}", f"against {article(top)} to {bottom} gradient",
        f"on a gradient background, {top} above and {bottom} below",
    ))  # fmt: skip


@lru_cache(maxsize=1)
def strange_words() -> tuple[str, ...]:
    """English words that are not of the world; they come from Python's own manual pages."""
    from pydoc_data.topics import topics

    found = set(re.findall(r"\b[a-z]{3,9}\b", " ".join(topics.values())))
    meant = " ".join(
        " ".join(words) for table in (_SHAPE_WORDS, _COLOR_WORDS, _SIZE_WORDS) for words in table.values()
    )
    reserved = set(re.findall(r"[a-z]+", meant)) | _RESERVED
    return tuple(sorted(found - reserved))


_RESERVED = frozenset(
    word
    for line in (
        "the and above below left right top bottom center middle upper lower first second one two image picture",
        "background color remove delete add put move make change replace bigger smaller larger from into onto",
        "under next beside between corner side edge half it its with without gradient empty plain no not none",
        "size sized swap place shape object figure both same other over nothing",
    )
    for word in line.split()
)

"""Prompts of edits of one image and of compositions of two."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.pico.captions import background_words, finished, with_stray_word
from training.pico.words import (
    article,
    color_pair,
    color_word,
    destination_phrase,
    noun,
    place_phrase,
    shape_word,
    size_word,
)
from training.pico.world import SIZES, Background, Item, Scene

_POLITE = ("please ", "can you ", "could you ", "now ", "i want you to ", "edit the image: ", "in this picture, ",
           "take the picture and ", "keep everything but ", "just ", "let's ", "i'd like you to ", "would you ",
           "i think you should ", "hey, ", "same picture but ", "next, ", "then ")  # fmt: skip
_ENDINGS = (" please", ", please", ", keep the rest", ", keep everything else the same", " and change nothing else",
            ", thanks", " in the picture", " in the image", ", the rest stays", ", nothing else changes",
            " for me", " now", " if you can")  # fmt: skip
_VAGUE = ("it", "it", "the shape", "the object", "the figure")
"""Words for the only item of an image."""


def _polished(text: str, rng: random.Random) -> str:
    if rng.random() < 0.12:
        text = rng.choice(_POLITE) + text
    if rng.random() < 0.1:
        text += rng.choice(_ENDINGS)
    if rng.random() < 0.05:
        text = with_stray_word(text, rng)
    return finished(text, rng)


@dataclass(frozen=True)
class Name:
    """A reference to an item, and the attributes that it names."""

    text: str
    said: frozenset[str] = frozenset()


def name_of(item: Item, scene: Scene, rng: random.Random) -> Name:
    """Refers to one item of a scene so that no other item can be meant."""
    shape = Name(f"the {shape_word(item.shape, rng)}", frozenset({"shape"}))
    full = Name(
        f"the {color_word(item.color, rng)} {shape_word(item.shape, rng)}", frozenset({"shape", "color"})
    )
    others = [other for other in scene.items if other != item]
    if not others:
        vague = [Name(text) for text in _VAGUE]
        return rng.choice((*vague, shape, shape, shape, full, full))
    general = rng.choice(("shape", "object", "one"))
    placed = Name(f"the {item.place} {general}", frozenset({"place"}))
    if rng.random() < 0.3:
        placed = Name(f"the {item.place} {shape_word(item.shape, rng)}", frozenset({"place", "shape"}))
    options = [full, placed]
    if item.shape != others[0].shape:
        options += [shape, shape]
    if item.color != others[0].color:
        options.append(Name(f"the {color_word(item.color, rng)} {general}", frozenset({"color"})))
    return rng.choice(options)


def recolor(name: str, color: str, rng: random.Random) -> str:
    """Gives an item another color."""
    new = color_word(color, rng)
    return _polished(rng.choice((
        f"make {name} {new}", f"make {name} {new}", f"turn {name} {new}", f"paint {name} {new}",
        f"change the color of {name} to {new}", f"recolor {name} to {new}", f"change {name} to {new}",
        f"color {name} {new}", f"{name} should be {new}", f"give {name} {article(new)} color",
        f"make {name} {new} instead", f"set the color of {name} to {new}", f"{name} in {new}", f"dye {name} {new}",
        f"i want {name} {new}", f"{name} would look better in {new}", f"{name} has to be {new}",
        f"switch {name} to {new}",
        f"i'd prefer {name} in {new}", f"{name} is the wrong color, make it {new}", f"let {name} be {new}",
        f"fill {name} with {new}", f"i would like {name} to be {new}", f"can {name} be {new}?",
    )), rng)  # fmt: skip


def reshape(name: str, shape: str, rng: random.Random) -> str:
    """Turns an item into another shape of the same color, size and place."""
    new = article(shape_word(shape, rng))
    if name in _VAGUE and rng.random() < 0.1:
        return _polished(rng.choice((
            f"i would prefer {new}", f"{new} in its place", f"have {new} there instead", f"no, {new} please",
            f"better {new}", f"why not {new}?", f"could that be {new}?",
        )), rng)  # fmt: skip
    return _polished(rng.choice((
        f"replace {name} with {new}", f"replace {name} by {new}", f"turn {name} into {new}",
        f"change {name} into {new}",
        f"change {name} to {new}", f"make {name} {new}", f"{name} should be {new}", f"make {new} of {name}",
        f"swap {name} for {new}", f"{new} instead of {name}", f"transform {name} into {new}",
        f"use {new} instead of {name}",
        f"change the shape of {name} to {new}" if name != "the shape" else f"change the shape to {new}",
        f"i want {new} instead of {name}", f"instead of {name} draw {new}", f"{name} should become {new}",
        f"put {new} where {name} is", f"give me {new} instead of {name}", f"let {name} be {new}",
        f"exchange {name} for {new}", f"where {name} is i want {new}", f"convert {name} to {new}",
        f"can {name} be {new}?", f"switch {name} for {new}",
        f"make {name} into {new}", f"i want {name} to be {new}", f"{new} would be better than {name}",
    )), rng)  # fmt: skip


def change_background(background: Background, rng: random.Random) -> str:
    """Puts another background behind everything."""
    if background.is_plain:
        new = color_word(background.top, rng)
    else:
        top, bottom = color_pair(background, rng)
        new = rng.choice((f"a gradient from {top} to {bottom}", article(f"{background_words(background, rng)}"),
                          f"a vertical gradient from {top} to {bottom}", f"fade from {top} to {bottom}"))  # fmt: skip
    thing = rng.choice(("background", "background", "background", "backdrop", "canvas"))
    return _polished(rng.choice((
        f"make the {thing} {new}", f"change the {thing} to {new}",
        f"turn the {thing} {'' if background.is_plain else 'into '}{new}",
        f"change the {thing} color to {new}", f"set the {thing} to {new}", f"use {new} as the {thing}",
        f"the {thing} should be {new}", f"replace the {thing} with {new}", f"paint the {thing} {new}",
        f"{background_words(background, rng)} {thing}",
        f"put it on {article(background_words(background, rng))} {thing}",
        f"give it {article(background_words(background, rng))} {thing}",
        f"i don't like the {thing}, make it {new}", f"i want {article(background_words(background, rng))} {thing}",
        f"same thing on {article(background_words(background, rng))} {thing}", f"the {thing} has to be {new}",
        f"switch the {thing} to {new}", f"let the {thing} be {new}", f"fill the {thing} with {new}",
        f"can the {thing} be {new}?", f"what about {article(background_words(background, rng))} {thing}?",
        f"behind it should be {new}", f"everything behind it should be {new}",
    )), rng)  # fmt: skip


def resize(name: str, old_size: str, size: str, rng: random.Random) -> tuple[str, bool]:
    """Makes an item larger or smaller; returns the words and whether they are relative ("bigger")."""
    steps = SIZES.index(size) - SIZES.index(old_size)
    if abs(steps) == 1 and rng.random() < 0.55:
        bigger = ("bigger", "larger") if steps > 0 else ("smaller", "tinier")
        verbs = ("enlarge", "grow", "scale up") if steps > 0 else ("shrink", "reduce", "scale down")
        text = rng.choice((f"make {name} {rng.choice(bigger)}", f"make {name} a bit {rng.choice(bigger)}",
                           f"{rng.choice(verbs)} {name}", f"{name} should be {rng.choice(bigger)}",
                           f"i want {name} {rng.choice(bigger)}", f"{name} could be {rng.choice(bigger)}",
                           f"{name} is too {'small' if steps > 0 else 'big'}", f"{rng.choice(bigger)} please",
                           f"can you make {name} {rng.choice(bigger)}?"))  # fmt: skip
        return _polished(text, rng), True
    new = size_word(size, rng)
    text = rng.choice((f"make {name} {new}", f"make {name} {new}", f"turn {name} {new}", f"{name} should be {new}",
                       f"change the size of {name} to {new}", f"resize {name} to {new}", f"i want {name} {new}",
                       f"let {name} be {new}",
                       f"{name} has to be {new}", f"i'd like {name} to be {new}", f"draw {name} {new}"))  # fmt: skip
    return _polished(text, rng), False


def move(name: str, place: str, rng: random.Random) -> str:
    """Moves the only item to another place."""
    where = destination_phrase(place, rng)
    return _polished(rng.choice((
        f"move {name} {where}", f"move {name} {where}", f"shift {name} {where}", f"bring {name} {where}",
        f"put {name} {place_phrase(place, rng)}", f"place {name} {place_phrase(place, rng)}",
        f"{name} should be {place_phrase(place, rng)}", f"slide {name} {where}", f"push {name} {where}",
        f"{name} belongs {place_phrase(place, rng)}", f"i want {name} {place_phrase(place, rng)}",
        f"{name} has to go {where}", f"drag {name} {where}", f"can {name} be {place_phrase(place, rng)}?",
        f"let {name} go {where}", f"get {name} {where}", f"have {name} {place_phrase(place, rng)}",
        f"it would be nicer with {name} {place_phrase(place, rng)}", f"move {name} over {where}",
    )), rng)  # fmt: skip


def remove(name: str, rng: random.Random) -> str:
    """Takes an item away."""
    return _polished(rng.choice((
        f"remove {name}", f"remove {name}", f"erase {name}", f"delete {name}", f"take {name} away", f"take away {name}",
        f"get rid of {name}", f"make {name} disappear", f"without {name}", f"hide {name}", f"drop {name}",
        f"{name} has to go", f"{name} must go", f"i don't want {name}", f"no {name.removeprefix('the ')}",
        f"get {name} out of there", f"{name} should be gone", f"clear {name}", f"lose {name}", f"cut {name} out",
        f"the same without {name}", f"{name} is too much, remove it", f"leave {name} out", f"i want {name} gone",
        f"can {name} go away?", f"throw {name} out", f"wipe {name} away",
    )), rng)  # fmt: skip


def add(item: Item, rng: random.Random) -> str:
    """Puts one more item into the picture."""
    name, where = article(noun(item, rng)), place_phrase(item.place, rng)
    if item.place == "center" and rng.random() < 0.3:
        where = ""
    return _polished(rng.choice((
        f"add {name} {where}", f"add {name} {where}", f"put {name} {where}", f"draw {name} {where}",
        f"insert {name} {where}", f"place {name} {where}", f"also add {name} {where}", f"{where} add {name}".strip(),
        f"there should be {name} {where}", f"i want {name} {where} as well", f"{name} {where} too",
        f"and {name} {where}",
        f"there should also be {name} {where}", f"i'd like {name} {where}, too", f"one more thing: {name} {where}",
        f"{name} is missing {where}", f"can i also have {name} {where}", f"give it {name} {where} too",
        f"there should be {name} {where} as well", f"include {name} {where}", f"it needs {name} {where}",
        f"{where} i want {name}".strip(),
    )).strip(), rng)  # fmt: skip


def _image(number: int, rng: random.Random) -> str:
    ordinal = ("first", "second")[number - 1]
    return rng.choice((f"image {number}", f"image {number}", f"the {ordinal} image", f"picture {number}",
                       f"the {ordinal} picture", f"the {ordinal} reference"))  # fmt: skip


def _thing(number: int, rng: random.Random) -> str:
    thing = rng.choice(("shape", "object", "figure", "thing"))
    return f"the {thing} {rng.choice(('of', 'from', 'in'))} {_image(number, rng)}"


def onto_background(rng: random.Random) -> str:
    """Puts the first picture's item on the second picture's background."""
    one, behind = _thing(1, rng), f"the background {rng.choice(('of', 'from', 'in'))} {_image(2, rng)}"
    return _polished(rng.choice((
        f"put {one} on {behind}", f"{one} on {behind}", f"use {behind} for {_image(1, rng)}",
        f"{one} with {behind}", f"place {one} over {behind}", f"combine {one} with {behind}",
        f"replace the background of {_image(1, rng)} with {behind}", f"take {one} and {behind}",
        f"change the background of {_image(1, rng)} to {behind}", f"keep {one} but use {behind}",
    )), rng)  # fmt: skip


def color_from_second(rng: random.Random) -> str:
    """Gives the first picture's item the color of the second picture's item."""
    one = _thing(1, rng)
    color = rng.choice(
        (f"the color {rng.choice(('of', 'from', 'in'))} {_image(2, rng)}", f"the color of {_thing(2, rng)}")
    )
    return _polished(rng.choice((
        f"paint {one} in {color}", f"{one} in {color}", f"{one} with {color}", f"recolor {one} with {color}",
        f"give {one} {color}", f"use {color} for {one}", f"make {one} {color}",
        f"change the color of {one} to {color}",
        f"apply {color} to {one}", f"color {one} like {_thing(2, rng)}",
    )), rng)  # fmt: skip


def side_by_side(left: int, right: int, rng: random.Random) -> str:
    """Puts one picture's item on the left and the other's on the right."""
    one, other = _thing(left, rng), _thing(right, rng)
    options = [
        f"put {one} on the left and {other} on the right", f"{one} on the left and {other} on the right",
        f"put {one} to the left of {other}", f"{one} to the left of {other}", f"{other} to the right of {one}",
        f"put {other} on the right and {one} on the left", f"{one} left, {other} right", f"place {one} left of {other}",
        f"put {other} to the right of {one}",
    ]  # fmt: skip
    if left == 1:
        options += [f"{one} next to {other}", f"{one} and {other} side by side", f"put {one} and {other} side by side",
                    "put both shapes side by side", "combine both images side by side",
                    f"put {one} next to {other}"]  # fmt: skip
    return _polished(rng.choice(options), rng)


def stacked(above: int, below: int, rng: random.Random) -> str:
    """Puts one picture's item at the top and the other's at the bottom."""
    one, other = _thing(above, rng), _thing(below, rng)
    return _polished(rng.choice((
        f"put {one} at the top and {other} at the bottom", f"{one} at the top and {other} at the bottom",
        f"put {one} above {other}", f"{one} above {other}", f"{other} below {one}", f"put {other} below {one}",
        f"put {other} at the bottom and {one} at the top", f"{one} on top of {other}", f"{other} under {one}",
        f"place {other} under {one}", f"place {one} over {other}" if above == 1 else f"{one} over {other}",
    )), rng)  # fmt: skip

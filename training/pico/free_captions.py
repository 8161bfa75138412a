"""Captions of scenes in free words: clauses in any order, with any punctuation.

The rules for what is left unsaid are those of `captions`.
"""

from __future__ import annotations

import random

from training.pico.words import (
    article,
    color_pair,
    color_word,
    place_phrase,
    shape_word,
    size_word,
    strange_words,
)
from training.pico.world import Background, Item, Scene

_WISHES = (
    "i need ", "we need ", "need ", "i want to see ", "let's have ", "let me have ", "how about ", "can we have ",
    "could we get ", "may i have ", "i'd like ", "i would love ", "looking for ", "think of ", "sketch ", "put ",
    "place ", "here is ", "here we have ", "you see ", "one can see ", "the picture shows ", "what i want is ",
    "go for ", "try ", "do ", "print ", "produce ", "compose ", "set ", "have ", "for me, ", "this time ",
)  # fmt: skip
_THINGS = ("logo", "icon", "poster", "card", "sticker", "sign", "banner", "stamp", "cover", "flag", "button")
_STANDS = ("sits", "is", "stands", "rests", "lies", "floats", "hangs", "hovers", "is placed", "is found", "goes",
           "appears", "shines", "waits", "should be", "has to be", "can be seen", "belongs")  # fmt: skip
_STANDING = ("sitting", "standing", "resting", "lying", "floating", "hanging", "hovering", "placed", "positioned",
             "located", "drawn", "put", "which is", "that sits", "somewhere")  # fmt: skip
_SHEETS = ("background", "page", "sheet", "paper", "wall", "field", "ground", "canvas", "picture", "image", "surface",
           "screen", "square of paper", "board", "backdrop")  # fmt: skip
_STOPS = (". ", "; ", ", ", ": ", " - ", ". ", ", ")


def free_caption(scene: Scene, rng: random.Random) -> str:
    """Describes a scene with at least one item."""
    items = _one(scene.items[0], rng) if len(scene.items) == 1 else _two(scene.items[0], scene.items[1], rng)
    background = scene.background
    if background == Background.plain("white") and rng.random() < 0.4:
        return _lead_in(scene, rng) + items
    if rng.random() < 0.3:
        return _background_first(background, rng) + items
    return _lead_in(scene, rng) + items + _background_last(background, rng)


def _lead_in(scene: Scene, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        return ""
    if draw < 0.8:
        return rng.choice(_WISHES)
    if draw < 0.9:
        thing = rng.choice((*_THINGS, rng.choice(strange_words())))
        return rng.choice((f"{article(thing)}: ", f"for {article(thing)}: ", f"i am making {article(thing)}, so draw ",
                           f"{article(thing)} with ", f"for my {thing}, ", f"as {article(thing)}, "))  # fmt: skip
    stray = " ".join(rng.choices(strange_words(), k=rng.randint(1, 3)))
    if draw < 0.95:
        return f"{stray}{rng.choice(_STOPS)}"
    return (
        f"{rng.choice(('i', 'we', 'they'))} {rng.choice(('like', 'want', 'need'))} {scene.items[0].shape}s: "
    )


def described(item: Item, rng: random.Random) -> str:
    """Names an item with its article; color and size stand before the shape or after it."""
    shape, color = shape_word(item.shape, rng), color_word(item.color, rng)
    size = "" if item.size == "medium" and rng.random() < 0.85 else _size(item.size, rng)
    if rng.random() < 0.4:
        one = article(f"{size} {color} {shape}".strip())
        return (
            one
            if rng.random() < 0.8
            else f"{rng.choice(('one', 'a single', 'one single', 'just one'))}"
            + (one.removeprefix("an").removeprefix("a"))
        )
    if not size:
        return rng.choice((
            f"{article(shape)}, {color}", f"{article(shape)} ({color})", f"{shape} ({color})", f"{shape}, {color}",
            f"{article(shape)} in {color}", f"{article(shape)} that is {color}",
            f"{article(shape)}, which is {color},",
            f"{article(shape)}, {color} in color,", f"{article(shape)} painted {color}", f"{color} {shape}",
            f"{article(shape)} of {color} color", f"{article(shape)}, all {color},",
            f"something {color}: {article(shape)}",
        ))  # fmt: skip
    return rng.choice((
        f"{article(shape)}, {color} and {size}", f"{article(shape)}, {size} and {color}",
        f"{shape} ({size}, {color})",
        f"{article(f'{size} {shape}')} in {color}", f"{article(f'{color} {shape}')}, {size}",
        f"{shape}, {color}, {size}",
        f"{article(f'{size} {shape}')}, {color}", f"{article(f'{color} {shape}')} that is {size}",
        f"{article(f'{size} {shape}')} which is {color}", f"{shape}, {size}, {color}", f"{size} {color} {shape}",
        f"{article(f'{size} {shape}')} ({color})", f"{article(f'{color} and {size} {shape}')}",
        f"{article(f'{color} {shape}')}, and it is {size}", f"{article(f'{color} {shape}')} ({size})",
    ))  # fmt: skip


def _size(size: str, rng: random.Random) -> str:
    word = size_word(size, rng)
    if size != "medium" and " " not in word and rng.random() < 0.15:
        return f"{rng.choice(('very', 'really', 'quite', 'rather', 'pretty'))} {word}"
    return word


def _one(item: Item, rng: random.Random) -> str:
    if rng.random() < 0.12:
        return _in_sentences(item, rng)
    name = described(item, rng)
    if item.place == "center" and rng.random() < 0.4:
        return name
    where = place_phrase(item.place, rng)
    return rng.choice((
        f"{name} {where}", f"{name} {where}", f"{name}, {where}", f"{name} {rng.choice(_STANDING)} {where}",
        f"{where} {rng.choice(_STANDS)} {name}", f"{where}: {name}", f"{where} there is {name}",
        f"{where}, {name}", f"{name} {rng.choice(_STANDS)} {where}", f"{name}, {rng.choice(_STANDING)} {where}",
        f"{where} i want {name}", f"there's {name} {where}", f"{name}. {where}", f"{name} - {where}",
    ))  # fmt: skip


def _in_sentences(item: Item, rng: random.Random) -> str:
    """Returns one sentence for each attribute, in any order; the shape comes first."""
    said = [f"{color_word(item.color, rng)}"]
    if item.place != "center" or rng.random() < 0.5:
        said.append(place_phrase(item.place, rng))
    if item.size != "medium":
        said.append(_size(item.size, rng))
    rng.shuffle(said)
    start, be = (
        article(shape_word(item.shape, rng)),
        rng.choice(("it is ", "it's ", "make it ", "it should be ", "")),
    )
    stop = rng.choice((". ", ", ", "; ")) if be else ". "
    return stop.join([start, *(be + what for what in said)])


def _two(first: Item, second: Item, rng: random.Random) -> str:
    is_row = first.place == "left"
    if first.shape == second.shape and rng.random() < 0.5:
        return _same_shape_twice(first, second, rng)
    one, other = described(first, rng), described(second, rng)
    if rng.random() < 0.35:
        near, far = (first.place, second.place)
        return _each_with_its_place(one, other, near, far, rng)
    return _related(one, other, rng) if is_row else _one_over_other(one, other, rng)


def _same_shape_twice(first: Item, second: Item, rng: random.Random) -> str:
    """Names the second item as "a … one"."""
    size = "" if second.size == "medium" else _size(second.size, rng)
    one = described(first, rng)
    other = article(f"{size} {color_word(second.color, rng)} one".strip())
    where, there = (rng.choice(_HALVES[item.place]) for item in (first, second))
    relation = rng.choice(("next to", "to the left of", "beside")) if first.place == "left" else "above"
    return rng.choice((
        f"{one} {where} and {other} {there}", f"{one} {relation} {other}", f"{one} {where}, {other} {there}",
        f"{one} {where}, and {there} {other}", f"{where} {one}, {there} {other}",
        f"{one} {rng.choice(_STANDS)} {relation} {other}",
    ))  # fmt: skip


def _each_with_its_place(one: str, other: str, near: str, far: str, rng: random.Random) -> str:
    where, there = (rng.choice(_HALVES[place]) for place in (near, far))
    pairs = [(one, where), (other, there)]
    if rng.random() < 0.35:
        pairs.reverse()
    joint = rng.choice((" and ", ", ", "; ", ". ", ", and ", " while ", ", then "))
    order = rng.choice(
        ("{0} {1}", "{1} {0}", "{1}: {0}", "{0} ({1})", "{0} {2} {1}", "{1} {2} {0}", "{1} there is {0}")
    )
    return joint.join(order.format(name, place, rng.choice(_STANDS)) for name, place in pairs)


_HALVES = {
    "left": ("on the left", "left", "to the left", "on the left side", "at the left", "on the left hand side",
             "in the left half"),
    "right": ("on the right", "right", "to the right", "on the right side", "at the right", "on the right hand side",
              "in the right half"),
    "top": ("at the top", "top", "on top", "in the upper half", "above", "up top", "at the very top"),
    "bottom": ("at the bottom", "bottom", "below", "in the lower half", "underneath", "down below",
               "at the very bottom"),
}  # fmt: skip


def _related(one: str, other: str, rng: random.Random) -> str:
    return rng.choice((
        f"{one} {rng.choice(_STANDS)} to the left of {other}", f"{other} {rng.choice(_STANDS)} to the right of {one}",
        f"{one} {rng.choice(_STANDS)} next to {other}", f"{one}, next to it {other}", f"{one} and beside it {other}",
        f"{one} plus {other}", f"{one} together with {other}", f"{one} {rng.choice(_STANDING)} left of {other}",
        f"to the left of {other} {rng.choice(_STANDS)} {one}", f"to the right of {one} there is {other}",
        f"a pair: {one} and {other}", f"first {one}, then {other}", f"two things: {one}, {other}",
        f"{one} and also {other}", f"{one} and to its right {other}", f"{other} and to its left {one}",
        f"left of {other} {rng.choice(_STANDS)} {one}", f"right of {one}: {other}", f"both {one} and {other}",
    ))  # fmt: skip


def _one_over_other(one: str, other: str, rng: random.Random) -> str:
    return rng.choice((
        f"{one} {rng.choice(_STANDS)} above {other}", f"{other} {rng.choice(_STANDS)} below {one}",
        f"{one} {rng.choice(_STANDING)} over {other}", f"under {one} {rng.choice(_STANDS)} {other}",
        f"below {one} there is {other}", f"above {other} {rng.choice(_STANDS)} {one}", f"{one}, below it {other}",
        f"{one} and under it {other}", f"{other} and above it {one}", f"over {other} there is {one}",
        f"beneath {one}: {other}", f"{one} higher up, {other} lower down", f"{one} up, {other} down",
        f"{other} {rng.choice(_STANDING)} underneath {one}", f"underneath {one} {rng.choice(_STANDS)} {other}",
        f"{one} on top of {other}", f"a column: {one}, then {other}", f"{one} stacked on {other}",
    ))  # fmt: skip


def _behind(background: Background, rng: random.Random) -> str:
    """Names a background so that "the background is" can stand before it."""
    if background.is_plain:
        return rng.choice(("", "", "", "plain ", "all ", "completely ")) + color_word(background.top, rng)
    top, bottom = color_pair(background, rng)
    change = rng.choice(("fading", "going", "changing", "running", "blending", "shifting"))
    return rng.choice((
        f"{article(top)} to {bottom} gradient", f"a gradient from {top} to {bottom}",
        f"{change} from {top} to {bottom}",
        f"a gradient, {top} at the top, {bottom} at the bottom", f"{top} above and {bottom} below",
        f"{top} at the top and {bottom} at the bottom", f"{top} turning into {bottom}", f"{top} {change} into {bottom}",
        f"a gradient of {top} over {bottom}", f"{top} that becomes {bottom} further down",
        f"{change} from {top} on top to {bottom} below", f"a gradient with {top} above and {bottom} below",
    ))  # fmt: skip


def _background_first(background: Background, rng: random.Random) -> str:
    behind, sheet = _behind(background, rng), rng.choice(_SHEETS)
    stop = rng.choice(_STOPS)
    options = [
        f"the {sheet} is {behind}{stop}", f"the {sheet} is {behind} and there is ", f"{sheet}: {behind}{stop}",
        f"make the {sheet} {behind}{stop}", f"the {sheet} should be {behind}{stop}", f"{behind} behind{stop}",
        f"{sheet} {behind}{stop}", f"with {behind} behind it, ", f"first the {sheet}, {behind}{stop}",
    ]  # fmt: skip
    if background.is_plain:
        colored = article(f"{behind} {sheet}")
        options += [f"{colored} with ", f"{colored}{stop}", f"{behind} {sheet}{stop}", f"on {colored}, ",
                    f"{colored} holding ", f"{colored} showing ", f"everything is {behind} except for ",
                    f"on {behind}: ",
                    f"take {colored} and add ", f"{colored} and on it ", f"give it {colored} and put "]  # fmt: skip
    return rng.choice(options)


def _background_last(background: Background, rng: random.Random) -> str:
    behind, sheet = _behind(background, rng), rng.choice(_SHEETS)
    stop = rng.choice(_STOPS)
    options = [
        f"{stop}the {sheet} is {behind}", f", the rest is {behind}", f", everything else is {behind}",
        f"; {sheet} {behind}",
        f"{stop}{sheet}: {behind}", f", the {sheet} being {behind}", f", the {sheet} should be {behind}",
        f" and a {sheet} {behind}",
        f"{stop}make the {sheet} {behind}", f", {sheet} {behind}", f" with the {sheet} {behind}", 
        f", with {behind} behind",
        f" while the {sheet} is {behind}", f"{stop}behind it {behind}", f", all around it {behind}",
    ]  # fmt: skip
    if background.is_plain:
        colored = article(f"{behind} {sheet}")
        options += [f" on {colored}", f" on {colored}", f", on {behind}", f" over {behind}", f", all on {behind}",
                    f" against {colored}", f"{stop}{behind} {sheet}", f" with {behind} around it",
                    f" and {behind} behind it",
                    f", {behind} everywhere else", f" in front of {colored}", f", surrounded by {behind}",
                    f" with {colored}", f", on {colored}", f", keep the {sheet} {behind}"]  # fmt: skip
    return rng.choice(options)

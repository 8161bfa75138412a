"""Families of models that are not FLUX.2 [klein], recognized by their names. Torch-free.

No FLUX.3 file was at hand: names are what every file of a family carries, in class names, in header entries or in the
name of its repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

FLUX_3 = "FLUX.3"
SERVED = "this suite serves FLUX.2 [klein] (4B and 9B, distilled, base and 9b-kv)"

_KLEIN_2 = re.compile(r"flux[\s._-]*2[\s._-]*klein", re.IGNORECASE)
_KLEIN = re.compile(r"klein", re.IGNORECASE)
# "flux-3d" is a subject of fine-tunes, not a version.
_FLUX_3 = re.compile(r"flux[\s._-]*3(?!\d|d(?![a-z]))", re.IGNORECASE)
_OTHERS = (
    (
        # The transformer and the VAE of [dev] have the classes of [klein].
        re.compile(
            r"flux[\s._-]*2[\s._-]*(dev|pro|flex|max)(?![a-z])|(?-i:^Flux2(Inpaint)?Pipeline$)", re.IGNORECASE
        ),
        "FLUX.2 [dev] or a larger FLUX.2, whose text encoder is Mistral Small",
    ),
    (re.compile(r"^Mistral3\w*$"), "a text encoder of FLUX.2 [dev], which is Mistral Small"),
    (
        re.compile(
            r"flux[\s._-]*1(?!\d)|(?<![a-z])flux[\s._-]*(dev|schnell|kontext)(?![a-z])"
            r"|(?-i:^Flux[A-Za-z]*(Pipeline|Transformer2DModel)$)",
            re.IGNORECASE,
        ),
        "FLUX.1, an earlier family, whose text encoders are CLIP and T5",
    ),
)
_NAMING_ENTRIES = (
    *("modelspec.architecture", "modelspec.title", "modelspec.implementation"),
    *("architecture", "model_type", "title", "name", "model_name", "base_model", "_class_name"),
)


def other_family(name: str) -> str | None:
    """Returns what a name of another family is and what this suite serves; `None` for every other name.

    Args:
        name: of a class, a repository, a model or a header entry.
    """
    if _KLEIN_2.search(name):
        return None
    if _FLUX_3.search(name):
        return f"{FLUX_3}, a later family (another text encoder, 16 steps, another license); {SERVED}"
    if not _KLEIN.search(name):
        for pattern, family in _OTHERS:
            if pattern.search(name):
                return f"{family}; {SERVED}"
    return None


def family_of_header(metadata: Mapping[str, str]) -> str | None:
    """Returns `other_family` of the first header entry that names one, with the entry; `None` when none does."""
    for key in _NAMING_ENTRIES:
        family = other_family(metadata.get(key, ""))
        if family is not None:
            return f"its header entry {key} is {metadata[key][:80]!r}: {family}"
    return None


def family_among(names: Iterable[str]) -> str | None:
    """Returns `other_family` of the first name, in order, that has one."""
    return next(filter(None, map(other_family, sorted(names))), None)

"""Parameters of a generation, and their limits. Torch-free; every front end validates with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from klein_core.errors import InvalidInput, Violation
from klein_core.variants import default_guidance_scale, default_step_count

SIZE_MULTIPLE_PX = 16
"""Width and height are multiples of this: 8 for the autoencoder times 2 for patches."""
SEED_LIMIT = 2**63
"""Seeds are below this."""


ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names that adapters may have: fit for a file, a command line and a log."""
ADAPTER_NAME_RULE = "1 to 128 letters, digits, dots, hyphens and underscores, the first a letter or digit"
_SHOWN_CHARACTERS = 64
_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character of UTF-16: a Python string can contain it, UTF-8 cannot."""


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that a request names."""

    name: str
    scale: float = 1.0
    """Factor of its effect."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a request. The defaults are those of the hosted klein API."""

    side_px: int = 64
    """Smallest width and height."""
    pixel_count: int = 4 * 1024 * 1024
    """Most pixels of one image."""
    step_count: int = 1000
    reference_count: int = 4
    image_count: int = 8
    prompt_characters: int = 32768
    guidance_scale: float = 100.0
    adapter_count: int = 8
    adapter_scale: float = 10.0
    """Largest scale of an adapter, and with a minus sign the smallest."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class GenerationParams:
    """One validated request; `steps` and `guidance` have the model's defaults filled in.

    Raises:
        InvalidInput: on construction, with every violation at once.
    """

    width_px: int
    height_px: int
    is_distilled: bool
    """Whether the model is step-distilled, which decides the defaults and forbids guidance."""
    prompt: str = ""
    negative_prompt: str | None = None
    seeds: tuple[int, ...] = (0,)
    """One image for each."""
    step_count: int | None = None
    """`None` becomes the model's default."""
    guidance_scale: float | None = None
    """`None` becomes the model's default; 1 is no guidance."""
    reference_count: int = 0
    adapters: tuple[AdapterChoice, ...] = ()
    limits: Limits = field(default=DEFAULT_LIMITS, repr=False)

    def __post_init__(self) -> None:
        violations = list(self._violations())
        if violations:
            raise InvalidInput(violations)

    @property
    def steps(self) -> int:
        """Steps; the model's default when unset."""
        return default_step_count(self.is_distilled) if self.step_count is None else self.step_count

    @property
    def guidance(self) -> float:
        """Guidance scale; the model's default when unset."""
        return (
            default_guidance_scale(self.is_distilled) if self.guidance_scale is None else self.guidance_scale
        )

    @property
    def uses_guidance(self) -> bool:
        """Whether each step needs a second, negative prediction (diffusers: scale > 1 and not distilled)."""
        return not self.is_distilled and self.guidance > 1.0

    @property
    def rows(self) -> int:
        return self.height_px // SIZE_MULTIPLE_PX

    @property
    def columns(self) -> int:
        return self.width_px // SIZE_MULTIPLE_PX

    def _violations(self) -> Iterator[Violation]:
        yield from size_violations(self.width_px, self.height_px, self.limits)
        yield from prompt_violations("prompt", self.prompt, self.limits)
        yield from self._guidance_violations()
        if not 1 <= self.steps <= self.limits.step_count:
            yield Violation("step_count", f"is {self.steps}; must be in [1, {self.limits.step_count}]")
        if not 1 <= len(self.seeds) <= self.limits.image_count:
            yield Violation("image_count", f"is {len(self.seeds)}; must be in [1, {self.limits.image_count}]")
        for seed in self.seeds[: self.limits.image_count]:
            if not 0 <= seed < SEED_LIMIT:
                yield Violation("seed", f"is {seed}; must be in [0, 2^63 - 1]")
        if not 0 <= self.reference_count <= self.limits.reference_count:
            yield Violation(
                "references",
                f"has {self.reference_count} images; at most {self.limits.reference_count} are allowed",
            )
        yield from adapter_violations(self.adapters, self.limits)

    def _guidance_violations(self) -> Iterator[Violation]:
        if self.is_distilled and self.negative_prompt:
            yield Violation(
                "negative_prompt", "is not taken by distilled models; use a base model or leave it out"
            )
        if self.negative_prompt is not None:
            yield from prompt_violations("negative_prompt", self.negative_prompt, self.limits)
        if not math.isfinite(self.guidance):
            yield Violation("guidance_scale", f"is {self.guidance}; must be a finite number")
        elif self.is_distilled and self.guidance != 1.0:
            yield Violation(
                "guidance_scale",
                f"is {self.guidance:g}; distilled models take no other value than 1: leave it out",
            )
        elif not 1.0 <= self.guidance <= self.limits.guidance_scale:
            yield Violation(
                "guidance_scale", f"is {self.guidance:g}; must be in [1, {self.limits.guidance_scale:g}]"
            )


def size_violations(width_px: int, height_px: int, limits: Limits = DEFAULT_LIMITS) -> Iterator[Violation]:
    """Yields what is wrong with an image's size, a violation for each field."""
    sides_are_good = True
    for name, value in (("width_px", width_px), ("height_px", height_px)):
        if value < limits.side_px:
            sides_are_good = False
            yield Violation(name, f"is {value}; must be at least {limits.side_px}")
        elif value % SIZE_MULTIPLE_PX:
            sides_are_good = False
            below = value - value % SIZE_MULTIPLE_PX
            nearest = f"{below} or {below + SIZE_MULTIPLE_PX}"
            yield Violation(
                name, f"is {value}; must be a multiple of {SIZE_MULTIPLE_PX}, for example {nearest}"
            )
    if sides_are_good and width_px * height_px > limits.pixel_count:
        yield Violation(
            "width_px",
            f"times height_px is {width_px} × {height_px} = {width_px * height_px} pixels; "
            f"at most {limits.pixel_count} are allowed",
        )


def default_side_px(side_px: int, pixel_count: int) -> int:
    """Returns the side of a square image by default: `side_px`, or the largest allowed side where that is smaller."""
    return min(side_px, math.isqrt(pixel_count) // SIZE_MULTIPLE_PX * SIZE_MULTIPLE_PX)


def fitted_size(width_px: int, height_px: int, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Returns a size as it is where its pixels are within the limit, and else a smaller one of a like aspect ratio.

    Of the sizes that use at least three quarters of the limit, it is the one whose aspect ratio is nearest, and the
    largest of several.

    Args:
        width_px: a multiple of 16, at least `limits.side_px`.
        height_px: likewise.
        limits: `pixel_count` is at least `side_px` squared.
    """
    if width_px * height_px <= limits.pixel_count:
        return width_px, height_px
    aspect = width_px / height_px
    smallest = limits.side_px // SIZE_MULTIPLE_PX
    token_count = limits.pixel_count // SIZE_MULTIPLE_PX**2

    def sizes() -> Iterator[tuple[int, int]]:
        for rows in range(smallest, token_count // smallest + 1):
            fewest, most = max(smallest, math.ceil(0.75 * token_count / rows)), token_count // rows
            for columns in (math.floor(rows * aspect), math.ceil(rows * aspect)):
                yield min(max(columns, fewest), most), rows

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        columns, rows = size
        return abs(math.log(columns / rows / aspect)), -columns * rows

    columns, rows = min(sizes(), key=distance)
    return columns * SIZE_MULTIPLE_PX, rows * SIZE_MULTIPLE_PX


def prompt_violations(name: str, prompt: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[Violation]:
    """Yields what is wrong with a prompt; an empty one is fine."""
    if len(prompt) > limits.prompt_characters:
        yield Violation(name, f"has {len(prompt)} characters; at most {limits.prompt_characters} are allowed")
    elif _SURROGATE.search(prompt):
        yield Violation(name, "has a lone surrogate; it must be valid Unicode text")


def adapter_violations(
    adapters: Sequence[AdapterChoice], limits: Limits = DEFAULT_LIMITS
) -> Iterator[Violation]:
    """Yields what is wrong with a request's adapters without reading their files."""
    if len(adapters) > limits.adapter_count:
        yield Violation("adapters", f"has {len(adapters)}; at most {limits.adapter_count} are allowed")
    seen: set[str] = set()
    for index, adapter in enumerate(adapters[: limits.adapter_count]):
        if not ADAPTER_NAME.fullmatch(adapter.name):
            yield Violation(
                f"adapters[{index}].name",
                f"is {adapter.name[:_SHOWN_CHARACTERS]!r}; must be {ADAPTER_NAME_RULE}",
            )
        elif adapter.name in seen:
            yield Violation(f"adapters[{index}].name", f"is {adapter.name!r} again; name each adapter once")
        seen.add(adapter.name)
        if not abs(adapter.scale) <= limits.adapter_scale:
            bound = f"{limits.adapter_scale:g}"
            yield Violation(
                f"adapters[{index}].scale", f"is {adapter.scale:g}; must be in [-{bound}, {bound}]"
            )


DEFAULT_STRENGTH = 0.8
"""Share of the steps that are run on an initial image; diffusers' own default."""
MAXIMUM_MASK_PADDING_PX = 1024


@dataclass(frozen=True)
class Expansion:
    """Pixels added on each side of an initial image."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __bool__(self) -> bool:
        return any((self.left, self.top, self.right, self.bottom))


NO_EXPANSION = Expansion()


def inpainting_violations(
    *,
    has_initial_image: bool,
    has_mask: bool,
    strength: float | None,
    mask_padding_px: int | None,
    expand: Expansion,
    has_size: bool,
) -> Iterator[Violation]:
    """Yields what is wrong with the fields of a masked edit, before any file is opened."""
    if not has_initial_image:
        given = {
            "mask": has_mask,
            "strength": strength is not None,
            "mask_padding_px": mask_padding_px is not None,
            "expand": bool(expand),
        }
        for name in (name for name, is_given in given.items() if is_given):
            yield Violation(name, "needs an initial_image")
        return
    if has_size:
        yield Violation("width_px", "and height_px cannot be given: the initial_image decides the size")
    if strength is not None and not 0 < strength <= 1:
        yield Violation("strength", f"is {strength:g}; must be above 0 and at most 1")
    if mask_padding_px is not None:
        if not has_mask:
            yield Violation("mask_padding_px", "needs a mask")
        if not 0 <= mask_padding_px <= MAXIMUM_MASK_PADDING_PX:
            yield Violation(
                "mask_padding_px", f"is {mask_padding_px}; must be in [0, {MAXIMUM_MASK_PADDING_PX}]"
            )
    if min(expand.left, expand.top, expand.right, expand.bottom) < 0:
        yield Violation("expand", "has a negative side; each must be 0 or more pixels")

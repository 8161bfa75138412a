"""Limits of a request."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from klein_core.errors import InvalidInput
from klein_core.params import DEFAULT_LIMITS, GenerationParams, Limits, fitted_size, size_violations


def fields_refused(**arguments) -> list[str]:
    complete = {"width_px": 64, "height_px": 64, "is_distilled": False, **arguments}
    try:
        GenerationParams(**complete)
    except InvalidInput as error:
        return [violation.field for violation in error.violations]
    return []


@given(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70))
def test_a_size_is_taken_exactly_when_it_is_within_the_limits(width: int, height: int):
    good = width >= 64 and height >= 64 and width % 16 == height % 16 == 0 and width * height <= 4 * 1024**2
    assert (not fields_refused(width_px=width, height_px=height)) == good


@pytest.mark.parametrize(("width", "height"), [(64, 64), (2048, 2048), (64, 65536), (1040, 4032)])
def test_sizes_at_the_bound_are_taken(width: int, height: int):
    assert not fields_refused(width_px=width, height_px=height)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"width_px": 2064, "height_px": 2048}, "width_px"),
        ({"width_px": 63}, "width_px"),
        ({"height_px": 72}, "height_px"),
        ({"step_count": 0}, "step_count"),
        ({"step_count": 100000}, "step_count"),
        ({"seeds": (-1,)}, "seed"),
        ({"seeds": (2**63,)}, "seed"),
        ({"seeds": ()}, "image_count"),
        ({"seeds": tuple(range(9))}, "image_count"),
        ({"prompt": "a\ud800"}, "prompt"),
        ({"negative_prompt": "\udfffb"}, "negative_prompt"),
        ({"reference_count": 5}, "references"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 101.0}, "guidance_scale"),
        ({"guidance_scale": 4.0, "is_distilled": True}, "guidance_scale"),
        ({"guidance_scale": math.nan, "is_distilled": True}, "guidance_scale"),
        ({"negative_prompt": "dull", "is_distilled": True}, "negative_prompt"),
        ({"prompt": "x" * 32769}, "prompt"),
        ({"negative_prompt": "x" * 32769}, "negative_prompt"),
    ],
)
def test_each_limit_names_its_field(arguments: dict, field: str):
    assert fields_refused(**arguments) == [field]


def test_values_at_the_bounds_are_taken():
    assert not fields_refused(
        step_count=1000, seeds=(0, 2**63 - 1), reference_count=4, guidance_scale=100.0, prompt="x" * 32768
    )


def test_ten_references_are_allowed_by_setting():
    assert not fields_refused(reference_count=10, limits=Limits(reference_count=10))


def test_a_message_has_the_value_and_the_limit():
    with pytest.raises(
        InvalidInput, match=r"width_px: is 100; must be a multiple of 16, for example 96 or 112"
    ):
        GenerationParams(width_px=100, height_px=64, is_distilled=True)


@pytest.mark.parametrize(("distilled", "steps", "guidance"), [(True, 4, 1.0), (False, 50, 4.0)])
def test_unset_means_the_models_default(distilled: bool, steps: int, guidance: float):
    params = GenerationParams(width_px=64, height_px=64, is_distilled=distilled)
    assert (params.steps, params.guidance, params.uses_guidance) == (steps, guidance, not distilled)


def test_no_more_is_said_of_seeds_than_images_are_allowed():
    assert fields_refused(seeds=(-1,) * 1000) == ["image_count", *["seed"] * 8]


@given(st.integers(4, 256), st.integers(4, 256), st.integers(64 * 64, DEFAULT_LIMITS.pixel_count))
@example(
    33, 18, 41216
)  # 16.5 columns: the upper neighbor's ratio is nearer, though both are half a column away
def test_a_fitted_size_is_as_large_as_allowed_and_of_a_like_shape(columns, rows, pixel_count):
    limits = Limits(pixel_count=pixel_count)
    width_px, height_px = fitted_size(columns * 16, rows * 16, limits)
    assert not list(size_violations(width_px, height_px, limits))
    if columns * rows * 256 <= pixel_count:
        assert (width_px, height_px) == (columns * 16, rows * 16)
        return
    assert width_px * height_px >= 0.7 * pixel_count - 256
    # The bounds on the smallest side apart, no size of the kind that simple scaling gives is of a better shape.
    scale = math.sqrt(pixel_count / (columns * rows * 256))
    simple = (int(columns * scale), int(rows * scale))
    if min(simple) >= 4 and simple[0] * simple[1] * 256 >= 0.75 * pixel_count:
        aspect = columns / rows
        assert (
            abs(math.log(width_px / height_px / aspect))
            <= abs(math.log(simple[0] / simple[1] / aspect)) + 1e-9
        )


@pytest.mark.parametrize(
    ("size_px", "pixel_count", "fitted_px"),
    [
        ((1024, 1024), 65536, (256, 256)),
        ((1248, 832), 65536, (288, 192)),
        ((2048, 256), 65536, (640, 80)),
        ((352, 2896), 4096, (64, 64)),
        ((256, 256), 65536, (256, 256)),
    ],
)
def test_sizes_that_are_too_large_are_scaled_to_fit(size_px, pixel_count, fitted_px):
    assert fitted_size(*size_px, Limits(pixel_count=pixel_count)) == fitted_px

"""Pixels to bytes exactly as diffusers rounds, and files that keep them."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, JpegImagePlugin

from klein_core.errors import InvalidInput
from klein_core.image_format import METADATA_BYTE_LIMIT, SIDE_LIMITS_PX, format_size_violations
from klein_core.vae_decoder.image_io import encode_image, to_rgb_bytes

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def fields(caught) -> list[str]:
    return [violation.field for violation in caught.value.violations]


@given(
    arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-1.5, 1.5, width=32)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_equals_diffusers(values, dtype):
    image = torch.from_numpy(values).to(dtype)
    expected = Flux2ImageProcessor().postprocess(image[None], output_type="pil")[0]
    assert np.array_equal(to_rgb_bytes(image).numpy(), np.array(expected))


def test_bytes_are_rounded_not_truncated():
    image = torch.full((3, 1, 1), 2 * 100.6 / 255 - 1)
    assert to_rgb_bytes(image).flatten().tolist() == [101, 101, 101]


def test_png_and_raw_keep_every_pixel():
    decoded = Image.open(BytesIO(encode_image(PIXELS, "png")))
    assert (decoded.format, decoded.mode) == ("PNG", "RGB")
    assert np.array_equal(np.array(decoded), PIXELS.numpy())
    assert encode_image(PIXELS, "raw") == PIXELS.numpy().tobytes()


def test_jpeg_keeps_full_color_resolution():
    decoded = Image.open(BytesIO(encode_image(PIXELS, "jpeg")))
    assert (decoded.format, decoded.size) == ("JPEG", (48, 32))
    assert JpegImagePlugin.get_sampling(decoded) == 0


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_quality_trades_size_and_defaults_to_95(image_format):
    sizes = [len(encode_image(PIXELS, image_format, quality)) for quality in (1, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]
    assert encode_image(PIXELS, image_format) == encode_image(PIXELS, image_format, 95)


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_quality_outside_its_range_is_refused(quality):
    with pytest.raises(InvalidInput, match=r"\[1, 100\]") as caught:
        encode_image(PIXELS, "jpeg", quality)
    assert fields(caught) == ["quality"]


def test_every_violation_is_named():
    with pytest.raises(InvalidInput) as caught:
        encode_image(PIXELS, "tiff", 200, {"": "x"})
    assert fields(caught) == ["format", "quality", "metadata"]


@pytest.mark.parametrize("image_format", ["png", "raw"])
def test_quality_of_a_lossless_format_is_refused_not_ignored(image_format):
    with pytest.raises(InvalidInput) as caught:
        encode_image(PIXELS, image_format, 90)
    assert fields(caught) == ["quality"]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_metadata_comes_back(image_format):
    metadata = {"Software": "klein-suite", "prompt": "ein Kätzchen 猫\n\N{CAT FACE}"}
    image = Image.open(BytesIO(encode_image(PIXELS, image_format, metadata=metadata)))
    if image_format == "png":
        assert image.text == metadata
        return
    exif = image.getexif()
    comment = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == metadata
    assert exif[ExifTags.Base.Software] == "klein-suite"


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_metadata_fits_up_to_its_limit(image_format):
    largest = {"prompt": "x" * (METADATA_BYTE_LIMIT - len('{"prompt": ""}'))}
    assert encode_image(PIXELS, image_format, metadata=largest)
    with pytest.raises(InvalidInput, match=str(METADATA_BYTE_LIMIT)):
        encode_image(PIXELS, image_format, metadata={"prompt": largest["prompt"] + "x"})


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_software_that_is_stored_twice_is_counted_twice(image_format):
    assert encode_image(PIXELS, image_format, metadata={"Software": "x" * 29_900})
    with pytest.raises(InvalidInput, match=str(METADATA_BYTE_LIMIT)) as caught:
        encode_image(PIXELS, image_format, metadata={"Software": "x" * 40_000})
    assert fields(caught) == ["metadata"]


def test_what_is_said_of_bad_keys_is_bounded():
    metadata = {"x" * (1000 + index): "" for index in range(40)}
    with pytest.raises(InvalidInput) as caught:
        encode_image(PIXELS, "png", metadata=metadata)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_format_is_written_up_to_its_longest_side_and_refused_beyond(image_format, axis):
    limit = SIDE_LIMITS_PX[image_format]
    shape = [limit, 2] if axis == 0 else [2, limit]
    assert encode_image(torch.zeros(*shape, 3, dtype=torch.uint8), image_format, 1)
    shape[axis] += 1
    with pytest.raises(InvalidInput, match=f"{image_format} allows at most {limit}") as caught:
        encode_image(torch.zeros(*shape, 3, dtype=torch.uint8), image_format, 1)
    assert fields(caught) == [("height_px", "width_px")[axis]]


@pytest.mark.parametrize("image_format", ["png", "raw"])
def test_other_formats_have_room_for_the_longest_image_of_any_request(image_format):
    assert not list(format_size_violations(image_format, 65_536, 65_536))
    assert encode_image(torch.zeros(65_536, 2, 3, dtype=torch.uint8), image_format)

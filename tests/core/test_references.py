"""References prepared as diffusers prepares them, and every kind of file that must be refused."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.utils import load_image
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from klein_core.errors import InvalidInput
from klein_core.vae_decoder.image_io import ReferenceLimits, fit_reference, prepare_reference
from tests.tiny.image_files import encoded, png_bomb, sixteen_bit_png, webp_bomb


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    rows = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(rows.squeeze())


def as_diffusers_prepares(image: Image.Image) -> np.ndarray:
    """The steps of diffusers' klein pipeline on one reference, back as bytes."""
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(image)
    width, height = image.size
    if width * height > 1024 * 1024:
        image = processor._resize_to_target_area(image, 1024 * 1024)
        width, height = image.size
    tensor = processor.preprocess(image, height=height // 16 * 16, width=width // 16 * 16, resize_mode="crop")
    return ((tensor[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8)


def refusal(data: bytes, **arguments) -> str:
    with pytest.raises(InvalidInput) as caught:
        prepare_reference(data, field="references[1]", **arguments)
    assert {violation.field for violation in caught.value.violations} == {"references[1]"}
    return str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.integers(64, 2000), st.integers(64, 2000))
@example(1024, 1024)
@example(1024, 1025)
@example(2000, 250)
@example(79, 64)
def test_fitting_equals_diffusers_pixel_for_pixel(width, height):
    assume(max(width, height) <= 8 * min(width, height))
    image = noise(width, height)
    fitted = fit_reference(image)
    assert fitted.width % 16 == fitted.height % 16 == 0
    assert fitted.width * fitted.height <= 1024 * 1024
    assert np.array_equal(np.array(fitted), as_diffusers_prepares(image))


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise(90, 70).convert("CMYK"), "JPEG", quality=95),
        encoded(noise(90, 70).quantize(17)),
        encoded(noise(90, 70, 4)),
        encoded(noise(90, 70).convert("LA")),
        encoded(noise(90, 70, 1)),
        encoded(noise(90, 70).convert("1")),
        encoded(noise(90, 70), "WEBP"),
        encoded(noise(90, 70), "BMP"),
        encoded(noise(90, 70), "GIF", save_all=True, append_images=[ImageOps.invert(noise(90, 70))]),
        encoded(noise(90, 70), "WEBP", save_all=True, append_images=[ImageOps.invert(noise(90, 70))]),
    ],
    ids=["cmyk", "palette", "alpha", "gray alpha", "gray", "bilevel", "webp", "bmp", "gif", "animated webp"],
)
def test_every_kind_of_picture_is_read_as_load_image_reads_it(data):
    opened = load_image(Image.open(BytesIO(data)))
    assert np.array_equal(np.array(prepare_reference(data)), as_diffusers_prepares(opened))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_load_image_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(160, 64), "JPEG", exif=exif, quality=95)
    prepared = prepare_reference(data)
    assert prepared.size == ((160, 64) if orientation < 5 else (64, 160))
    opened = load_image(Image.open(BytesIO(data)))
    assert np.array_equal(np.array(prepared), as_diffusers_prepares(opened))


def test_sixteen_bit_gray_keeps_its_tones():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    prepared = np.array(prepare_reference(encoded(Image.fromarray(ramp.astype(np.uint16)))))
    assert np.abs(prepared - (ramp / 257)[..., None]).max() <= 0.51


@pytest.mark.parametrize("channels", [2, 3, 4], ids=["LA", "RGB", "RGBA"])
def test_sixteen_bit_colors_keep_their_tones_and_lose_their_alpha(channels):
    ramp = np.linspace(0, 65535, 64 * 64 * channels).reshape(64, 64, channels)
    data = sixteen_bit_png(ramp)
    prepared = prepare_reference(data)
    tones = ramp[..., :3] if channels > 2 else ramp[..., :1]
    assert np.abs(np.array(prepared) - tones / 257).max() < 1
    assert np.array_equal(np.array(prepared), as_diffusers_prepares(load_image(Image.open(BytesIO(data)))))


@pytest.mark.parametrize(
    ("width", "height", "limit"),
    [(1, 4000, "64"), (63, 64, "64"), (64, 63, "64"), (513, 64, "8 times"), (64, 513, "8 times")],
)
def test_sides_and_ratio_outside_kleins_limits_are_refused(width, height, limit):
    assert limit in refusal(encoded(noise(width, height)))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 64), (64, 512)])
def test_the_limits_themselves_are_allowed(width, height):
    assert prepare_reference(encoded(noise(width, height))).size == (width, height)


def test_both_violations_of_a_sliver_are_named():
    message = refusal(encoded(noise(1, 4000)))
    assert "at least 64" in message
    assert "8 times" in message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"RIFF\0\0\0\0WEBP",
        b"<svg/>",
        b"\0" * 4096,
    ],
)
def test_what_is_not_an_image_is_refused(data):
    assert "image" in refusal(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_anywhere_is_refused(image_format):
    data = encoded(noise(80, 80), image_format)
    for kept in (30, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        assert "image" in refusal(data[:kept])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
def test_damaged_bytes_give_a_picture_or_a_refusal_and_nothing_else(image_format, draw):
    data = bytearray(encoded(noise(64, 64), image_format))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    # Any exception but the refusal is a failure.
    with suppress(InvalidInput):
        assert prepare_reference(bytes(data)).mode == "RGB"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the pictures whose pixels were decoded."""
    sizes: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def noting(image: ImageFile.ImageFile) -> object:
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting)
    return sizes


@pytest.mark.parametrize("side", [9_000, 12_000, 16_384, 60_000, 65_535])
@pytest.mark.parametrize("bomb", [png_bomb, webp_bomb])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(decoded, bomb, side):
    assert "pixels" in refusal(bomb(side))
    assert decoded == []
    small = noise(64, 64)
    prepare_reference(encoded(small, "PNG" if bomb is png_bomb else "WEBP"))
    assert set(decoded) == {small.size}


def test_the_byte_limit_is_checked_and_named():
    data = encoded(noise(64, 64))
    limits = ReferenceLimits(byte_count=len(data))
    assert prepare_reference(data, limits=limits)
    assert str(len(data)) in refusal(data + b"\0", limits=limits)


def test_the_pixel_limit_is_checked_and_named():
    limits = ReferenceLimits(pixel_count=64 * 80)
    assert prepare_reference(encoded(noise(64, 80)), limits=limits)
    assert "5120" in refusal(encoded(noise(65, 80)), limits=limits)


def test_a_format_outside_the_list_is_refused_by_name():
    assert "PNG, JPEG, WEBP" in refusal(encoded(noise(64, 64), "TIFF"))

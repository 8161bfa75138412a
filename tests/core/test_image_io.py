"""Image input and output: pixels to files as diffusers rounds, references prepared as diffusers prepares them."""

from __future__ import annotations

import json
from contextlib import suppress
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.utils import load_image
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageFile, ImageOps, JpegImagePlugin

from klein_core.errors import InvalidInput
from klein_core.image_format import (
    METADATA_BYTE_LIMIT,
    SIDE_LIMITS_PX,
    TRAINED_ALGORITHMIC_MEDIA,
    format_size_violations,
)
from klein_core.vae_decoder.image_io import (
    ReferenceLimits,
    encode_image,
    fit_reference,
    prepare_reference,
    to_rgb_bytes,
)
from tests.tiny.image_files import encoded, png_bomb, sixteen_bit_png, webp_bomb

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
@pytest.mark.parametrize("model", ["pico", "<a & 'b' \">", "x" * 50_000])
def test_the_digital_source_type_is_in_xmp_and_changes_no_pixel(image_format, model):
    metadata = {"DigitalSourceType": TRAINED_ALGORITHMIC_MEDIA, "model": model}
    image = Image.open(BytesIO(encode_image(PIXELS, image_format, metadata=metadata)))
    packet = image.info["xmp"] if image_format != "png" else image.text["XML:com.adobe.xmp"].encode()
    description = next(
        element for element in ElementTree.fromstring(packet).iter() if element.tag.endswith("}Description")
    )
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert description.get(f"{iptc}DigitalSourceType") == TRAINED_ALGORITHMIC_MEDIA
    assert description.get(f"{iptc}AISystemUsed") == model[:512]
    plain = Image.open(BytesIO(encode_image(PIXELS, image_format)))
    assert image.tobytes() == plain.tobytes()
    assert "xmp" not in plain.info


def test_another_digital_source_type_is_refused():
    with pytest.raises(InvalidInput, match="DigitalSourceType 'digitalArt'") as caught:
        encode_image(PIXELS, "png", metadata={"DigitalSourceType": "digitalArt"})
    assert fields(caught) == ["metadata"]


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


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    rows = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(rows.squeeze())


def as_diffusers_prepares(image: Image.Image) -> np.ndarray:
    """Runs the steps of diffusers' klein pipeline on one reference; returns its bytes."""
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


@settings(max_examples=12, deadline=None)
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
    """Records the sizes of images whose pixels were decoded."""
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

"""Watermark: what marks images, where it is named, and that no image leaves unmarked."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager
from importlib import metadata

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from klein_api.v1 import image_pb2, vae_decoder_service_pb2_grpc
from klein_api.v1.stage_service_pb2 import DescribeStageRequest
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import SettingsError
from klein_services.vae_decoder.settings import VaeDecoderSettings
from klein_services.vae_decoder.watermark import Watermark
from tests.services.fakes.vae_decoder_calls import (
    decode,
    decode_parts,
    latents,
    overlay_parts,
    picture,
    refusal,
    tiny_application,
)

CORNER = (7, 99, 201)
is_broken = False
"""Whether `mark_or_fail` fails from now on."""


def mark(pixels):
    """Marks in place."""
    assert isinstance(pixels, np.ndarray)
    pixels[0, 0] = CORNER
    return pixels


def mark_as_tensor(pixels):
    return torch.from_numpy(mark(pixels))


def mark_as_view(pixels):
    """Returns what no tensor can share: a read-only array with negative strides."""
    mark(pixels)
    turned = np.ascontiguousarray(pixels[::-1])[::-1]
    turned.setflags(write=False)
    return turned


def mark_or_fail(pixels):
    if is_broken:
        raise RuntimeError("CUDA error: the secret key is 42")
    return mark(pixels)


def mark_or_shrink(pixels):
    return pixels[:-1] if is_broken else mark(pixels)


def mark_or_convert(pixels):
    return pixels.astype(np.float32) if is_broken else mark(pixels)


def mark_or_forget(pixels):
    return None if is_broken else mark(pixels)


@asynccontextmanager
async def stage(checkpoint, name):
    """Yields a stub of a vae-decoder that marks with this module's function, and its channel."""
    application = tiny_application(checkpoint, watermark=f"{__name__}:{name}" if name else "")
    async with running_server(application) as address, open_channel(address) as channel:
        yield vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel), channel


def pixels_of(data) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("name", ["mark", "mark_as_tensor", "mark_as_view"])
async def test_every_image_is_marked_and_nothing_else_changes(tiny_checkpoint, name):
    async with stage(tiny_checkpoint, "") as (stub, _):
        _, plain = await decode(stub, decode_parts(latents()))
    async with stage(tiny_checkpoint, name) as (stub, channel):
        _, marked = await decode(stub, decode_parts(latents()))
        _, raw = await decode(stub, decode_parts(latents(), format=image_pb2.IMAGE_FORMAT_RAW_RGB))
        description = await StageServiceStub(channel).DescribeStage(DescribeStageRequest())
    expected = pixels_of(plain).copy()
    assert tuple(expected[0, 0]) != CORNER
    expected[0, 0] = CORNER
    assert np.array_equal(pixels_of(marked), expected)
    assert raw == expected.tobytes()
    assert description.vae_decoder.watermark == f"{__name__}:{name}"


async def test_the_overlay_of_a_masked_edit_is_marked_too(tiny_checkpoint):
    right_half, mask = Image.new("L", (96, 64)), io.BytesIO()
    right_half.paste(255, (48, 0, 96, 64))
    right_half.save(mask, "PNG")
    async with stage(tiny_checkpoint, "mark") as (stub, _):
        _, data = await decode(stub, overlay_parts(latents(), picture(), mask.getvalue()))
    expected = pixels_of(picture())[:, :32].copy()
    expected[0, 0] = CORNER
    assert np.array_equal(pixels_of(data)[:, :32], expected)


@pytest.mark.parametrize("name", ["mark_or_fail", "mark_or_shrink", "mark_or_convert", "mark_or_forget"])
async def test_an_image_that_cannot_be_marked_is_not_sent(tiny_checkpoint, name, monkeypatch, caplog):
    async with stage(tiny_checkpoint, name) as (stub, _):
        monkeypatch.setattr(f"{__name__}.is_broken", True)
        details = await refusal(decode(stub, decode_parts(latents())))
        assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
        assert "secret" not in details.message
        assert f"the watermark {__name__}:{name}" in caplog.text
        monkeypatch.setattr(f"{__name__}.is_broken", False)
        _, data = await decode(stub, decode_parts(latents()))
        assert tuple(pixels_of(data)[0, 0]) == CORNER


def test_a_watermark_that_fails_at_the_start_stops_it(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(f"{__name__}.is_broken", True)
    application = tiny_application(tiny_checkpoint, watermark=f"{__name__}:mark_or_shrink")
    with pytest.raises(
        SettingsError, match=r"KLEIN_WATERMARK: .* returned uint8 \(63, 64, 3\); it must return"
    ):
        application.load_model()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:mark", "No module named 'no_such_module'"),
        (f"{__name__}:absent", "has no attribute 'absent'"),
        (f"{__name__}:CORNER", "is a tuple and not callable"),
        ("unregistered", "no entry point of the group klein_suite.watermarks"),
        (":", "Empty module name"),
    ],
)
def test_a_name_that_leads_nowhere_is_a_bad_setting(name, reason):
    (problem,) = VaeDecoderSettings(watermark=name).problems()
    assert problem.startswith(f"KLEIN_WATERMARK is {name!r}, which")
    assert reason in problem


def test_an_entry_point_is_found_by_its_name(monkeypatch, tmp_path):
    folder = tmp_path / "corner-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: corner\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[klein_suite.watermarks]\ncorner = {__name__}:mark\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.entry_points(group="klein_suite.watermarks", name="corner")
    marked = Watermark("corner").applied(torch.zeros(16, 16, 3, dtype=torch.uint8))
    assert tuple(marked[0, 0].tolist()) == CORNER

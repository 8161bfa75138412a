"""Large image files: one is read at a time, small ones pass them, and their pixels are bounded."""

import asyncio
import io
import threading
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
from PIL import Image

from klein_api.v1 import image_pb2, vae_decoder_service_pb2_grpc
from klein_core.vae_decoder.image_io import decode_rgb, open_image
from klein_services.runtime.channels import open_channel
from klein_services.runtime.errors import QueueFull
from klein_services.runtime.server import running_server
from klein_services.runtime.work_queue import LARGE_PIXEL_COUNT
from klein_services.vae_decoder.servicer import VaeDecoderStage
from klein_services.vae_decoder.settings import VaeDecoderSettings
from klein_services.vae_decoder.uploads import LEAST_PIXEL_COUNT
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.vae_decoder_calls import (
    encode_initial_image,
    encode_reference,
    initial_image_parts,
    picture,
    reference_parts,
    refusal,
    tiny_application,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIDE_PX = 2064
assert SIDE_PX**2 > LARGE_PIXEL_COUNT


def plain(side_px, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (side_px, side_px)).save(file, "PNG")
    return file.getvalue()


LARGE = plain(SIDE_PX)


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    return tiny_application(tiny_checkpoint)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(application):
    async with running_server(application) as address, open_channel(address) as channel:
        yield vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)


@pytest.fixture
def gate(application, monkeypatch):
    """Holds the reading of every initial image until it is set."""
    opened, read_initial_image = threading.Event(), application.read_initial_image

    def read(files):
        if not opened.wait(60):
            raise TimeoutError
        return read_initial_image(files)

    monkeypatch.setattr(application, "read_initial_image", read)
    yield opened
    opened.set()


async def test_small_files_pass_large_ones_that_run_and_wait(application, stub, gate):
    # Scaled down to the least area, so that the device has little to do.
    parts = [initial_image_parts(LARGE, pixel_count=LEAST_PIXEL_COUNT) for _ in range(2)]
    large = [asyncio.create_task(encode_initial_image(stub, each)) for each in parts]
    await until(lambda: application.files.queued_count == 1)
    for _ in range(3):
        summary, _ = await encode_reference(
            stub, reference_parts(picture(), priority=image_pb2.PRIORITY_BATCH)
        )
        assert (summary.width_px, summary.height_px) == (96, 64)
    assert (application.files.queued_count, application.files.running_count) == (1, 1)
    gate.set()
    for summary, *_ in await asyncio.gather(*large):
        assert (summary.width_px, summary.height_px) == (64, 64)


async def test_pixels_of_large_files_that_wait_are_bounded(tiny_checkpoint):
    settings = VaeDecoderSettings(model_path=str(tiny_checkpoint), host="127.0.0.1", metrics_port=0)
    application = VaeDecoderStage(replace(settings, queue_pixel_count=SIDE_PX**2))
    may_end = threading.Event()
    first = asyncio.create_task(application.files.run(may_end.wait, pixel_count=SIDE_PX**2))
    await until(lambda: application.files.running_count == 1)
    with pytest.raises(QueueFull, match="pixels of large images wait"):
        await application.files.run(lambda: None, pixel_count=SIDE_PX**2)
    await application.files.run(lambda: None, pixel_count=LARGE_PIXEL_COUNT)
    may_end.set()
    await first
    await application.close()


async def test_an_unknown_priority_is_refused_by_name(stub):
    details = await refusal(encode_reference(stub, reference_parts(picture(), priority=77)))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.violations[0].field == "priority"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
async def test_pixels_are_those_of_a_copy_that_is_turned_and_converted(mode, orientation):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.effect_noise((70, 90), 60).convert(mode)
    image.save(file, "PNG", exif=exif)
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    expected = (image if turned is None else image.transpose(turned)).convert("RGB")
    read = decode_rgb(open_image(file.getvalue(), field="reference"), "reference")
    assert (read.mode, read.size, read.tobytes()) == ("RGB", expected.size, expected.tobytes())

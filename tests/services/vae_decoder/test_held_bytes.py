"""The bound on bytes of files and pixels that wait: what is refused at it, and what gives bytes back."""

import asyncio

import grpc
import pytest
import pytest_asyncio

from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_api.v1 import vae_decoder_service_pb2_grpc
from klein_services.runtime.admission import RetryTimes
from klein_services.runtime.channels import open_channel
from klein_services.runtime.errors import QueueFull
from klein_services.runtime.server import running_server
from klein_services.vae_decoder.held_bytes import ENCODING_SHARE, PIXEL_BYTES, HeldBytes
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.vae_decoder_calls import (
    decode,
    encode_initial_image,
    encode_reference,
    initial_image_parts,
    latents,
    overlay_parts,
    picture,
    reference_parts,
    refusal,
    tiny_application,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
LIMIT = 1 << 20
ENCODING_LIMIT = int(LIMIT * ENCODING_SHARE)
PIXELS = PIXEL_BYTES * 96 * 64


def padded(size_bytes):
    """A picture of 96 × 64 pixels; decoders ignore what follows it."""
    return picture().ljust(size_bytes, b"\0")


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    return tiny_application(tiny_checkpoint, queue_bytes=LIMIT)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(application):
    async with running_server(application) as address, open_channel(address) as channel:
        yield vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)


class Upload:
    """A reference whose last byte is not sent before `end`."""

    def __init__(self, stub, size_bytes):
        self._may_end = asyncio.Event()
        self._data = padded(size_bytes)
        self.answer = asyncio.create_task(encode_reference(stub, self._parts()))

    async def _parts(self):
        for part in reference_parts(self._data[:-1]):
            yield part
        await self._may_end.wait()
        yield pb.EncodeReferenceRequest(image_chunk=self._data[-1:])

    async def end(self):
        self._may_end.set()
        return await self.answer


async def test_files_fill_the_bound_and_what_comes_then_is_refused_until_they_are_read(application, stub):
    first = Upload(stub, ENCODING_LIMIT - 30_000)
    await until(lambda: application.held_bytes.in_use == ENCODING_LIMIT - 30_001)
    for parts in (reference_parts(padded(30_002)), reference_parts(padded(30_000 - PIXELS))):
        # The second one's file has room, its pixels have not.
        details = await refusal(encode_reference(stub, parts))
        assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{ENCODING_LIMIT} bytes of images wait" in details.message
        assert details.retry_after_seconds > 0
    details = await refusal(encode_initial_image(stub, initial_image_parts(padded(30_002))))
    assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    # The rest is for images that have been denoised.
    await decode(stub, overlay_parts(latents(), padded(100_000)))
    assert application.held_bytes.in_use == ENCODING_LIMIT - 30_001
    first.answer.cancel()
    await until(lambda: application.held_bytes.in_use == 0)
    await encode_reference(stub, reference_parts(padded(30_002)))
    await until(lambda: application.held_bytes.in_use == 0)


async def test_a_request_alone_may_hold_more_than_the_bound(application, stub):
    alone = Upload(stub, LIMIT + LIMIT // 4)
    await until(lambda: application.held_bytes.in_use > LIMIT)
    details = await refusal(encode_reference(stub, reference_parts(picture())))
    assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    summary, _ = await alone.end()
    assert (summary.width_px, summary.height_px) == (96, 64)
    await until(lambda: application.held_bytes.in_use == 0)


async def test_the_bound_is_exact_and_hints_are_places_in_line():
    now = [0.0]
    every = HeldBytes(100, "test", clock=lambda: now[0], retry_times=RetryTimes(lambda: 0.5))
    with every.request() as first, every.request(0.5) as second:
        first.add(49)
        second.add(1)
        with pytest.raises(QueueFull, match="50 bytes of images wait"):
            second.add(1)
        first.add(50)
        hints = []
        for _ in range(3):
            with pytest.raises(QueueFull) as refused:
                first.add(1)
            hints.append(refused.value.retry_after_seconds)
        # One request is assumed to take a second, two hold bytes, and the first place was promised above.
        assert hints == [1.0, 1.5, 2.0]
        assert (every.in_use, first.count, second.count) == (100, 99, 1)
        second.release(1)
        first.add(1)
        assert every.in_use == 100
    assert every.in_use == 0

"""Bad input of the vae-decoder: each gets the status, the field and the limit, and leaves nothing running."""

import asyncio
import math
from itertools import islice

import grpc
import pytest
import pytest_asyncio

from klein_api.v1 import image_pb2, tensor_pb2, vae_decoder_service_pb2_grpc
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.errors import InvalidInput
from klein_core.params import Limits
from klein_services.runtime.channels import open_channel
from klein_services.runtime.frames import MAX_FRAME_BYTES
from klein_services.runtime.request_parts import read_parts
from klein_services.runtime.server import running_server
from klein_services.runtime.tensors import tensor_frames
from klein_services.vae_decoder.request import image_encoding, read_latents
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.vae_decoder_calls import (
    LIMIT_BYTES,
    RECEIVE_TIMEOUT_SECONDS,
    decode,
    decode_parts,
    encode_reference,
    latents,
    picture,
    reference_parts,
    refusal,
    tiny_application,
)
from tests.tiny.image_files import png_bomb, webp_bomb

pytestmark = pytest.mark.asyncio(loop_scope="module")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    return tiny_application(tiny_checkpoint)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(application):
    async with running_server(application) as address, open_channel(address) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel):
    return vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)


CHUNK = pb.EncodeReferenceRequest(image_chunk=b"x")
REFERENCE = pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(field_name="references[1]"))
BAD_REFERENCES = {
    "nothing": ([], "spec", "is missing"),
    "no spec": ([CHUNK], "spec", "is missing"),
    "two specs": ([REFERENCE, REFERENCE], "spec", "twice"),
    "an empty part": ([REFERENCE, pb.EncodeReferenceRequest()], "part", "is empty"),
    "no bytes": ([REFERENCE], "references[1]", "is empty"),
    "an empty chunk": (
        [REFERENCE, pb.EncodeReferenceRequest(image_chunk=b"")],
        "references[1]",
        "chunk of 0 bytes",
    ),
    "a chunk too large": (
        [REFERENCE, pb.EncodeReferenceRequest(image_chunk=b"x" * (MAX_FRAME_BYTES + 1))],
        "references[1]",
        "1048576",
    ),
    "no image": ([REFERENCE, CHUNK], "references[1]", "is not an image"),
    "a truncated image": (
        [REFERENCE, pb.EncodeReferenceRequest(image_chunk=picture()[:-4000])],
        "references[1]",
        "truncated",
    ),
    "a picture that claims too many pixels": (
        [*reference_parts(png_bomb(9_000), field_name="references[1]")],
        "references[1]",
        "pixels",
    ),
    "a canvas that claims too many pixels": (
        [*reference_parts(webp_bomb(65_535), field_name="references[1]")],
        "references[1]",
        "pixels",
    ),
    "an image too narrow": ([*reference_parts(picture(4000, 1))], "reference", "at least 64"),
    "a long name": (
        [pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(field_name="x" * 65))],
        "field_name",
        "at most 64",
    ),
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
async def test_a_bad_reference_names_field_and_limit(stub, case):
    parts, field, description = BAD_REFERENCES[case]
    details = await refusal(encode_reference(stub, iter(parts)))
    assert (details.code, details.violations[0].field) == (INVALID, field)
    assert description in details.violations[0].description


async def test_a_reference_over_the_limit_is_refused_before_it_has_all_come(tiny_checkpoint):
    async def never_ending():
        yield REFERENCE
        for _ in range(LIMIT_BYTES // MAX_FRAME_BYTES + 1):
            yield pb.EncodeReferenceRequest(image_chunk=b"x" * MAX_FRAME_BYTES)
        # A Python client that is still writing when the status arrives may report INTERNAL instead.
        await asyncio.sleep(60)

    # Several MiB must come through on a busy machine, too.
    application = tiny_application(tiny_checkpoint, receive_timeout_seconds=30)
    async with running_server(application) as address, open_channel(address) as channel:
        stub = vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)
        details = await refusal(encode_reference(stub, never_ending()))
    assert (details.code, details.violations[0].field) == (INVALID, "references[1]")
    assert str(LIMIT_BYTES) in details.violations[0].description


NAN = latents()
NAN[1, 2, 3] = math.nan
INFINITE = latents()
INFINITE[0, 0, 0] = -math.inf
SPEC = pb.DecodeLatentsRequest(spec=pb.DecodeSpec())


def lying(**spec):
    frame = next(tensor_frames(latents()))
    frame.spec.CopyFrom(tensor_pb2.TensorSpec(**spec))
    return [SPEC, pb.DecodeLatentsRequest(latents=frame)]


def corrupt():
    frame = next(tensor_frames(latents()))
    frame.data = bytes(len(frame.data))
    return [SPEC, pb.DecodeLatentsRequest(latents=frame)]


def ending_early():
    frame = next(tensor_frames(latents(32, 32)))
    frame.ClearField("xxh3")
    frame.data = frame.data[:1024]
    return [SPEC, pb.DecodeLatentsRequest(latents=frame)]


F32 = tensor_pb2.DATA_TYPE_F32
BAD_LATENTS = {
    "nothing": ([], "spec", "is missing"),
    "no spec": ([*decode_parts(latents())][1:], "spec", "is missing"),
    "two specs": ([SPEC, SPEC], "spec", "twice"),
    "an empty part": ([SPEC, pb.DecodeLatentsRequest()], "part", "is empty"),
    "no latents": ([SPEC], "latents", "is missing"),
    "latents twice": ([SPEC, *[*decode_parts(latents())][1:] * 2], "latents", "after its last"),
    "NaN": ([*decode_parts(NAN)], "latents", "1 values that are NaN"),
    "infinity": ([*decode_parts(INFINITE)], "latents", "must be finite"),
    "other channels": ([*decode_parts(latents(channels=8))], "latents", "must be [rows, columns, 16]"),
    "no channels": ([*decode_parts(latents()[0])], "latents", "must be [rows, columns, 16]"),
    "too small": ([*decode_parts(latents(3, 6))], "latents", "height_px is 48; must be at least 64"),
    "too large": ([*decode_parts(latents(33, 32))], "latents", "at most 262144 are allowed"),
    "a shape that lies": (lying(data_type=F32, shape=[4, 5, 16]), "latents", "more bytes"),
    "a shape without end": (
        lying(data_type=F32, shape=[1] * 20_000),
        "latents",
        "[1, 1, 1, 1, 1, 1, 1, 1, …]",
    ),
    "a type that lies": (lying(data_type=99, shape=[4, 6, 16]), "latents", "data type 99"),
    "a digest that lies": (corrupt(), "latents", "do not match"),
    "ends early": (ending_early(), "latents", "ended after 1024 of 65536 bytes"),
    "an unknown format": ([*decode_parts(latents(), format=99)], "format", "is 99"),
    "quality for PNG": ([*decode_parts(latents(), quality=50)], "quality", "jpeg and webp"),
    "quality of 0": (
        [*decode_parts(latents(), quality=0, format=image_pb2.IMAGE_FORMAT_JPEG)],
        "quality",
        "[1, 100]",
    ),
    "a bad metadata key": ([*decode_parts(latents(), metadata={"": "x"})], "metadata", "1 to 79"),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
async def test_bad_latents_name_field_and_limit(stub, case):
    parts, field, description = BAD_LATENTS[case]
    details = await refusal(decode(stub, iter(parts)))
    assert details.code is INVALID
    assert details.violations[0].field == field
    assert description in details.violations[0].description


async def test_a_side_that_the_format_cannot_have_is_refused_with_the_first_frame():
    webp = image_pb2.IMAGE_FORMAT_WEBP

    async def spec_and_first_frame():
        for part in islice(decode_parts(latents(4, 1024), format=webp), 2):
            yield part

    async with read_parts(spec_and_first_frame(), timeout_seconds=30) as parts:
        encoding = image_encoding((await parts.spec_part()).spec, "")
        with pytest.raises(InvalidInput, match=r"width_px is 16384; webp allows at most 16383"):
            await read_latents(parts, encoding, 16, Limits())


@pytest.mark.parametrize("method", ["EncodeReference", "DecodeLatents"])
async def test_another_model_is_not_found_before_the_rest_is_read(stub, method):
    part = {
        "EncodeReference": pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(model="other")),
        "DecodeLatents": pb.DecodeLatentsRequest(spec=pb.DecodeSpec(model="other")),
    }[method]

    async def never_ending():
        yield part
        await asyncio.sleep(60)

    call = getattr(stub, method)(never_ending())
    details = await refusal(call.read())
    assert (details.code, details.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")


async def stalled(method: str):
    """Sends a whole picture or tensor but does not end its stream."""
    for part in reference_parts(picture()) if method == "EncodeReference" else decode_parts(latents()):
        yield part
    await asyncio.sleep(60)


async def trickling(method: str):
    """Sends a good picture or tensor byte by byte, never as slowly as the receive timeout."""
    whole = next(tensor_frames(latents()))
    data = picture() if method == "EncodeReference" else whole.data
    yield REFERENCE if method == "EncodeReference" else SPEC
    for position in range(len(data)):
        byte = data[position : position + 1]
        frame = tensor_pb2.TensorFrame(data=byte, spec=whole.spec if position == 0 else None)
        if method == "EncodeReference":
            yield pb.EncodeReferenceRequest(image_chunk=byte)
        else:
            yield pb.DecodeLatentsRequest(latents=frame)
        await asyncio.sleep(RECEIVE_TIMEOUT_SECONDS / 10)


@pytest.mark.parametrize("method", ["EncodeReference", "DecodeLatents"])
@pytest.mark.parametrize("never_ending", [stalled, trickling])
async def test_a_stream_that_never_ends_is_given_up(application, stub, never_ending, method):
    # The caller would wait for much longer, and its own deadline has no reason.
    call = getattr(stub, method)(never_ending(method), timeout=60)
    details = await refusal(call.read())
    assert (details.code, details.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "RECEIVE_TIMEOUT")
    assert (application.worker.queued_count, application.worker.running_count) == (0, 0)
    await until(lambda: application.slots.in_use == 0)


def handlers():
    return [task for task in asyncio.all_tasks() if "_handle_rpc" in str(task.get_coro())]


async def test_a_refused_stream_leaves_nothing_running(application, stub):
    for case in ("NaN", "two specs", "no latents", "ends early"):
        await refusal(decode(stub, iter(BAD_LATENTS[case][0])))
    await decode(stub, decode_parts(latents()))
    await until(lambda: handlers() == [])
    assert (application.worker.queued_count, application.worker.running_count) == (0, 0)


async def test_a_status_reaches_a_client_that_is_still_writing(stub):
    # grpc.aio reports INTERNAL in place of a status that arrives while it writes.
    parts = [REFERENCE] + [pb.EncodeReferenceRequest(image_chunk=b"x" * MAX_FRAME_BYTES)] * 12
    for _ in range(5):
        assert (await refusal(encode_reference(stub, iter(parts)))).code is INVALID


async def test_a_client_that_goes_while_it_sends_leaves_nothing_running(application, stub):
    async def parts():
        yield SPEC
        await asyncio.sleep(60)

    call = stub.DecodeLatents(parts())
    await asyncio.sleep(0.1)
    call.cancel()
    await until(lambda: handlers() == [])
    assert (application.worker.queued_count, application.worker.running_count) == (0, 0)


async def test_requests_beyond_the_slots_are_refused_before_anything_is_kept(tiny_checkpoint):
    application = tiny_application(tiny_checkpoint, queue_limit=1, receive_timeout_seconds=30)
    async with running_server(application) as address, open_channel(address) as channel:
        stub = vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)

        async def stalled():
            yield SPEC
            await asyncio.sleep(60)

        calls = [stub.DecodeLatents(stalled()) for _ in range(2)]
        await until(lambda: application.slots.in_use == 2)
        details = await refusal(decode(stub, decode_parts(latents())))
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        for call in calls:
            call.cancel()
        await until(lambda: application.slots.in_use == 0)
        await decode(stub, decode_parts(latents()))

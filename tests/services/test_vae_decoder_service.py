"""The vae-decoder over gRPC: klein_core's very latents and images, and a status for whatever is wrong."""

import asyncio
import io
import math

import grpc
import pytest
import pytest_asyncio
import torch
from klein_api.v1 import (
    image_pb2,
    stage_service_pb2,
    stage_service_pb2_grpc,
    tensor_pb2,
    vae_decoder_service_pb2_grpc,
)
from klein_api.v1 import vae_decoder_service_pb2 as pb
from PIL import Image

from klein_core.vae_decoder.stage import VaeDecoder
from services.runtime.channels import open_channel
from services.runtime.frames import MAX_FRAME_BYTES, FrameReader
from services.runtime.server import running_server
from services.runtime.status import explain
from services.runtime.tensors import frames_tensor, tensor_frames
from services.vae_decoder.application import VaeDecoderApplication
from services.vae_decoder.settings import VaeDecoderSettings
from tests.services.runtime_toy import failure, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
INVALID = grpc.StatusCode.INVALID_ARGUMENT
LIMIT_BYTES = 3 << 20


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint):
    return VaeDecoder.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    settings = VaeDecoderSettings(
        model_path=str(tiny_checkpoint),
        model_name="tiny",
        device="cpu",
        queue_limit=4,
        reference_bytes=LIMIT_BYTES,
        receive_timeout_seconds=0.5,
        maximum_pixel_count=512 * 512,
    )
    return VaeDecoderApplication(settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(application):
    async with running_server(application) as address, open_channel(address) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel):
    return vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)


def picture(width=96, height=64, seed=0, **save):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, **{"format": "PNG", **save})
    return file.getvalue()


def latents(rows=4, columns=6, channels=16, dtype=torch.float32):
    return torch.randn(rows, columns, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def reference_parts(data, chunk_bytes=MAX_FRAME_BYTES, **spec):
    yield pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(**spec))
    for start in range(0, len(data), chunk_bytes):
        yield pb.EncodeReferenceRequest(image_chunk=data[start : start + chunk_bytes])


def decode_parts(tensor, **spec):
    yield pb.DecodeLatentsRequest(spec=pb.DecodeSpec(**spec))
    for frame in tensor_frames(tensor):
        yield pb.DecodeLatentsRequest(latents=frame)


async def encode_reference(stub, parts):
    responses = [response async for response in stub.EncodeReference(parts)]
    reader = FrameReader("reference_latents", limit_bytes=1 << 24)
    for response in responses[1:]:
        reader.add(response.reference_latents)
    return responses[0].summary, frames_tensor(reader)


async def decode(stub, parts):
    responses = [response async for response in stub.DecodeLatents(parts)]
    chunks = [response.image_chunk for response in responses[1:]]
    assert all(1 <= len(chunk) <= MAX_FRAME_BYTES for chunk in chunks)
    return responses[0].summary, b"".join(chunks)


async def refusal(awaitable):
    return explain(await failure(awaitable))


@pytest.mark.parametrize("chunk_bytes", [MAX_FRAME_BYTES, 1000])
async def test_a_reference_becomes_klein_cores_latents_bit_for_bit(stub, oracle, chunk_bytes):
    data = picture(100, 70)
    expected = oracle.encode_reference(data)
    summary, encoded = await encode_reference(stub, reference_parts(data, chunk_bytes))
    assert torch.equal(encoded, expected.latents)
    assert (summary.width_px, summary.height_px) == (96, 64)
    assert summary.compute_duration.ToTimedelta().total_seconds() > 0


@pytest.mark.parametrize(
    ("number", "name", "quality"),
    [
        (image_pb2.IMAGE_FORMAT_UNSPECIFIED, "png", None),
        (image_pb2.IMAGE_FORMAT_PNG, "png", None),
        (image_pb2.IMAGE_FORMAT_JPEG, "jpeg", None),
        (image_pb2.IMAGE_FORMAT_JPEG, "jpeg", 40),
        (image_pb2.IMAGE_FORMAT_WEBP, "webp", 80),
        (image_pb2.IMAGE_FORMAT_RAW_RGB, "raw", None),
    ],
)
async def test_latents_become_klein_cores_images_byte_for_byte(stub, oracle, number, name, quality):
    tensor = latents()
    metadata = {"seed": "7"}
    summary, data = await decode(
        stub, decode_parts(tensor, format=number, quality=quality, metadata=metadata)
    )
    assert data == oracle.decode_image(tensor, name, quality, metadata)
    assert (summary.width_px, summary.height_px, summary.size_bytes) == (96, 64, len(data))
    assert summary.format == (number or image_pb2.IMAGE_FORMAT_PNG)


class Painter:
    """Stands for an autoencoder that decodes anything to a picture of a megapixel."""

    def __init__(self, decoder):
        self.config = decoder.config
        self.pixels = torch.arange(1024 * 1024 * 3).to(torch.uint8).view(1024, 1024, 3)

    def decode(self, tensor):
        return self.pixels


async def test_an_image_larger_than_a_chunk_comes_in_chunks(application, stub, monkeypatch):
    painter = Painter(application.decoder)
    monkeypatch.setattr(application, "_decoder", painter)
    summary, data = await decode(stub, decode_parts(latents(), format=image_pb2.IMAGE_FORMAT_RAW_RGB))
    assert data == painter.pixels.numpy().tobytes()
    assert summary.size_bytes == 3 * MAX_FRAME_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_latents_of_other_element_types_are_taken(stub, oracle, dtype):
    tensor = latents(dtype=dtype)
    _, data = await decode(stub, decode_parts(tensor))
    assert data == oracle.decode_image(tensor, "png")


async def test_many_clients_at_once_each_get_their_own(stub, oracle):
    files = [picture(seed=seed) for seed in range(4)]
    answers = await asyncio.gather(*(encode_reference(stub, reference_parts(data)) for data in files))
    for data, (_, encoded) in zip(files, answers, strict=True):
        assert torch.equal(encoded, oracle.encode_reference(data).latents)


async def test_the_stage_describes_its_model(channel):
    stage = stage_service_pb2_grpc.StageServiceStub(channel)
    description = await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())
    assert (description.stage, description.model, description.dtype) == ("vae-decoder", "tiny", "f32")
    assert description.vae_decoder.latent_channels == 16


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
    "an image too narrow": ([*reference_parts(picture(4000, 1))], "reference", "at least 64"),
    "a long name": (
        [pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(field_name="x" * 65))],
        "field_name",
        "at most 64",
    ),
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
async def test_a_bad_reference_names_field_and_limit(stub, case):
    parts, field, told = BAD_REFERENCES[case]
    details = await refusal(encode_reference(stub, iter(parts)))
    assert (details.code, details.violations[0].field) == (INVALID, field)
    assert told in details.violations[0].description


async def test_a_reference_over_the_limit_is_refused_before_it_has_all_come(stub):
    async def endless():
        yield REFERENCE
        while True:
            yield pb.EncodeReferenceRequest(image_chunk=b"x" * MAX_FRAME_BYTES)
            await asyncio.sleep(0.01)

    details = await refusal(encode_reference(stub, endless()))
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
    parts, field, told = BAD_LATENTS[case]
    details = await refusal(decode(stub, iter(parts)))
    assert details.code is INVALID
    assert details.violations[0].field == field
    assert told in details.violations[0].description


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


@pytest.mark.parametrize("method", ["EncodeReference", "DecodeLatents"])
async def test_a_stream_that_never_ends_is_given_up(application, stub, method):
    parts = {
        "EncodeReference": [*reference_parts(picture())],
        "DecodeLatents": [*decode_parts(latents())],
    }[method]

    async def never_ending():
        for part in parts:
            yield part
        await asyncio.sleep(60)

    details = await refusal(getattr(stub, method)(never_ending()).read())
    assert (details.code, details.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "RECEIVE_TIMEOUT")
    assert (application.worker.queued_count, application.worker.running_count) == (0, 0)


def handlers():
    return [task for task in asyncio.all_tasks() if "_handle_rpc" in str(task.get_coro())]


async def test_a_refused_stream_leaves_nothing_running(application, stub):
    for case in ("NaN", "two specs", "no latents", "ends early"):
        await refusal(decode(stub, iter(BAD_LATENTS[case][0])))
    await decode(stub, decode_parts(latents()))
    await until(lambda: handlers() == [])
    assert (application.worker.queued_count, application.worker.running_count) == (0, 0)


async def test_a_status_reaches_a_client_that_is_still_writing(stub):
    # grpc.aio tells INTERNAL in place of a status that arrives while it writes.
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

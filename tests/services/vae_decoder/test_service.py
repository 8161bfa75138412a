"""The vae-decoder over gRPC: klein_core's very latents and images."""

import asyncio
from io import BytesIO

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from PIL import Image

from klein_api.v1 import (
    image_pb2,
    stage_service_pb2,
    stage_service_pb2_grpc,
    vae_decoder_service_pb2_grpc,
)
from klein_core.vae_decoder.decoder import VaeDecoder, memory_bytes
from klein_core.vae_decoder.tiling import TilingPolicy
from klein_services.runtime.channels import open_channel
from klein_services.runtime.frames import MAX_FRAME_BYTES
from klein_services.runtime.server import running_server
from tests.services.fakes.vae_decoder_calls import (
    decode,
    decode_parts,
    encode_reference,
    latents,
    picture,
    reference_parts,
    refusal,
    tiny_application,
)
from tests.tiny import image_files

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint):
    return VaeDecoder.from_folder(tiny_checkpoint)


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


@pytest.mark.parametrize("chunk_bytes", [MAX_FRAME_BYTES, 1000])
async def test_a_reference_becomes_klein_cores_latents_bit_for_bit(stub, oracle, chunk_bytes):
    data = picture(100, 70)
    expected = oracle.encode_reference(data)
    summary, encoded = await encode_reference(stub, reference_parts(data, chunk_bytes))
    assert torch.equal(encoded, expected.latents)
    assert (summary.width_px, summary.height_px) == (96, 64)
    assert summary.compute_duration.ToTimedelta().total_seconds() > 0


PHOTO = Image.open(BytesIO(picture(100, 70)))
LYING_ON_ITS_SIDE = Image.Exif()
LYING_ON_ITS_SIDE[0x0112] = 6
KINDS_OF_PICTURES = {
    "CMYK": image_files.encoded(PHOTO.convert("CMYK"), "JPEG", quality=95),
    "turned by EXIF": image_files.encoded(PHOTO, "JPEG", quality=95, exif=LYING_ON_ITS_SIDE),
    "palette": image_files.encoded(PHOTO.quantize(17)),
    "alpha": image_files.encoded(PHOTO.convert("RGBA")),
    "16-bit colors": image_files.sixteen_bit_png(np.asarray(PHOTO).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", KINDS_OF_PICTURES)
async def test_every_kind_of_picture_becomes_klein_cores_latents(stub, oracle, kind):
    data = KINDS_OF_PICTURES[kind]
    summary, encoded = await encode_reference(stub, reference_parts(data))
    assert torch.equal(encoded, oracle.encode_reference(data).latents)
    is_turned = kind == "turned by EXIF"
    assert (summary.width_px, summary.height_px) == ((64, 96) if is_turned else (96, 64))


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

    def decode_batch(self, tensors):
        return [self.pixels for _ in tensors]


async def test_an_image_larger_than_a_chunk_comes_in_chunks(application, stub, monkeypatch):
    painter = Painter(application.decoder)
    monkeypatch.setattr(application, "decoder", painter)
    summary, data = await decode(stub, decode_parts(latents(), format=image_pb2.IMAGE_FORMAT_RAW_RGB))
    assert data == painter.pixels.numpy().tobytes()
    assert summary.size_bytes == 3 * MAX_FRAME_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_latents_of_other_element_types_are_taken(stub, oracle, dtype):
    tensor = latents(dtype=dtype)
    _, data = await decode(stub, decode_parts(tensor))
    assert data == oracle.decode_image(tensor, "png")


async def test_latents_that_the_models_element_type_cannot_hold_are_refused(tiny_checkpoint):
    application = tiny_application(tiny_checkpoint, dtype="f16")
    async with running_server(application) as address, grpc.aio.insecure_channel(address) as channel:
        stub = vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)
        assert (await decode(stub, decode_parts(latents())))[0].width_px == 96
        details = await refusal(decode(stub, decode_parts(latents() * 1e6)))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.violations[0].field == "latents"


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
    assert len(description.weights_digest) == 32


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, TilingPolicy("auto", memory_bytes(torch.device("cpu")) // 4)),
        ({"tiling": "on"}, TilingPolicy("on", None)),
        ({"tiling_limit_mib": 3}, TilingPolicy("auto", 3 << 20)),
    ],
    ids=["default", "on", "limit"],
)
async def test_settings_decide_when_images_are_tiled(tiny_checkpoint, settings, policy, caplog):
    caplog.set_level("INFO", logger="klein.vae_decoder")
    application = tiny_application(tiny_checkpoint, **settings)
    await application.load()
    assert application.decoder.tiling == policy
    assert str(policy) in caplog.messages
    await application.close()

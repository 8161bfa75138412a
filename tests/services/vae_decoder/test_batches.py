"""Images that the vae-decoder decodes together: each has the pixels that it would have alone."""

import asyncio

import grpc
import numpy
import pytest
import torch
from prometheus_client import REGISTRY

from klein_api.v1 import image_pb2, vae_decoder_service_pb2_grpc
from klein_core.vae_decoder.decoder import VaeDecoder
from klein_core.vae_decoder.tiling import TilingPolicy
from klein_services.runtime.server import running_server
from klein_services.runtime.status import explain
from tests.services.fakes.vae_decoder_calls import decode, decode_parts, tiny_application

LABELS = {"stage": "vae-decoder", "operation": "decode"}


def counted():
    return [REGISTRY.get_sample_value(f"klein_batch_works_{kind}", LABELS) or 0 for kind in ("count", "sum")]


def noise(seed, rows=4, columns=6):
    return torch.randn(rows, columns, 16, generator=torch.Generator().manual_seed(seed))


async def decode_all(checkpoint, tensors, **settings):
    application = tiny_application(checkpoint, queue_limit=16, batch="on", batch_wait_ms=1000, **settings)
    async with running_server(application) as address, grpc.aio.insecure_channel(address) as channel:
        stub = vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)
        raw = image_pb2.IMAGE_FORMAT_RAW_RGB
        calls = (decode(stub, decode_parts(tensor, format=raw)) for tensor in tensors)
        return await asyncio.gather(*calls, return_exceptions=True)


def assert_close(data, alone):
    """Compares to a rounding of the last bit of a pixel."""
    pixels = numpy.frombuffer(data, numpy.uint8).astype(int)
    assert abs(pixels - alone.numpy().reshape(-1)).max() <= 1


async def test_latents_of_one_size_that_wait_together_are_decoded_together(tiny_checkpoint):
    tensors, before = [noise(seed) for seed in range(4)], counted()
    oracle = VaeDecoder.from_folder(tiny_checkpoint)
    answers = await decode_all(tiny_checkpoint, tensors, batch_size=4)
    for tensor, (_, data) in zip(tensors, answers, strict=True):
        assert_close(data, oracle.decode(tensor))
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 4]


async def test_sizes_and_element_types_are_not_mixed(tiny_checkpoint):
    tensors = [noise(0), noise(1, 6, 4), noise(2).to(torch.bfloat16), noise(3), noise(4, 6, 4)]
    oracle = VaeDecoder.from_folder(tiny_checkpoint)
    answers = await decode_all(tiny_checkpoint, tensors, batch_size=2)
    for tensor, (_, data) in zip(tensors, answers, strict=True):
        assert_close(data, oracle.decode(tensor))


async def test_bad_latents_fail_alone(tiny_checkpoint):
    bad = noise(2)
    bad[0, 0, 0] = float("nan")
    oracle = VaeDecoder.from_folder(tiny_checkpoint)
    first, failed, last = await decode_all(tiny_checkpoint, [noise(1), bad, noise(3)], batch_size=3)
    assert_close(first[1], oracle.decode(noise(1)))
    assert_close(last[1], oracle.decode(noise(3)))
    details = explain(failed)
    assert (details.code, details.violations[0].field) == (grpc.StatusCode.INVALID_ARGUMENT, "latents")


def test_a_batch_equals_each_alone_and_stays_within_the_tiling_limit(tiny_checkpoint, monkeypatch):
    oracle = VaeDecoder.from_folder(tiny_checkpoint)
    tensors = [noise(seed, 2, 3) for seed in range(3)]
    for made, tensor in zip(oracle.decode_batch(tensors), tensors, strict=True):
        assert_close(made.numpy().tobytes(), oracle.decode(tensor))
    counts = []
    decode_packed = oracle.autoencoder.decode

    def counting(packed, **options):
        counts.append(len(packed))
        return decode_packed(packed, **options)

    monkeypatch.setattr(oracle.autoencoder, "decode", counting)
    oracle.decode_batch(tensors)
    limited = VaeDecoder(oracle.autoencoder, tiling=TilingPolicy("on"))
    limited.decode_batch(tensors)
    assert counts == [3, 1, 1, 1]


@pytest.mark.parametrize("shape", [(4, 6, 15), (0, 6, 16)])
def test_every_latents_of_a_batch_are_checked(tiny_checkpoint, shape):
    with pytest.raises(Exception, match="latents"):
        VaeDecoder.from_folder(tiny_checkpoint).decode_batch([noise(0), torch.zeros(shape)])

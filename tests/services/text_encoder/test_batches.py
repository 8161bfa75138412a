"""Prompts that the text-encoder encodes together: each has the embedding that it would have alone."""

import asyncio

import torch
from prometheus_client import REGISTRY

from klein_api.v1 import text_encoder_service_pb2_grpc
from klein_core.text_encoder.encoder import TextEncoder
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from klein_services.text_encoder.servicer import TextEncoderStage
from klein_services.text_encoder.settings import TextEncoderSettings
from tests.services.text_encoder.test_service import encode

LABELS = {"stage": "text-encoder", "operation": "encode-prompt"}


def counted():
    return [REGISTRY.get_sample_value(f"klein_batch_works_{kind}", LABELS) or 0 for kind in ("count", "sum")]


async def encode_all(checkpoint, prompts, **values):
    settings = TextEncoderSettings(model_path=str(checkpoint), device="cpu", **values)
    async with running_server(TextEncoderStage(settings)) as address, open_channel(address) as channel:
        stub = text_encoder_service_pb2_grpc.TextEncoderServiceStub(channel)
        return await asyncio.gather(*(encode(stub, prompt) for prompt in prompts))


async def test_prompts_that_wait_together_are_encoded_together(tiny_checkpoint):
    prompts = ["", "a red cat", "日本語 🐈", "long " * 200]
    oracle, before = TextEncoder.from_folder(tiny_checkpoint), counted()
    answers = await encode_all(tiny_checkpoint, prompts, batch="on", batch_size=4, batch_wait_ms=1000)
    for prompt, (summary, embedding) in zip(prompts, answers, strict=True):
        (alone,) = oracle.encode([prompt])
        torch.testing.assert_close(embedding, alone.embedding, rtol=1e-5, atol=1e-5)
        assert (summary.token_count, summary.truncated) == (alone.token_count, alone.truncated)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 4]


async def test_a_cpu_encodes_each_alone_by_default(tiny_checkpoint):
    before = counted()
    await encode_all(tiny_checkpoint, ["a", "b", "c"])
    assert counted() == before

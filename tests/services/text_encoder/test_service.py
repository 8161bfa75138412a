"""The text-encoder over gRPC: klein_core's very embeddings, and a status for every error."""

import asyncio
import time

import grpc
import pytest
import pytest_asyncio
import torch

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc, text_encoder_service_pb2_grpc
from klein_api.v1 import text_encoder_service_pb2 as pb
from klein_core.text_encoder.encoder import TextEncoder
from klein_services.runtime.channels import open_channel
from klein_services.runtime.frames import FrameReader
from klein_services.runtime.server import running_server, serve
from klein_services.runtime.status import explain
from klein_services.runtime.tensors import frames_tensor
from klein_services.text_encoder.servicer import TextEncoderStage
from klein_services.text_encoder.settings import TextEncoderSettings
from tests.services.fakes.runtime_toy import failure, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint):
    return TextEncoder.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    settings = TextEncoderSettings(
        model_path=str(tiny_checkpoint), model_name="tiny", device="cpu", queue_limit=1
    )
    return TextEncoderStage(settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(application):
    async with running_server(application) as address, open_channel(address) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel):
    return text_encoder_service_pb2_grpc.TextEncoderServiceStub(channel)


async def encode(stub, prompt, **options):
    """Returns the summary and the embedding."""
    responses = [
        response async for response in stub.EncodePrompt(pb.EncodePromptRequest(prompt=prompt, **options))
    ]
    reader = FrameReader("prompt_embedding", limit_bytes=1 << 24)
    for response in responses[1:]:
        reader.add(response.prompt_embedding)
    return responses[0].summary, frames_tensor(reader)


async def test_prompts_become_klein_cores_embeddings_bit_for_bit(stub, oracle):
    for prompt in ("", "a red cat", "日本語 🐈", "<|im_end|><|im_start|>", "long " * 200):
        (expected,) = oracle.encode([prompt])
        summary, embedding = await encode(stub, prompt)
        assert torch.equal(embedding, expected.embedding)
        assert (summary.token_count, summary.truncated) == (expected.token_count, expected.truncated)
        assert summary.compute_duration.ToTimedelta().total_seconds() > 0


async def test_many_clients_at_once_each_get_their_own(tiny_checkpoint, oracle):
    settings = TextEncoderSettings(model_path=str(tiny_checkpoint), device="cpu", queue_limit=16)
    async with running_server(TextEncoderStage(settings)) as address, open_channel(address) as channel:
        stub = text_encoder_service_pb2_grpc.TextEncoderServiceStub(channel)
        prompts = [f"number {index}" for index in range(12)]
        answers = await asyncio.gather(*(encode(stub, prompt) for prompt in prompts))
    for prompt, (_, embedding) in zip(prompts, answers, strict=True):
        assert torch.equal(embedding, oracle.encode([prompt])[0].embedding)


async def test_the_stage_describes_its_model(channel, oracle):
    stage = stage_service_pb2_grpc.StageServiceStub(channel)
    description = await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())
    assert (description.stage, description.model) == ("text-encoder", "tiny")
    assert (description.device, description.dtype) == ("cpu", "f32")
    facts = description.text_encoder
    assert facts.sequence_length == oracle.config.sequence_length
    assert facts.embedding_channels == oracle.config.embedding_channels
    assert description.weights_digest == oracle.digest()


async def test_its_model_may_be_named_and_no_other(stub):
    await encode(stub, "x", model="tiny")
    details = explain(await failure(encode(stub, "x", model="klein-9b")))
    assert (details.code, details.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    assert details.violations[0].field == "model"
    assert "tiny" in details.message


async def test_a_prompt_over_the_limit_names_field_and_limit(stub):
    details = explain(await failure(encode(stub, "x" * 32769)))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.violations[0].field == "prompt"
    assert "32768" in details.violations[0].description


class Slow:
    """Stands for an encoder that takes long; counts what it was asked."""

    def __init__(self, encoder):
        self.encoder = encoder
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        time.sleep(0.3)
        return self.encoder.encode(prompts)


@pytest.fixture
def slow(application, stub, monkeypatch):
    made = Slow(application.encoder)
    monkeypatch.setattr(application, "encoder", made)
    return made


async def test_a_full_queue_refuses_and_the_others_finish(stub, slow):
    results = await asyncio.gather(*(encode(stub, str(index)) for index in range(4)), return_exceptions=True)
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert len(errors) == 2
    assert {explain(error).reason for error in errors} == {"QUEUE_FULL"}
    assert explain(errors[0]).retry_after_seconds > 0


async def test_what_a_client_no_longer_wants_is_never_computed(stub, slow):
    first = asyncio.create_task(encode(stub, "first"))
    await until(lambda: slow.asked)
    second = stub.EncodePrompt(pb.EncodePromptRequest(prompt="second"))
    await asyncio.sleep(0.1)
    second.cancel()
    await first
    await encode(stub, "third")
    assert slow.asked == ["first", "third"]


async def test_a_deadline_that_passes_in_the_queue_costs_nothing(stub, slow):
    first = asyncio.create_task(encode(stub, "first"))
    await until(lambda: slow.asked)
    call = stub.EncodePrompt(pb.EncodePromptRequest(prompt="second"), timeout=0.1)
    # Refused at once where enough encodings were measured, else when the deadline passes.
    codes = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert (await failure(call.read())).code() in codes
    await first
    assert slow.asked == ["first"]


async def test_a_folder_that_is_no_checkpoint_is_told_and_ends_with_1(tmp_path, free_port, caplog):
    settings = TextEncoderSettings(model_path=str(tmp_path), host="127.0.0.1", port=free_port, metrics_port=0)
    assert await serve(settings, TextEncoderStage(settings)) == 1
    assert str(tmp_path) in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_device_that_is_not_there_is_told_and_ends_with_1(tiny_checkpoint, free_port, caplog):
    settings = TextEncoderSettings(
        model_path=str(tiny_checkpoint), host="127.0.0.1", port=free_port, metrics_port=0, device="cuda:99"
    )
    assert await serve(settings, TextEncoderStage(settings)) == 1
    assert "KLEIN_DEVICE is 'cuda:99'" in caplog.text

"""Checksums of messages between the orchestrator and the stages."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import DecodeError

from klein_api.v1 import (
    denoiser_service_pb2,
    stage_service_pb2,
    text_encoder_service_pb2,
    vae_decoder_service_pb2,
)
from klein_api.v1.stage_service_pb2 import DescribeStageRequest, DescribeStageResponse
from klein_api.v1.text_encoder_service_pb2 import EncodePromptRequest
from klein_services.runtime.checksums import (
    FIELD_NUMBER,
    SMALL_BYTES,
    DamagedMessage,
    frame_with_checksum,
    with_checksum,
    without_checksum,
)
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.status import explain
from tests.services.fakes.runtime_toy import ENCODE_PROMPT, Toy, failure

MESSAGE = EncodePromptRequest(model="pico", prompt="a red circle").SerializeToString()
DESCRIBE_STAGE = "/klein_api.v1.StageService/DescribeStage"
SETTINGS = ServerSettings(host="127.0.0.1", port=0, metrics_port=0, drain_delay_seconds=0, grace_seconds=1)


@pytest.mark.parametrize("bit", range(8 * len(with_checksum(MESSAGE))))
def test_no_flipped_bit_changes_a_message(bit):
    """It is noticed, or it hits the key, and then the rest is an unknown field and the message that was sent."""
    damaged = bytearray(with_checksum(MESSAGE))
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        received = EncodePromptRequest.FromString(without_checksum(bytes(damaged)))
    except DecodeError:
        return
    assert bit < 8
    assert received.prompt == "a red circle"


@pytest.mark.parametrize("end", range(1, len(with_checksum(MESSAGE))))
def test_a_message_that_is_cut_off_is_noticed(end):
    with pytest.raises(DamagedMessage):
        without_checksum(with_checksum(MESSAGE)[:end])


def test_messages_without_a_checksum_pass():
    assert without_checksum(MESSAGE) == MESSAGE
    assert without_checksum(b"") == b""
    assert without_checksum(with_checksum(b"")) == b""


def test_receivers_that_know_no_checksum_get_the_message():
    assert EncodePromptRequest.FromString(with_checksum(MESSAGE)).prompt == "a red circle"


def test_frames_of_large_tensors_are_not_copied():
    large = bytes(SMALL_BYTES + 1)
    assert frame_with_checksum(large) is large
    assert len(frame_with_checksum(large[1:])) == SMALL_BYTES + 9


def test_no_message_of_a_stage_has_the_field():
    modules = (denoiser_service_pb2, stage_service_pb2, text_encoder_service_pb2, vae_decoder_service_pb2)
    messages = [each for module in modules for each in module.DESCRIPTOR.message_types_by_name.values()]
    assert messages
    assert not [each.full_name for each in messages if FIELD_NUMBER in each.fields_by_number]


async def test_a_stage_checks_requests_and_adds_checksums_to_answers():
    async with running_server(Toy(), SETTINGS) as address, grpc.aio.insecure_channel(address) as channel:
        request = with_checksum(DescribeStageRequest().SerializeToString())
        answer = await channel.unary_unary(DESCRIBE_STAGE)(request)
        assert without_checksum(answer) != answer
        assert DescribeStageResponse.FromString(without_checksum(answer)).model == "toy"
        damaged = with_checksum(MESSAGE).replace(b"red", b"rad")
        error = await failure(_first(channel.unary_stream(ENCODE_PROMPT)(damaged)))
        assert explain(error).reason == "UNDECODABLE_MESSAGE"


async def _first(call):
    return await call.read()

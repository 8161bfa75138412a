"""Frames that are read without protobuf's copies are the frames that protobuf reads."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from klein_api.v1 import denoiser_service_pb2 as denoiser
from klein_api.v1 import tensor_pb2, text_encoder_service_pb2, vae_decoder_service_pb2
from klein_services.runtime.protowire import FrameMessage, frame_deserializer

CLASSES = [
    (denoiser.DenoiseLatentsRequest, "part", "prompt_embedding"),
    (denoiser.DenoiseLatentsRequest, "part", "negative_prompt_embedding"),
    (vae_decoder_service_pb2.DecodeLatentsRequest, "part", "latents"),
    (text_encoder_service_pb2.EncodePromptResponse, "event", "prompt_embedding"),
]

frames = st.builds(
    tensor_pb2.TensorFrame,
    spec=st.none()
    | st.builds(
        tensor_pb2.TensorSpec,
        data_type=st.integers(0, 3),
        shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9),
    ),
    data=st.binary(max_size=300),
    xxh3=st.none() | st.binary(max_size=20),
)


@pytest.mark.parametrize(("message_class", "oneof", "arm"), CLASSES)
@given(frame=frames)
def test_a_frame_is_read_as_protobuf_reads_it(message_class, oneof, arm, frame):
    raw = message_class(**{arm: frame}).SerializeToString()
    message = frame_deserializer(message_class)(raw)
    assert isinstance(message, FrameMessage)
    assert message.WhichOneof(oneof) == arm
    read = getattr(message, arm)
    assert read.HasField("spec") == frame.HasField("spec")
    assert read.HasField("xxh3") == frame.HasField("xxh3")
    assert (read.spec or frame.spec) == frame.spec
    assert (read.xxh3 or b"") == frame.xxh3
    assert bytes(read.data) == frame.data


@given(raw=st.binary(max_size=40))
def test_whatever_else_comes_is_left_to_protobuf(raw):
    message_class = denoiser.DenoiseLatentsRequest
    try:
        expected = message_class.FromString(raw)
    except DecodeError:
        expected = None
    try:
        message = frame_deserializer(message_class)(raw)
    except DecodeError:
        message = None
    if isinstance(message, FrameMessage):
        arm = message.WhichOneof("part")
        assert expected.WhichOneof("part") == arm
        assert bytes(getattr(message, arm).data) == getattr(expected, arm).data
    else:
        assert message == expected


@pytest.mark.parametrize(
    "message",
    [
        denoiser.DenoiseLatentsRequest(spec=denoiser.DenoiseSpec(width_px=64)),
        denoiser.DenoiseLatentsRequest(
            reference_latents=denoiser.IndexedTensorFrame(index=3, frame=tensor_pb2.TensorFrame(data=b"x"))
        ),
        denoiser.DenoiseLatentsRequest(),
    ],
)
def test_other_arms_are_ordinary_messages(message):
    assert frame_deserializer(type(message))(message.SerializeToString()) == message


def test_a_field_of_a_later_version_beside_the_frame_is_left_to_protobuf():
    message = denoiser.DenoiseLatentsRequest(prompt_embedding=tensor_pb2.TensorFrame(data=b"x"))
    raw = message.SerializeToString() + b"\xf8\x06\x01"
    read = frame_deserializer(type(message))(raw)
    assert isinstance(read, denoiser.DenoiseLatentsRequest)
    assert read.prompt_embedding.data == b"x"


def test_messages_without_frames_are_not_touched():
    message_class = text_encoder_service_pb2.EncodePromptRequest
    assert frame_deserializer(message_class) == message_class.FromString

"""Frames that are re-addressed unopened are the messages that protobuf itself would make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_api.v1 import denoiser_service_pb2 as denoiser_pb2
from klein_api.v1 import text_encoder_service_pb2 as text_pb2
from klein_api.v1 import vae_decoder_service_pb2 as vae_pb2
from klein_api.v1.tensor_pb2 import TensorFrame, TensorSpec
from klein_services.runtime import protowire as wire

specs = st.builds(
    TensorSpec,
    data_type=st.sampled_from([1, 2, 3]),
    shape=st.lists(st.integers(1, 2**40), min_size=1, max_size=8),
)
frames = st.builds(
    TensorFrame,
    spec=st.none() | specs,
    data=st.binary(min_size=1, max_size=300),
    xxh3=st.none() | st.binary(min_size=16, max_size=16),
)
indices = st.integers(0, 2**31 - 1)


@given(frames)
def test_a_prompt_embedding_moves_into_the_denoiser(frame):
    field = wire.frame_field(text_pb2.EncodePromptResponse(prompt_embedding=frame).SerializeToString())
    assert denoiser_pb2.DenoiseLatentsRequest.FromString(field).prompt_embedding == frame
    negative = denoiser_pb2.DenoiseLatentsRequest.FromString(wire.as_negative_prompt_embedding(field))
    assert negative == denoiser_pb2.DenoiseLatentsRequest(negative_prompt_embedding=frame)


@given(frames, indices)
def test_reference_latents_move_into_the_denoiser(frame, index):
    field = wire.frame_field(vae_pb2.EncodeReferenceResponse(reference_latents=frame).SerializeToString())
    moved = denoiser_pb2.DenoiseLatentsRequest.FromString(wire.as_reference_latents(index, field))
    indexed = denoiser_pb2.IndexedTensorFrame(index=index, frame=frame)
    assert moved == denoiser_pb2.DenoiseLatentsRequest(reference_latents=indexed)


@given(frames)
def test_an_initial_image_and_its_mask_move_into_the_denoiser(frame):
    for arm in ("initial_latents", "mask"):
        message = vae_pb2.EncodeInitialImageResponse(**{arm: frame}).SerializeToString()
        field = wire.frame_field(message, (2, 3))
        moved = denoiser_pb2.DenoiseLatentsRequest.FromString(wire.as_initial_image_part(field))
        assert moved == denoiser_pb2.DenoiseLatentsRequest(**{arm: frame})
        assert wire.frame_field(message, (4,)) is None
        assert wire.frame_field(message + b"\x12\x00", (2, 3)) is None


@pytest.mark.parametrize("byte_count", [0, 1, 127, 128, 1 << 20, (1 << 20) + 1, (2 << 20) + 5])
def test_a_file_in_chunks_is_the_messages_that_protobuf_makes(byte_count):
    data = (bytes(range(251)) * (byte_count // 251 + 1))[:byte_count]
    for arm in ("image_chunk", "mask_chunk"):
        field = vae_pb2.EncodeInitialImageRequest.DESCRIPTOR.fields_by_name[arm]
        messages = list(wire.FileChunks(field.number).messages(data))
        parsed = [vae_pb2.EncodeInitialImageRequest.FromString(message) for message in messages]
        assert all(message.WhichOneof("part") == arm for message in parsed)
        assert b"".join(getattr(message, arm) for message in parsed) == data
        assert all(len(getattr(message, arm)) <= 1 << 20 for message in parsed)


@given(frames, indices)
def test_latents_and_previews_move_into_the_decoder(frame, index):
    indexed = denoiser_pb2.IndexedTensorFrame(index=index, frame=frame)
    for arm in ("latents", "preview"):
        message = denoiser_pb2.DenoiseLatentsResponse(**{arm: indexed}).SerializeToString()
        found, field = wire.indexed_frame_field(message)
        assert found == index
        assert vae_pb2.DecodeLatentsRequest.FromString(field) == vae_pb2.DecodeLatentsRequest(latents=frame)


@given(frames)
def test_the_last_frame_is_the_one_with_a_digest(frame):
    field = vae_pb2.DecodeLatentsRequest(latents=frame).SerializeToString()
    assert wire.is_last_frame(field) == frame.HasField("xxh3")


def test_field_numbers_are_those_of_the_api():
    fields = denoiser_pb2.DenoiseLatentsResponse.DESCRIPTOR.fields_by_name
    for name, message in {
        "queued": denoiser_pb2.DenoiseLatentsResponse(queued=denoiser_pb2.DenoiseQueued(position=1)),
        "summary": denoiser_pb2.DenoiseLatentsResponse(summary=denoiser_pb2.DenoiseSummary()),
    }.items():
        assert wire.field_number(message.SerializeToString()) == fields[name].number
    assert wire.field_number(b"") == 0


@given(st.binary(max_size=60))
def test_anything_else_is_refused_and_never_guessed(message):
    field = wire.frame_field(message)
    if field is not None:
        assert message[0] == 0x12
        assert field == message
    indexed = wire.indexed_frame_field(message)
    if indexed is not None:
        assert wire.frame_field(indexed[1]) == indexed[1]
    assert wire.is_last_frame(message) in (True, False)


@given(frames, st.binary(min_size=1, max_size=5))
def test_a_frame_with_something_after_it_is_refused(frame, tail):
    message = text_pb2.EncodePromptResponse(prompt_embedding=frame).SerializeToString()
    assert wire.frame_field(message + tail) is None
    assert wire.frame_field(message[:-1]) is None

"""Frames: every tensor arrives unchanged, and anything else is refused by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_api.v1 import denoiser_service_pb2, tensor_pb2, text_encoder_service_pb2
from klein_core.errors import InvalidInput
from klein_services.runtime.frames import (
    MAX_FRAME_BYTES,
    FrameEnvelope,
    FrameReader,
    TensorSpec,
    serialized_frames,
    split_frames,
)
from klein_services.runtime.tensors import frames_tensor, serialized_tensor_frames, tensor_frames

F32 = tensor_pb2.DATA_TYPE_F32
SPEC = TensorSpec(F32, (3, MAX_FRAME_BYTES // 4))
DATA = bytes(range(256)) * (SPEC.byte_count // 256)


def frames(data=DATA, spec=SPEC):
    return list(split_frames(memoryview(data), spec))


def read(frames, limit_bytes=SPEC.byte_count):
    reader = FrameReader("latents", limit_bytes=limit_bytes)
    for frame in frames:
        reader.add(frame)
    reader.require_finished()
    return reader


@settings(max_examples=25, deadline=None)
@given(element_count=st.integers(1, 700_000), seed=st.integers(0, 2**31))
def test_what_is_cut_is_put_together_again(element_count, seed):
    data = torch.randint(0, 256, (element_count * 4,), generator=torch.Generator().manual_seed(seed))
    data = data.to(torch.uint8).numpy().tobytes()
    spec = TensorSpec(F32, (element_count,))
    cut = frames(data, spec)
    assert len(cut) == math.ceil(len(data) / MAX_FRAME_BYTES)
    reader = read(cut, limit_bytes=len(data))
    assert (reader.data, reader.spec) == (data, spec)


@pytest.mark.parametrize("element_count", [1, 31, 32, 4000, 262_144, 262_145, 700_000])
@pytest.mark.parametrize("index", [None, 0, 1, 200])
def test_serialized_frames_are_what_protobuf_makes_of_the_same_frames(element_count, index):
    data, spec = memoryview(DATA[: element_count * 4]), TensorSpec(F32, (element_count, 1))
    if index is None:
        number = text_encoder_service_pb2.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER
        expected = [
            text_encoder_service_pb2.EncodePromptResponse(prompt_embedding=frame)
            for frame in split_frames(data, spec)
        ]
    else:
        number = denoiser_service_pb2.DenoiseLatentsResponse.LATENTS_FIELD_NUMBER
        expected = [
            denoiser_service_pb2.DenoiseLatentsResponse(
                latents=denoiser_service_pb2.IndexedTensorFrame(index=index, frame=frame)
            )
            for frame in split_frames(data, spec)
        ]
    serialized = serialized_frames(data, spec, FrameEnvelope(number, index))
    assert [
        type(message).FromString(raw) for message, raw in zip(expected, serialized, strict=True)
    ] == expected


def without(field):
    def change(cut):
        for frame in cut:
            frame.ClearField(field)
        return cut

    return change


def changed(position, **fields):
    def change(cut):
        frame = cut[position]
        for name, value in fields.items():
            frame.ClearField(name)
            if name == "spec":
                frame.spec.CopyFrom(value)
            else:
                setattr(frame, name, value)
        return cut

    return change


def shape(*extents, data_type=F32):
    return tensor_pb2.TensorSpec(data_type=data_type, shape=extents)


LIES = {
    "no frames": (lambda cut: [], "is missing"),
    "ends early": (lambda cut: cut[:2], "is incomplete"),
    "a frame is missing": (lambda cut: [cut[0], cut[2]], "ends after"),
    "a frame repeats": (lambda cut: [cut[0], cut[1], cut[1], cut[2]], "no xxh3 on its last"),
    "goes on after its end": (lambda cut: [*cut, cut[2]], "after its last"),
    "no spec": (without("spec"), "no spec"),
    "two specs": (changed(1, spec=shape(1)), "second spec"),
    "no digest": (without("xxh3"), "no xxh3"),
    "wrong digest": (changed(2, xxh3=b"\0" * 16), "do not match"),
    "digest too short": (changed(2, xxh3=b"\0"), "do not match"),
    "digest on a middle frame": (changed(1, xxh3=b"\0" * 16), "only the last"),
    "other bytes": (changed(1, data=DATA[1 : MAX_FRAME_BYTES + 1]), "do not match"),
    "empty frame": (changed(1, data=b""), "frame of 0 bytes"),
    "oversized frame": (changed(0, data=DATA[: MAX_FRAME_BYTES + 1]), "frame of 1048577 bytes"),
    "more bytes than its shape": (changed(0, spec=shape(1000)), "more bytes"),
    "fewer bytes than its shape": (changed(0, spec=shape(3, MAX_FRAME_BYTES // 4 - 1)), "more bytes"),
    "unspecified type": (changed(0, spec=shape(4, data_type=0)), "data type 0"),
    "unknown type": (changed(0, spec=shape(4, data_type=99)), "data type 99"),
    "no extents": (changed(0, spec=shape()), "1 to 8 extents"),
    "nine extents": (changed(0, spec=shape(*[1] * 9)), "1 to 8 extents"),
    "extent of 0": (changed(0, spec=shape(4, 0)), "each at least 1"),
    "negative extents": (changed(0, spec=shape(-4, -4)), "each at least 1"),
    "over the limit": (changed(0, spec=shape(2**62, 2**62)), "at most 3145728 are allowed"),
    "just over the limit": (changed(0, spec=shape(3, MAX_FRAME_BYTES // 4 + 1)), "at most 3145728"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_stream_that_lies_is_refused_by_name(lie):
    change, description = LIES[lie]
    with pytest.raises(InvalidInput) as raised:
        read(change(frames()))
    (violation,) = raised.value.violations
    assert violation.field == "latents"
    assert description in violation.description


def test_memory_is_taken_only_after_the_limit_is_checked():
    reader = FrameReader("latents", limit_bytes=1024)
    with pytest.raises(InvalidInput):
        reader.add(frames()[0])
    assert len(reader.data) == 0


def test_bytes_that_are_not_the_spec_are_a_fault_of_the_sender():
    with pytest.raises(ValueError, match="do not make"):
        frames(DATA[1:])


def test_a_tensor_of_tiny_frames_is_put_together_too():
    data = DATA[:200_000]
    spec, count = TensorSpec(F32, (50_000,)), 997
    (whole,) = frames(data, spec)
    cut = [tensor_pb2.TensorFrame(data=data[start : start + count]) for start in range(0, len(data), count)]
    cut[0].spec.CopyFrom(whole.spec)
    cut[-1].xxh3 = whole.xxh3
    reader = read(cut)
    assert reader.data == data
    assert len(reader.chunks) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_tensors_survive_the_trip_bit_for_bit(dtype, contiguous):
    tensor = torch.randn(5, 300, 700).to(dtype)
    tensor = tensor if contiguous else tensor.transpose(0, 2)
    arrived = frames_tensor(read(tensor_frames(tensor), limit_bytes=1 << 23))
    assert arrived.dtype is dtype
    assert torch.equal(arrived, tensor)
    envelope = FrameEnvelope(text_encoder_service_pb2.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)
    parse = text_encoder_service_pb2.EncodePromptResponse.FromString
    sent = (parse(raw).prompt_embedding for raw in serialized_tensor_frames(tensor, envelope))
    assert torch.equal(frames_tensor(read(sent, limit_bytes=1 << 23)), tensor)


def test_nan_survives_too():
    tensor = torch.tensor([float("nan"), float("inf"), -0.0])
    arrived = frames_tensor(read(tensor_frames(tensor)))
    assert arrived.view(torch.int32).tolist() == tensor.view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("expected", "description"),
    [
        ({"shape": (2, None)}, r"\[2, 3, 4\]; must be \[2, any\]"),
        ({"shape": (2, None, 5)}, r"must be \[2, any, 5\]"),
    ],
)
def test_another_shape_than_expected_is_refused(expected, description):
    reader = read(tensor_frames(torch.zeros(2, 3, 4)))
    with pytest.raises(InvalidInput, match=description):
        frames_tensor(reader, **expected)


def test_an_unfinished_tensor_is_not_given_out():
    reader = FrameReader("latents", limit_bytes=SPEC.byte_count)
    reader.add(frames()[0])
    with pytest.raises(InvalidInput, match="incomplete"):
        frames_tensor(reader)

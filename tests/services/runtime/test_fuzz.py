"""Decoders and validators under random and broken input: documented errors only, within bounds of size and time."""

import string
import tracemalloc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from klein_api.v1 import (
    denoiser_service_pb2,
    image_pb2,
    image_service_pb2,
    tensor_pb2,
    vae_decoder_service_pb2,
)
from klein_core.errors import InvalidInput
from klein_core.vae_decoder.image_io import ReferenceLimits, prepare_reference
from klein_services.denoiser.adapters import AdapterFolder
from klein_services.orchestrator.authentication import bearer_token
from klein_services.orchestrator.request import AdmissionLimits, ImageRequest, validated
from klein_services.orchestrator.routing import single_route_table
from klein_services.orchestrator.stage_directory import RouteInfo
from klein_services.orchestrator.tokens import TokensError, parse_tokens
from klein_services.runtime import protowire
from klein_services.runtime.caller import Caller, forwarded_caller, peer_host
from klein_services.runtime.frames import FrameReader
from klein_services.runtime.status import RichStatus, status_of
from tests.tiny.image_files import encoded, png_bomb, webp_bomb

ROUTE = single_route_table("fake", "a:1", "b:1", "c:1", 64, 512 * 512).routes["fake"]
LIMITS = AdmissionLimits(reference_bytes=256)
STATUS_BYTES = 8192
"""Most bytes of HTTP/2 headers that every client reads."""
MESSAGES = (
    denoiser_service_pb2.DenoiseLatentsRequest,
    vae_decoder_service_pb2.DecodeLatentsRequest,
    vae_decoder_service_pb2.EncodeInitialImageRequest,
    image_service_pb2.GenerateImageRequest,
)
IMAGE = Image.effect_noise((80, 72), 60).convert("RGB")
FILES = {
    "png": encoded(IMAGE),
    "palette": encoded(IMAGE.convert("P")),
    "jpeg": encoded(IMAGE, "JPEG", quality=40),
    "webp": encoded(IMAGE, "WEBP"),
    "gif": encoded(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)]),
    "bmp": encoded(IMAGE, "BMP"),
    "png bomb": png_bomb(60_000),
    "webp bomb": webp_bomb(16_000),
}

int32s = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 16, 64, 65, 512, 1024])
texts = st.text(max_size=40) | st.sampled_from(["", "../x", "\0", "a" * 300, "\ud7ff", "x" * 65])
numbers = st.floats(-3e38, 3e38) | st.sampled_from(
    [0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")]
)
files = st.binary(max_size=200) | st.sampled_from([*(file[:200] for file in FILES.values()), b"", bytes(300)])
maybe = st.none()
specs = st.builds(
    image_service_pb2.ImageSpec,
    model=texts,
    prompt=texts,
    negative_prompt=maybe | texts,
    references=st.lists(files, max_size=6),
    width_px=maybe | int32s,
    height_px=maybe | int32s,
    step_count=maybe | int32s,
    guidance_scale=maybe | numbers,
    seed=maybe | st.integers(-(2**63), 2**63 - 1),
    image_count=maybe | int32s,
    format=int32s,
    quality=maybe | int32s,
    priority=int32s,
    adapters=st.lists(st.builds(image_pb2.Adapter, name=texts, scale=maybe | numbers), max_size=10),
    embed_prompt=st.booleans(),
    initial_image=maybe | files,
    mask=maybe | files,
    strength=maybe | st.floats(),
    mask_is_alpha=st.booleans(),
    mask_padding_px=maybe | int32s,
    expand=maybe
    | st.builds(image_pb2.ImageExpansion, left_px=int32s, top_px=int32s, right_px=int32s, bottom_px=int32s),
    preserve_unmasked=maybe | st.booleans(),
)


def assert_documented(error: Exception) -> RichStatus:
    """Checks that a refusal is one that a client can read: named fields, a status that fits into headers."""
    status = status_of(error)
    assert status.code.name == "INVALID_ARGUMENT"
    assert error.violations
    trailing = status.trailing_metadata()
    assert sum(len(key) + len(value) for key, value in trailing) < STATUS_BYTES
    return status


@given(spec=specs, interval=int32s, is_distilled=st.booleans())
def test_every_spec_is_a_request_or_a_refusal_by_field(spec, interval, is_distilled):
    info = RouteInfo(is_distilled, 4, 1.0, "text", "vae", "denoiser", 32, 0, 0, ())
    try:
        request = validated(spec, interval, ROUTE, info, LIMITS)
    except InvalidInput as error:
        assert_documented(error)
    else:
        assert isinstance(request, ImageRequest)
        assert 0 < request.most_pixel_count < 1 << 40
        assert 1 <= len(request.params.seeds) <= LIMITS.image_count


@given(raw=st.binary(max_size=400), message_class=st.sampled_from(MESSAGES))
@example(raw=b"\x0b" * 400, message_class=MESSAGES[0])
@example(raw=b"\x12\xff\xff\xff\xff\x0f", message_class=MESSAGES[0])
def test_bytes_are_a_message_or_a_decode_error(raw, message_class):
    try:
        message = protowire.frame_deserializer(message_class)(raw)
    except DecodeError:
        return
    oneofs = message_class.DESCRIPTOR.oneofs_by_name
    if "part" in oneofs:
        message.WhichOneof("part")


@given(
    message=st.binary(max_size=200)
    | st.binary(max_size=60).map(lambda data: b"\x12" + bytes((len(data),)) + data)
)
def test_the_relay_passes_on_a_frame_or_refuses_every_message(message):
    assert 0 <= protowire.field_number(message) < 32
    frame = protowire.frame_field(message)
    assert frame is None or frame == message
    indexed = protowire.indexed_frame_field(message)
    if indexed is not None:
        assert 0 <= indexed[0] < 1 << 35
        assert len(indexed[1]) <= len(message)
        protowire.as_reference_latents(*indexed)
    chunk = protowire.chunk_of(message)
    assert chunk is None or len(chunk) < len(message)
    assert protowire.is_last_frame(message) in (True, False)


tensor_frames = st.builds(
    tensor_pb2.TensorFrame,
    spec=maybe
    | st.builds(
        tensor_pb2.TensorSpec,
        data_type=st.integers(0, 5),
        shape=st.lists(st.integers(-2, 9) | st.sampled_from([2**31, 2**62, -(2**63)]), max_size=10),
    ),
    data=st.binary(max_size=64),
    xxh3=maybe | st.binary(max_size=20),
)


@given(sent=st.lists(tensor_frames, max_size=8))
def test_frames_make_a_tensor_within_its_limit_or_are_refused(sent):
    reader = FrameReader("latents", limit_bytes=256)
    try:
        for frame in sent:
            reader.add(frame)
        reader.require_finished()
    except InvalidInput as error:
        assert_documented(error)
    else:
        assert len(reader.data) == reader.spec.byte_count <= 256
    assert sum(map(len, reader.chunks)) <= 256 + 64


@st.composite
def damaged_files(draw):
    data = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(0, 6))):
        position = draw(st.integers(0, min(len(data), 400) - 1) | st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                data[position] = draw(st.integers(0, 255))
            case "cut":
                del data[position : position + draw(st.integers(1, 50))]
            case "insert":
                data[position:position] = draw(st.binary(min_size=1, max_size=12))
        if not data:
            return b""
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=damaged_files() | st.binary(max_size=300))
@example(data=FILES["png bomb"])
@example(data=FILES["webp bomb"])
def test_a_file_is_a_small_image_or_a_refusal_in_the_suites_own_words(data):
    limits = ReferenceLimits(byte_count=1 << 20, pixel_count=256 * 256, side_px=16)
    try:
        image = prepare_reference(data, field="references[0]", limits=limits)
    except InvalidInput as error:
        text = assert_documented(error).message
        assert text.startswith("references[0]: ")
        for foreign in ("decompression bomb", "DOS attack", "MAX_", "Pillow", "PIL"):
            assert foreign not in text
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= limits.pixel_count
        assert image.width % 16 == image.height % 16 == 0


def test_the_memory_of_refusing_bombs_does_not_grow_with_what_they_claim():
    limits = ReferenceLimits()
    tracemalloc.start()
    try:
        for name in ("png bomb", "webp bomb"):
            with pytest.raises(InvalidInput, match=str(limits.pixel_count)):
                prepare_reference(FILES[name], limits=limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


toml_words = st.sampled_from(
    ["[tokens.a]", "[tokens]", "[[tokens.a]]", "sha256", "=", '"', "'", "[", "]", "{", "}", "\n", "weight", "nan",
     "1e999", "-1", "0x1", "1979-05-27", "true", f'"{"a" * 64}"', f'["{"b" * 64}"]', "models", '["m"]', "#", "\\u"]
)  # fmt: skip


@given(
    content=st.binary(max_size=300)
    | st.lists(toml_words, max_size=30).map(lambda words: " ".join(words).encode())
)
@example(content=b"x = " + b"[" * 20_000)
@example(content=b"x = " + b"{a=" * 20_000)
@example(content=b"tokens" + b".a" * 1_000 + b" = 1")
def test_a_tokens_file_has_tenants_or_problems(content):
    try:
        tokens = parse_tokens(content, "tokens.toml")
    except TokensError as refused:
        problems = refused.problems
    else:
        problems = ("none",)
        assert tokens.names
        assert tokens.tenant_of("") is None
    assert problems


header_values = st.text(string.printable, max_size=60) | st.binary(max_size=40)


@given(
    metadata=st.lists(
        st.tuples(st.sampled_from(["authorization", "klein-caller", "klein-weight", "x"]), header_values)
        | st.tuples(st.just("klein-weight"), st.floats().map(str)),
        max_size=4,
    ),
    peer=st.text(max_size=40)
    | st.sampled_from(["ipv6:%5B::1%5D:5", "ipv4:1.2.3.4:5", "unix:/a", "unix:", "%"]),
)
def test_any_metadata_makes_a_caller_with_a_usable_name_and_weight(metadata, peer):
    found = forwarded_caller(metadata, peer)
    assert isinstance(found, Caller)
    assert 0.01 <= found.weight <= 1000
    assert isinstance(peer_host(peer), str)
    token = bearer_token(metadata)
    assert token == token.strip()


@given(name=texts)
def test_no_name_of_an_adapter_leads_out_of_its_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "adapters"
    folder.mkdir(exist_ok=True)
    (folder.parent / "secret.safetensors").touch()
    path = AdapterFolder(folder).path(name)
    assert path is None or path.resolve().parent == folder.resolve()

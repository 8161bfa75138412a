"""Initial images of masked edits: encoded and laid over as klein_core does it; bad files are refused by name."""

import asyncio
from io import BytesIO

import grpc
import pytest
import pytest_asyncio
import torch
from PIL import Image

from klein_api.v1 import image_pb2, vae_decoder_service_pb2_grpc
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.params import Expansion
from klein_core.vae_decoder.decoder import VaeDecoder, image_tensor
from klein_core.vae_decoder.image_io import encode_image
from klein_core.vae_decoder.initial_image import prepare_initial_image
from klein_services.runtime.channels import open_channel
from klein_services.runtime.frames import MAX_FRAME_BYTES
from klein_services.runtime.server import running_server
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.vae_decoder_calls import (
    LIMIT_BYTES,
    decode,
    decode_parts,
    encode_initial_image,
    initial_image_parts,
    latents,
    overlay_parts,
    picture,
    refusal,
    tiny_application,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def png(image):
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rectangle(width, height, box):
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


IMAGE, MASK = picture(101, 70), png(rectangle(101, 70, (20, 10, 60, 50)))
ALPHA = Image.open(BytesIO(IMAGE)).convert("RGB")
ALPHA.putalpha(rectangle(101, 70, (20, 10, 60, 50)))
CASES = {
    "image alone": (IMAGE, None, {}, {}),
    "mask": (IMAGE, MASK, {}, {}),
    "alpha mask": (IMAGE, png(ALPHA), {"mask_is_alpha": True}, {"mask_is_alpha": True}),
    "padding": (IMAGE, MASK, {"mask_padding_px": 5}, {"mask_padding_px": 5}),
    "expansion": (
        IMAGE,
        None,
        {"expand": image_pb2.ImageExpansion(left_px=40, bottom_px=3)},
        {"expand": Expansion(left=40, bottom=3)},
    ),
    "fewer pixels": (picture(200, 160), None, {"pixel_count": 10_000}, {"pixel_count": 10_000}),
}


@pytest.fixture(scope="module")
def oracle(tiny_checkpoint):
    return VaeDecoder.from_folder(tiny_checkpoint)


@pytest.fixture(scope="module")
def application(tiny_checkpoint):
    # Files of several MiB must come through on a busy machine, too.
    return tiny_application(tiny_checkpoint, receive_timeout_seconds=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stub(application):
    async with running_server(application) as address, open_channel(address) as channel:
        yield vae_decoder_service_pb2_grpc.VaeDecoderServiceStub(channel)


@pytest.mark.parametrize("case", CASES)
async def test_an_initial_image_and_its_mask_become_klein_cores_tensors(stub, oracle, case):
    image, mask, fields, options = CASES[case]
    expected = prepare_initial_image(image, mask, **options)
    summary, encoded, token_mask = await encode_initial_image(
        stub, initial_image_parts(image, mask, **fields)
    )
    assert torch.equal(encoded, oracle.encode(image_tensor(expected.pixels())))
    assert torch.equal(token_mask, expected.token_mask())
    assert token_mask.dtype == torch.float32
    assert (summary.width_px, summary.height_px) == (expected.width_px, expected.height_px)
    assert summary.compute_duration.ToTimedelta().total_seconds() > 0


@pytest.mark.parametrize("case", CASES)
async def test_a_decoded_image_is_laid_over_the_initial_image_as_klein_core_does(stub, oracle, case):
    image, mask, fields, options = CASES[case]
    prepared = prepare_initial_image(image, mask, **options)
    tensor = latents(prepared.height_px // 16, prepared.width_px // 16)
    expected = prepared.laid_over(oracle.decode(tensor))
    summary, data = await decode(stub, overlay_parts(tensor, image, mask, **fields))
    assert data == encode_image(expected, "png")
    assert (summary.height_px, summary.width_px) == tuple(expected.shape[:2])
    assert case != "padding" or (summary.width_px, summary.height_px) == (101, 70)


SPEC = pb.EncodeInitialImageRequest(spec=pb.InitialImageSpec())
IMAGE_CHUNK = pb.EncodeInitialImageRequest(image_chunk=IMAGE)
BAD_IMAGES = {
    "no spec": ([IMAGE_CHUNK], "spec", "is missing"),
    "no image": ([SPEC], "initial_image", "is empty"),
    "a mask alone": (initial_image_parts(b"", MASK), "initial_image", "is empty"),
    "no image file": (initial_image_parts(b"x"), "initial_image", "not an image"),
    "no mask file": (initial_image_parts(IMAGE, b"x"), "mask", "not an image"),
    "an empty mask": (initial_image_parts(IMAGE, png(Image.new("L", (101, 70)))), "mask", "is empty"),
    "another aspect": (initial_image_parts(IMAGE, png(Image.new("L", (70, 101), 255))), "mask", "aspect"),
    "no alpha": (initial_image_parts(IMAGE, MASK, mask_is_alpha=True), "mask", "alpha"),
    "an empty chunk": ([SPEC, pb.EncodeInitialImageRequest(mask_chunk=b"")], "mask", "chunk of 0 bytes"),
    "the mask first": (
        [SPEC, pb.EncodeInitialImageRequest(mask_chunk=MASK), IMAGE_CHUNK],
        "initial_image",
        "must come first",
    ),
    "a padding alone": (initial_image_parts(IMAGE, mask_padding_px=4), "mask_padding_px", "needs a mask"),
    "a large padding": (initial_image_parts(IMAGE, MASK, mask_padding_px=1025), "mask_padding_px", "1024"),
    "a negative side": (
        initial_image_parts(IMAGE, expand=image_pb2.ImageExpansion(top_px=-1)),
        "expand",
        "negative",
    ),
    "a huge side": (initial_image_parts(IMAGE, expand=image_pb2.ImageExpansion(top_px=9999)), "expand", "8"),
    "few pixels": (initial_image_parts(IMAGE, pixel_count=4095), "pixel_count", "at least 4096"),
    "negative pixels": (initial_image_parts(IMAGE, pixel_count=-1), "pixel_count", "at least 4096"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
async def test_a_bad_initial_image_names_field_and_limit(stub, case):
    parts, field, description = BAD_IMAGES[case]
    details = await refusal(encode_initial_image(stub, iter(list(parts))))
    assert (details.code, details.violations[0].field) == (INVALID, field)
    assert description in details.violations[0].description


LATENTS = latents(4, 6)
DECODE_SPEC, *FRAMES = decode_parts(LATENTS)
OVERLAY = pb.DecodeLatentsRequest(spec=pb.DecodeSpec(overlay=image_pb2.InpaintingSpec()))
OVERLAY_IMAGE = pb.DecodeLatentsRequest(initial_image_chunk=IMAGE)
OVERLAY_MASK = pb.DecodeLatentsRequest(mask_chunk=MASK)
BAD_OVERLAYS = {
    "no files": ([OVERLAY, *FRAMES], "initial_image", "is empty"),
    "a mask alone": ([OVERLAY, OVERLAY_MASK, *FRAMES], "initial_image", "is empty"),
    "an image without overlay": ([DECODE_SPEC, OVERLAY_IMAGE, *FRAMES], "initial_image", "no overlay"),
    "a mask without overlay": ([DECODE_SPEC, OVERLAY_MASK, *FRAMES], "mask", "no overlay"),
    "files after the latents": ([OVERLAY, *FRAMES, OVERLAY_IMAGE], "initial_image", "before"),
    "latents alone missing": ([OVERLAY, OVERLAY_IMAGE, OVERLAY_MASK], "latents", "is missing"),
    "another size": (overlay_parts(latents(4, 4), IMAGE, MASK), "latents", "the overlay's is 96 × 64"),
    "no image file": (overlay_parts(LATENTS, b"x", MASK), "initial_image", "not an image"),
    "a padding alone": (overlay_parts(LATENTS, IMAGE, mask_padding_px=0), "mask_padding_px", "needs a mask"),
    "a large padding": (
        overlay_parts(LATENTS, IMAGE, MASK, mask_padding_px=-1),
        "mask_padding_px",
        "[0, 1024]",
    ),
}


@pytest.mark.parametrize("case", BAD_OVERLAYS)
async def test_a_bad_overlay_names_field_and_limit(stub, case):
    parts, field, description = BAD_OVERLAYS[case]
    details = await refusal(decode(stub, iter(list(parts))))
    assert (details.code, details.violations[0].field) == (INVALID, field)
    assert description in details.violations[0].description


@pytest.mark.parametrize(
    ("method", "arm", "field"),
    [
        ("EncodeInitialImage", "image_chunk", "initial_image"),
        ("EncodeInitialImage", "mask_chunk", "mask"),
        ("DecodeLatents", "initial_image_chunk", "initial_image"),
        ("DecodeLatents", "mask_chunk", "mask"),
    ],
)
async def test_a_file_over_the_limit_is_refused_before_it_has_all_come(stub, method, arm, field):
    spec = {"EncodeInitialImage": SPEC, "DecodeLatents": OVERLAY}[method]

    async def never_ending():
        yield spec
        for _ in range(4):
            yield type(spec)(**{arm: b"x" * MAX_FRAME_BYTES})
        # A client that went on writing could get grpc.aio's INTERNAL in place of the status.
        await asyncio.sleep(60)

    details = await refusal(getattr(stub, method)(never_ending()).read())
    assert (details.code, details.violations[0].field) == (INVALID, field)
    assert str(LIMIT_BYTES) in details.violations[0].description


async def test_another_model_is_not_found(stub):
    parts = [pb.EncodeInitialImageRequest(spec=pb.InitialImageSpec(model="other"))]
    details = await refusal(encode_initial_image(stub, iter(parts)))
    assert (details.code, details.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")


@pytest.mark.parametrize("method", ["EncodeInitialImage", "DecodeLatents"])
async def test_a_cancelled_call_gives_its_slot_back(application, stub, method):
    async def stalled():
        yield {"EncodeInitialImage": SPEC, "DecodeLatents": OVERLAY}[method]
        yield {"EncodeInitialImage": IMAGE_CHUNK, "DecodeLatents": OVERLAY_IMAGE}[method]
        await asyncio.sleep(60)

    call = getattr(stub, method)(stalled())
    await until(lambda: application.slots.in_use == 1)
    call.cancel()
    await until(lambda: application.slots.in_use == 0)
    assert (application.worker.queued_count, application.files.queued_count) == (0, 0)

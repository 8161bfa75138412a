"""A vae-decoder of a tiny checkpoint, and how tests call it."""

import io

import torch
from PIL import Image

from klein_api.v1 import image_pb2
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_services.runtime.frames import MAX_FRAME_BYTES, FrameReader
from klein_services.runtime.status import explain
from klein_services.runtime.tensors import frames_tensor, tensor_frames
from klein_services.vae_decoder.servicer import VaeDecoderStage
from klein_services.vae_decoder.settings import VaeDecoderSettings
from tests.services.fakes.runtime_toy import failure

LIMIT_BYTES = 3 << 20
"""Most bytes of a reference's file."""
RECEIVE_TIMEOUT_SECONDS = 3.0


def tiny_application(checkpoint, **settings):
    """Makes the application with small limits."""
    defaults = {
        "queue_limit": 4,
        "reference_bytes": LIMIT_BYTES,
        "receive_timeout_seconds": RECEIVE_TIMEOUT_SECONDS,
        "maximum_pixel_count": 512 * 512,
    }
    return VaeDecoderStage(
        VaeDecoderSettings(
            model_path=str(checkpoint), model_name="tiny", device="cpu", **(defaults | settings)
        )
    )


def picture(width=96, height=64, seed=0, **save):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, **{"format": "PNG", **save})
    return file.getvalue()


def latents(rows=4, columns=6, channels=16, dtype=torch.float32):
    return torch.randn(rows, columns, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


def reference_parts(data, chunk_bytes=MAX_FRAME_BYTES, **spec):
    yield pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(**spec))
    for start in range(0, len(data), chunk_bytes):
        yield pb.EncodeReferenceRequest(image_chunk=data[start : start + chunk_bytes])


def decode_parts(tensor, **spec):
    yield pb.DecodeLatentsRequest(spec=pb.DecodeSpec(**spec))
    for frame in tensor_frames(tensor):
        yield pb.DecodeLatentsRequest(latents=frame)


async def encode_reference(stub, parts):
    responses = [response async for response in stub.EncodeReference(parts)]
    reader = FrameReader("reference_latents", limit_bytes=1 << 24)
    for response in responses[1:]:
        reader.add(response.reference_latents)
    return responses[0].summary, frames_tensor(reader)


async def decode(stub, parts):
    responses = [response async for response in stub.DecodeLatents(parts)]
    chunks = [response.image_chunk for response in responses[1:]]
    assert all(1 <= len(chunk) <= MAX_FRAME_BYTES for chunk in chunks)
    return responses[0].summary, b"".join(chunks)


async def refusal(awaitable):
    return explain(await failure(awaitable))


def initial_image_parts(image, mask=None, **fields):
    spec = pb.InitialImageSpec(inpainting=image_pb2.InpaintingSpec(**fields))
    yield pb.EncodeInitialImageRequest(spec=spec)
    yield from (pb.EncodeInitialImageRequest(image_chunk=chunk) for chunk in chunks_of(image))
    yield from (pb.EncodeInitialImageRequest(mask_chunk=chunk) for chunk in chunks_of(mask or b""))


def overlay_parts(tensor, image, mask=None, *, decode=None, **fields):
    first, *frames = decode_parts(tensor, overlay=image_pb2.InpaintingSpec(**fields), **(decode or {}))
    yield first
    yield from (pb.DecodeLatentsRequest(initial_image_chunk=chunk) for chunk in chunks_of(image))
    yield from (pb.DecodeLatentsRequest(mask_chunk=chunk) for chunk in chunks_of(mask or b""))
    yield from frames


def chunks_of(data):
    return (data[start : start + MAX_FRAME_BYTES] for start in range(0, len(data), MAX_FRAME_BYTES))


async def encode_initial_image(stub, parts):
    """Returns the summary, the latents and the mask."""
    responses = [response async for response in stub.EncodeInitialImage(parts)]
    readers = {field: FrameReader(field, limit_bytes=1 << 24) for field in ("initial_latents", "mask")}
    for response in responses[1:]:
        field = response.WhichOneof("event")
        readers[field].add(getattr(response, field))
    return responses[0].summary, *(frames_tensor(reader) for reader in readers.values())

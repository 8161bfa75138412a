"""Bytes that stand for tensors and images, each made of everything that it would depend on."""

from __future__ import annotations

import hashlib

from klein_api.v1.image_pb2 import InpaintingSpec
from klein_api.v1.tensor_pb2 import DATA_TYPE_F32, TensorFrame
from klein_services.runtime.frames import TensorSpec, split_frames

TEXT_CHANNELS = 8
LATENT_CHANNELS = 4


def tensor_bytes(seed: bytes, byte_count: int) -> bytes:
    digest = hashlib.sha256(seed).digest()
    return (digest * (byte_count // len(digest) + 1))[:byte_count]


def prompt_embedding(prompt: str, tokens: int) -> bytes:
    return tensor_bytes(b"prompt:" + prompt.encode(), tokens * TEXT_CHANNELS * 4)


def reference_latents(data: bytes) -> bytes:
    width_px, height_px = reference_size_px(data)
    return tensor_bytes(b"reference:" + data, width_px // 16 * (height_px // 16) * LATENT_CHANNELS * 4)


def initial_latents(inpainting: InpaintingSpec, image: bytes, mask: bytes | None) -> bytes:
    width_px, height_px = reference_size_px(image)
    return tensor_bytes(
        b"initial:" + _edit_bytes(inpainting, image, mask),
        width_px // 16 * (height_px // 16) * LATENT_CHANNELS * 4,
    )


def token_mask(inpainting: InpaintingSpec, image: bytes, mask: bytes | None) -> bytes:
    width_px, height_px = reference_size_px(image)
    return tensor_bytes(
        b"mask:" + _edit_bytes(inpainting, image, mask), width_px // 16 * (height_px // 16) * 4
    )


def overlaid(latents: bytes, inpainting: InpaintingSpec, image: bytes, mask: bytes | None) -> bytes:
    """Bytes in place of `latents` where the initial image is laid over what is decoded from them."""
    return latents + b"|overlay:" + _edit_bytes(inpainting, image, mask)


def _edit_bytes(inpainting: InpaintingSpec, image: bytes, mask: bytes | None) -> bytes:
    return b"|".join([inpainting.SerializeToString(deterministic=True), image, repr(mask).encode()])


def reference_file(width_px: int, height_px: int, content: str = "") -> bytes:
    return f"image:{width_px}x{height_px}:{content}".encode()


def without_png_header(data: bytes) -> bytes:
    """What a fake stage reads of a file: `image:WxH…` or `mask:…`, behind a PNG file's begin where there is one."""
    return data[24:] if data.startswith(b"\x89PNG") else data


def reference_size_px(data: bytes) -> tuple[int, int]:
    width_px, height_px = data.split(b":")[1].split(b"x")
    return int(width_px), int(height_px)


def image_latents(
    width_px: int, height_px: int, seed: int, prompt: bytes, negative: bytes, references: list[bytes]
) -> bytes:
    everything = b"|".join([str(seed).encode(), prompt, negative, *references])
    return tensor_bytes(everything, width_px // 16 * (height_px // 16) * LATENT_CHANNELS * 4)


def encoded_image(latents: bytes, image_format: int, quality: int | None) -> bytes:
    return b"IMAGE" + hashlib.sha256(latents).digest() + f"{image_format} {quality}".encode()


def frames(data: bytes, *shape: int) -> list[TensorFrame]:
    return list(split_frames(memoryview(data), TensorSpec(DATA_TYPE_F32, shape)))

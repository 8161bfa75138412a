"""diffusers' pipeline with pico, its text encoder and its autoencoder at stages: the local pipeline's very picture."""

from __future__ import annotations

import asyncio
import copy
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from klein_api.v1 import tensor_pb2
from klein_client import InternalError, InvalidRequest, NotFound, Unavailable, WrongServer
from klein_client.diffusers import RemoteVae, remote_prompt_embeds
from klein_client.stages import VaeDecoder
from klein_client.tensors import FRAME_BYTES, Tensor, TensorReader
from klein_client.torch_tensors import from_torch, to_torch
from klein_core.pico import WEIGHTS
from klein_core.vae_decoder.decoder import VaeDecoder as VaeDecoderModel
from klein_services.runtime.server import running_server
from klein_services.text_encoder.servicer import TextEncoderStage
from klein_services.text_encoder.settings import TextEncoderSettings
from klein_services.vae_decoder.servicer import VaeDecoderStage
from klein_services.vae_decoder.settings import VaeDecoderSettings
from tests.services.fakes.denoiser_server import one_thread

pytestmark = pytest.mark.asyncio(loop_scope="module")
TAPS, LENGTH = (2, 3, 4), 64
SETTINGS = {"model_path": str(WEIGHTS), "model_name": "pico", "device": "cpu", "threads": 1}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def local() -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def text_encoder() -> AsyncIterator[str]:
    async with running_server(TextEncoderStage(TextEncoderSettings(**SETTINGS))) as address:
        yield address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vae_decoder() -> AsyncIterator[str]:
    async with running_server(VaeDecoderStage(VaeDecoderSettings(**SETTINGS))) as address:
        yield address


def remote_pipeline(local: Flux2KleinPipeline, target: str) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline(
        scheduler=local.scheduler,
        vae=RemoteVae(target),
        text_encoder=None,
        tokenizer=None,
        transformer=local.transformer,
        is_distilled=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Flux2KleinPipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    images = pipeline(
        width=128,
        height=96,
        num_inference_steps=4,
        generator=generator,
        max_sequence_length=LENGTH,
        text_encoder_out_layers=TAPS,
        **options,
    ).images
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def local_with_our_layers(local: Flux2KleinPipeline) -> Flux2KleinPipeline:
    """diffusers' pipeline and autoencoder around klein_core's layers, which round as the stage's do."""
    vae, ours = copy.deepcopy(local.vae), VaeDecoderModel.from_folder(WEIGHTS).autoencoder
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        setattr(vae, name, getattr(ours, name))
    return Flux2KleinPipeline(**{**local.components, "vae": vae}, is_distilled=True)


def references(count: int) -> list[Image.Image] | None:
    noise = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return [Image.fromarray(noise)] * count or None


@pytest.mark.parametrize("reference_count", [0, 1, 2])
async def test_the_picture_is_that_of_the_local_pipeline(
    local, local_with_our_layers, text_encoder, vae_decoder, reference_count
):
    prompt, images = "a large red heart on a yellow background", references(reference_count)
    embeds = await asyncio.to_thread(remote_prompt_embeds, text_encoder, prompt)
    with torch.no_grad():
        theirs, _ = local.encode_prompt(prompt, max_sequence_length=LENGTH, text_encoder_out_layers=TAPS)
    assert torch.equal(embeds, theirs)
    pipeline = remote_pipeline(local, vae_decoder)
    found = await asyncio.to_thread(picture, pipeline, prompt_embeds=embeds, image=images)
    expected = await asyncio.to_thread(picture, local_with_our_layers, prompt=prompt, image=images)
    assert np.ptp(expected) > 50, "a flat picture would prove nothing"
    assert found.tobytes() == expected.tobytes()
    stock = await asyncio.to_thread(picture, local, prompt=prompt, image=images)
    assert np.abs(found.astype(int) - stock.astype(int)).max() <= 1
    pipeline.vae.close()


async def test_several_prompts_are_one_batch(local, text_encoder, vae_decoder):
    prompts = ["a large red heart on a yellow background", "a blue star"]
    embeds = await asyncio.to_thread(remote_prompt_embeds, text_encoder, prompts)
    pipeline = remote_pipeline(local, vae_decoder)
    found = await asyncio.to_thread(picture, pipeline, prompt_embeds=embeds)
    expected = await asyncio.to_thread(picture, local, prompt=prompts)
    assert found.shape == (2, 96, 128, 3)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    pipeline.vae.close()


async def test_errors_name_the_field_or_the_stage(text_encoder, vae_decoder):
    with pytest.raises(InvalidRequest) as too_long:
        await asyncio.to_thread(remote_prompt_embeds, text_encoder, "x" * 40_000)
    assert [violation.field for violation in too_long.value.violations] == ["prompt"]
    with pytest.raises(NotFound, match="pico"):
        await asyncio.to_thread(remote_prompt_embeds, text_encoder, "a ring", model="other")
    with pytest.raises(WrongServer, match="klein text-encoder"):
        await asyncio.to_thread(remote_prompt_embeds, vae_decoder, "a ring")
    with pytest.raises(Unavailable, match="no klein text-encoder answers"):
        await asyncio.to_thread(remote_prompt_embeds, "127.0.0.1:1", "a ring", timeout_seconds=30)
    with pytest.raises(ValueError, match="prompts is empty"):
        remote_prompt_embeds(text_encoder, [])
    vae = RemoteVae(vae_decoder)
    with pytest.raises(InvalidRequest, match="latents"):
        await asyncio.to_thread(vae.decode, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(batch"):
        vae.decode(torch.zeros(0, 32, 8, 8))
    vae.close()


def frames_of(count: int = 600_000) -> list[tensor_pb2.TensorFrame]:
    return list(from_torch(torch.arange(count, dtype=torch.float32).view(2, -1)).frames())


def read(frames: list[tensor_pb2.TensorFrame], **options) -> torch.Tensor:
    reader = TensorReader("latents", rank=2, **options)
    for frame in frames:
        reader.add(frame)
    return to_torch(reader.tensor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
async def test_tensors_survive_their_frames(dtype):
    tensor = torch.randn(700, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(read(list(from_torch(tensor.t().t()).frames())), tensor)
    assert read(frames_of()).flatten()[-1] == 599_999
    assert {len(frame.data) for frame in frames_of()[:-1]} == {FRAME_BYTES}


def spoiled(change) -> list[tensor_pb2.TensorFrame]:
    frames = frames_of()
    change(frames)
    return frames


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda frames: frames.pop(), "is incomplete"),
        (lambda frames: frames.clear(), "is incomplete"),
        (lambda frames: frames.pop(0), "has no spec"),
        (lambda frames: frames.insert(1, frames[0]), "second spec"),
        (lambda frames: frames.append(frames[-1]), "after its last one"),
        (lambda frames: setattr(frames[-1], "xxh3", b"no"), "do not match its xxh3"),
        (lambda frames: setattr(frames[0], "xxh3", b"early"), "on another frame than the last"),
        (lambda frames: frames[-1].ClearField("xxh3"), "on another frame than the last"),
        (lambda frames: setattr(frames[1], "data", b""), "a frame of 0 bytes"),
        (lambda frames: setattr(frames[0], "data", frames[0].data + b"x"), "a frame of 1048577 bytes"),
        (lambda frames: setattr(frames[-1], "data", frames[-1].data + b"more"), "more bytes than"),
        (lambda frames: setattr(frames[0].spec, "data_type", 0), "data type 0"),
        (lambda frames: frames[0].spec.shape.append(1), "must have 2 extents"),
        (lambda frames: frames[0].spec.shape.__setitem__(0, 0), "must have 2 extents"),
    ],
)
async def test_frames_that_make_no_tensor_are_refused(change, text):
    with pytest.raises(InternalError, match=text):
        read(spoiled(change))


async def test_the_limit_is_checked_before_memory_is_taken():
    assert read(frames_of(), limit_bytes=2_400_000).numel() == 600_000
    with pytest.raises(InternalError, match="at most 2399999 are allowed"):
        read(frames_of()[:1], limit_bytes=2_399_999)


async def test_tensors_that_cannot_be_sent_are_refused(vae_decoder):
    for shape, data in (((2, 2), b"123"), ((0,), b"")):
        with pytest.raises(ValueError, match="do not make a tensor"):
            Tensor(tensor_pb2.DATA_TYPE_F32, shape, data)
    with pytest.raises(ValueError, match="only bf16, f16 and f32"):
        from_torch(torch.zeros(2, dtype=torch.int64))
    with VaeDecoder(vae_decoder) as stage, pytest.raises(InvalidRequest, match="reference"):
        await asyncio.to_thread(stage.encode, b"no picture")


async def test_the_package_itself_needs_no_torch() -> None:
    code = "import sys, klein_client, klein_client.stages; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert (
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=False)
    ).returncode == 0

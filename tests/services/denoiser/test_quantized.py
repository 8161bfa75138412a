"""A denoiser that serves quantized weights gives the bytes of the pipeline on the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_api.v1 import stage_service_pb2
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_core.pipeline import Pipeline
from klein_services.cli.suite import Suite, SuiteOptions
from tests.services.fakes.denoiser_server import (
    Tensors,
    denoise,
    one_thread,
    request,
    running_denoiser,
    spec,
)
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.layouts import bfl_transformer
from tests.tiny.quantized import comfy_header, is_block_matrix, quantized_file, write_float8

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny checkpoint whose transformer is as the authors' fp8 file."""
    folder = tmp_path_factory.mktemp("fp8")
    save_tiny_checkpoint(folder, dtype=torch.bfloat16)
    file = quantized_file(bfl_transformer(load_file(folder / WEIGHTS)), write_float8, is_block_matrix)
    tensors = {name: tensor.contiguous() for name, tensor in file.tensors.items()}
    save_file(tensors, folder / WEIGHTS, comfy_header(file.layers, "float8_e4m3fn"))
    return folder


async def test_an_fp8_file_through_the_service(folder: Path):
    with one_thread(), torch.no_grad():
        pipeline = Pipeline.from_folder(folder)
        expected = next(pipeline.generate(PROMPT, width_px=64, height_px=96, seeds=[3]))
        embedding = pipeline.text_encoder.encode([PROMPT])[0].embedding
    async with running_denoiser(folder) as channel:
        wish = spec(width_px=64, height_px=96, seeds=[3])
        heard = await denoise(channel, request(wish, Tensors(embedding)))
        described = await StageServiceStub(channel).DescribeStage(stage_service_pb2.DescribeStageRequest())
    with one_thread(), torch.no_grad():
        assert torch.equal(pipeline.vae_decoder.decode(heard.latents[0]), expected)
    assert described.dtype == "bf16"


async def test_plain_weights_quantized_at_load_through_the_service(tmp_path: Path):
    save_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    with one_thread(), torch.no_grad():
        pipeline = Pipeline.from_folder(tmp_path, quantization="int8")
        embedding = pipeline.text_encoder.encode([PROMPT])[0].embedding
        expected = next(pipeline.generate(PROMPT, width_px=64, height_px=64, seeds=[3]))
    async with running_denoiser(tmp_path, quantization="int8") as channel:
        heard = await denoise(channel, request(spec(seeds=[3]), Tensors(embedding)))
    with one_thread(), torch.no_grad():
        assert torch.equal(pipeline.vae_decoder.decode(heard.latents[0]), expected)


def test_klein_up_passes_quantization_to_its_stages():
    suite = Suite(SuiteOptions(quantization="int8"))
    try:
        for stage in ("denoiser", "text-encoder"):
            assert suite._settings(stage)["KLEIN_QUANTIZATION"] == "int8"
    finally:
        suite.stop()

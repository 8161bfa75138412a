"""A stage that is started with a broken or hostile file exits, names the file and the reason, and never serves."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.tensor_reader import TensorReader
from klein_core.errors import CheckpointError
from klein_core.model_registry import PUBLISHED_MODELS
from klein_services.cli.errors import CliError
from klein_services.cli.model_store import require_model
from klein_services.cli.process import inherited_environment
from klein_services.denoiser.application import DenoiserApplication
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import Server
from klein_services.text_encoder.servicer import TextEncoderStage
from klein_services.text_encoder.settings import TextEncoderSettings
from klein_services.vae_decoder.servicer import VaeDecoderStage
from klein_services.vae_decoder.settings import VaeDecoderSettings
from tests.core.hollow import hollow_file
from tests.tiny.checkpoint import save_tiny_checkpoint

STAGES = {
    "vae": (VaeDecoderStage, VaeDecoderSettings),
    "transformer": (DenoiserApplication, DenoiserSettings),
    "text_encoder": (TextEncoderStage, TextEncoderSettings),
}
WEIGHTS = {
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


async def refusal(component: str, **named) -> str:
    """Starts a stage, waits for its loading to fail, and checks that it never became ready."""
    application_class, settings_class = STAGES[component]
    settings = settings_class(host="127.0.0.1", port=0, metrics_port=0, device="cpu", **named)
    application = application_class(settings)
    server = Server(settings, application)
    try:
        await server.start()
        with pytest.raises(CheckpointError) as caught:
            await server.load()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            ready = health_pb2.HealthCheckRequest(service=application.service_names[0])
            health = await health_pb2_grpc.HealthStub(channel).Check(ready)
            described = await stage_service_pb2_grpc.StageServiceStub(channel).DescribeStage(
                stage_service_pb2.DescribeStageRequest()
            )
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not described.serving
        assert not described.weights_digest
    finally:
        await server.abandon()
        await application.close()
    return str(caught.value)


def rewritten(path: Path, change) -> None:
    """Changes a file's header and leaves the tensors' bytes as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def giant_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def overlapping(path: Path) -> None:
    def change(header):
        header["decoder.conv_in.bias"]["data_offsets"] = header["encoder.conv_in.bias"]["data_offsets"]

    rewritten(path, change)


def wrong_dtype(path: Path) -> None:
    rewritten(path, lambda header: header["decoder.conv_in.bias"].update(dtype="I32"))


def unknown_dtype(path: Path) -> None:
    rewritten(path, lambda header: header["decoder.conv_in.bias"].update(dtype="Q4"))


def wrong_shape(path: Path) -> None:
    rewritten(path, lambda header: header["decoder.conv_in.bias"].update(shape=[4, 8]))


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"decoder.conv_in.bias": 1}))


def only_pickles(path: Path) -> None:
    path.rename(path.with_suffix(".bin"))


def no_statistics(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("bn.")}, path)


def a_link_out(path: Path) -> None:
    outside = path.parents[2] / "outside.safetensors"
    path.rename(outside)
    path.symlink_to(outside)


def a_missing_shard(path: Path) -> None:
    names = dict.fromkeys(load_file(path), "m-00001-of-00002.safetensors") | {
        "bn.running_mean": "m-00002-of-00002.safetensors"
    }
    tensors = load_file(path)
    del tensors["bn.running_mean"]
    path.unlink()
    save_file(tensors, path.with_name("m-00001-of-00002.safetensors"))
    path.with_name("m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ["is truncated"]),
        (giant_header, ["header", "100000000"]),
        (overlapping, ["overlapping", "conv_in.bias"]),
        (wrong_dtype, ["decoder.conv_in.bias (I32)", "not one of F32, F16, BF16"]),
        (unknown_dtype, ["dtype that the format does not have", "decoder.conv_in.bias"]),
        (wrong_shape, ["decoder.conv_in.bias (4, 8) instead of (32,)"]),
        (a_pickle, ["a pickle, which is never read"]),
        (only_pickles, ["only pickle files", "diffusion_pytorch_model.bin"]),
        (no_statistics, ["missing: bn.running_mean, bn.running_var"]),
        (a_link_out, ["links that leave", "diffusion_pytorch_model.safetensors"]),
        (a_missing_shard, ["m-00002-of-00002.safetensors is missing"]),
    ],
)
async def test_an_autoencoder_s_file(copy, damage, words):
    damage(copy / "vae" / WEIGHTS["vae"])
    message = await refusal("vae", model_path=str(copy))
    assert all(word in message for word in (*words, str(copy / "vae"))), message


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
async def test_the_other_stages_files(copy, component):
    truncated(copy / component / WEIGHTS[component])
    assert "is truncated" in await refusal(component, model_path=str(copy))


async def test_a_part_that_is_another_part_is_called_that(copy):
    message = await refusal(
        "transformer",
        model_path=str(copy),
        weights_path=str(copy / "vae" / WEIGHTS["vae"]),
        variant="klein-4b",
    )
    assert "no tensor of a klein transformer: it holds a vae" in message


async def test_the_text_encoder_of_another_size(copy, tmp_path):
    large = hollow_file(tmp_path, "text_encoder", PUBLISHED_MODELS["klein-9b"].text_encoder, "transformers")
    message = await refusal("text_encoder", model_path=str(copy), weights_path=str(large), variant="klein-4b")
    assert "another size: its hidden size is 4096, klein-4b needs 2560" in message
    assert str(large) in message


async def test_a_bare_transformer_that_could_be_several_models(tmp_path):
    file = hollow_file(tmp_path, "transformer", PUBLISHED_MODELS["klein-9b"].transformer, "bfl")
    message = await refusal("transformer", weights_path=str(file))
    assert all(name in message for name in ("klein-9b", "klein-base-9b", "klein-9b-kv", "variant"))


async def test_a_file_that_is_truncated_while_it_is_read(copy, monkeypatch):
    """A mapped file would end the process here."""
    path = copy / "vae" / WEIGHTS["vae"]
    open_files = TensorReader.__enter__

    def cutting(reader):
        opened = open_files(reader)
        os.truncate(path, path.stat().st_size // 2)
        return opened

    monkeypatch.setattr(TensorReader, "__enter__", cutting)
    assert "truncated since" in await refusal("vae", model_path=str(copy))


def test_the_process_ends_with_1_and_one_line(copy):
    no_statistics(copy / "vae" / WEIGHTS["vae"])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "klein_services.cli.main",
            "serve",
            "vae-decoder",
            "--model",
            str(copy),
            "--port",
            "0",
        ],
        env=inherited_environment() | {"KLEIN_METRICS_PORT": "0", "KLEIN_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    last = json.loads(done.stderr.splitlines()[-1])
    assert "missing: bn.running_mean, bn.running_var" in last["message"]
    assert "Traceback" not in done.stderr
    assert '"serving"' not in done.stderr


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "is truncated"),
        (a_pickle, "a pickle"),
        (a_link_out, "links that leave"),
        (a_missing_shard, "m-00002"),
        (no_statistics, "missing: bn.running_mean"),
    ],
)
def test_up_refuses_before_it_starts_anything(copy, damage, words):
    damage(copy / "vae" / WEIGHTS["vae"])
    with pytest.raises(CliError) as caught:
        require_model(ModelFiles.of(copy))
    assert words in str(caught.value)
    assert caught.value.exit_code == 1

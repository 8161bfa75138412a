"""Adapters through a real denoiser: bit-identical results, files that change, bounded memory, named errors."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import grpc
import pytest
import torch

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import stage_service_pb2
from klein_api.v1.image_pb2 import Adapter
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    Heard,
    Tensors,
    alone,
    denoise,
    eventually,
    gated_steps,
    image,
    prompt,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)
from tests.services.fakes.simulated_device import metric
from tests.tiny.adapters import FORMATS, Written
from tests.tiny.transformer import relative_error, tiny_oracle

ORACLE = tiny_oracle()
NAMES = ("plain", "trained_2", "kron.3", "Had-4")
FORMS = ("diffusers", "kohya", "lokr-w2", "loha")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("distilled"), distilled=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, form) in enumerate(zip(NAMES, FORMS, strict=True)):
        write(folder, name, form, seed)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "adapters")


def write(folder: Path, name: str, form: str = "diffusers", seed: int = 0) -> Path:
    """Moves a complete file into place, as download tools do."""
    made = FORMATS[form].write(ORACLE, seed=seed).save(folder / f"{name}.part")
    return made.rename(folder / f"{name}.safetensors")


def wish(*adapters: tuple[str, float], **fields) -> api.DenoiseSpec:
    return spec(adapters=[Adapter(name=name, scale=scale) for name, scale in adapters], **fields)


def loads() -> float:
    return metric("klein_adapter_loads_total", outcome="loaded")


async def refusal(channel: grpc.aio.Channel, *adapters: tuple[str, float]):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await denoise(channel, request(wish(*adapters)))
    return explain(failure.value)


async def described(channel: grpc.aio.Channel) -> stage_service_pb2.DenoiserFacts:
    answer = await StageServiceStub(channel).DescribeStage(stage_service_pb2.DescribeStageRequest())
    return answer.denoiser


EIGHT = [
    wish(("plain", 0.5), seeds=[1]),
    wish(("trained_2", -1.0), seeds=[2], width_px=96),
    wish(("kron.3", 1.0), ("plain", 0.3), seeds=[3]),
    wish(("Had-4", 1.5), seeds=[4]),
    wish(seeds=[5]),
    wish(("plain", 0.5), seeds=[6]),
    wish(("plain", 2.0), ("trained_2", 1.0), ("kron.3", 0.1), ("Had-4", -0.2), seeds=[7]),
    wish(("trained_2", 0.0), seeds=[8]),
]


async def ask_all(channel: grpc.aio.Channel, tensors: list[Tensors]) -> list[Heard]:
    calls = (denoise(channel, request(each, with_it)) for each, with_it in zip(EIGHT, tensors, strict=True))
    return await asyncio.gather(*calls)


async def test_eight_at_once_with_different_adapters_each_get_what_they_get_alone(checkpoint, written):
    tensors = [Tensors(prompt(index)) for index in range(8)]
    async with running_denoiser(checkpoint, adapters_folder=str(written)) as channel:
        heard = await ask_all(channel, tensors)
    for each, with_it, got in zip(EIGHT, tensors, heard, strict=True):
        [expected] = alone(checkpoint, each, with_it, steps=4, adapters_folder=written)
        assert torch.equal(got.latents[0], expected)
    [plain] = alone(checkpoint, spec(seeds=[8]), tensors[7], steps=4)
    assert torch.equal(heard[7].latents[0], plain), "a scale of 0 is no adapter"


async def test_requests_with_different_adapters_share_a_step(checkpoint, written, monkeypatch):
    tensors = [Tensors(prompt(index)) for index in range(8)]
    settings = {"packing": "packed", "token_budget": 4096, "adapters_folder": str(written)}
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(checkpoint, **settings) as channel:
            gate.hold()
            asking = asyncio.create_task(ask_all(channel, tensors))
            await eventually(lambda: gate.arrived == 1)
            await asyncio.sleep(0.5)
            gate.release()
            heard = await asking
        assert max(map(len, gate.steps)) > 4
    for each, with_it, got in zip(EIGHT, tensors, heard, strict=True):
        [expected] = alone(checkpoint, each, with_it, steps=4, adapters_folder=written)
        assert relative_error(got.latents[0], expected) < 1e-4


async def test_references_of_a_model_that_caches_them(tmp_path, written):
    """A reference cache is reused only with the adapters that it was computed with."""
    folder = save_checkpoint(tmp_path, distilled=True, reference_cache=True)
    tensors = Tensors(prompt(1), references=(image(3, 5, seed=7),))
    wishes = [wish(*adapters, reference_count=1) for adapters in ([], [("plain", 1.0)], [("plain", 0.5)])]
    async with running_denoiser(folder, adapters_folder=str(written)) as channel:
        for each in (*wishes, *wishes):
            heard = await denoise(channel, request(each, tensors))
            [expected] = alone(folder, each, tensors, steps=4, adapters_folder=written)
            assert torch.equal(heard.latents[0], expected)


async def test_a_file_that_comes_is_replaced_and_goes(checkpoint, folder, monkeypatch):
    tensors = Tensors(prompt(1))
    before = loads()
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(checkpoint, adapters_folder=str(folder)) as channel:
            [old] = alone(checkpoint, wish(("plain", 1.0)), tensors, steps=4, adapters_folder=folder)
            assert torch.equal(
                (await denoise(channel, request(wish(("plain", 1.0)), tensors))).latents[0], old
            )
            gate.hold()
            running = asyncio.create_task(denoise(channel, request(wish(("plain", 1.0)), tensors)))
            await gate.blocked(4)
            write(folder, "plain", seed=9)
            late = asyncio.create_task(denoise(channel, request(wish(("plain", 1.0)), tensors)))
            await eventually(lambda: loads() == before + 2)
            gate.release()
            assert torch.equal((await running).latents[0], old), (
                "a request keeps the adapters it started with"
            )
            [new] = alone(checkpoint, wish(("plain", 1.0)), tensors, steps=4, adapters_folder=folder)
            assert torch.equal((await late).latents[0], new)
            assert not torch.equal(old, new)

            write(folder, "newcomer", seed=3)
            assert "newcomer" in [adapter.name for adapter in (await described(channel)).adapters]
            assert (await denoise(channel, request(wish(("newcomer", 1.0)), tensors))).latents
            (folder / "newcomer.safetensors").unlink()
            assert (await refusal(channel, ("newcomer", 1.0))).code is grpc.StatusCode.NOT_FOUND


async def test_memory_is_bounded_by_use(checkpoint, tmp_path):
    """Room for one and a half: the second pushes the first out, and a request that needs both is refused."""
    folder = tmp_path / "large"
    folder.mkdir()
    names = ("first", "second")
    for name in names:
        layer = "transformer.transformer_blocks.0.attn.to_q"
        tensors = {
            f"{layer}.lora_A.weight": torch.zeros(2600, 32),
            f"{layer}.lora_B.weight": torch.zeros(32, 2600),
        }
        Written(tensors).save(folder / f"{name}.safetensors")
    evictions = {"kind": "adapter"}
    async with running_denoiser(checkpoint, adapters_folder=str(folder), adapter_memory_mib=1) as channel:
        before, evicted = loads(), metric("klein_cache_evictions_total", **evictions)
        for name in (*names, "second", "first"):
            await denoise(channel, request(wish((name, 1.0))))
        assert loads() == before + 3
        assert metric("klein_cache_evictions_total", **evictions) == evicted + 2
        assert metric("klein_cache_bytes", kind="adapter") == 2 * 2600 * 32 * 4
        full = await refusal(channel, ("first", 1.0), ("second", 1.0))
        assert full.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert full.reason == "ADAPTER_MEMORY_FULL"
        assert full.retry_after_seconds
        assert (await denoise(channel, request(wish(("second", 1.0))))).latents


async def test_unknown_unusable_and_hostile_files_are_refused_by_name(checkpoint, folder, tmp_path):
    outside = write(tmp_path, "outside")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "inner.safetensors").symlink_to(folder / "plain.safetensors")
    (folder / "broken.safetensors").write_bytes(outside.read_bytes()[:-9])
    (folder / ".hidden.safetensors").write_bytes(outside.read_bytes())
    (folder / "a folder.safetensors").mkdir()
    layer = "text_encoder.layers.0.q_proj"
    Written({f"{layer}.lora_A.weight": torch.ones(1, 2)}).save(folder / "of-text.safetensors")
    large = {
        "proj_out.lora_A.weight": torch.zeros(9000, 32),
        "proj_out.lora_B.weight": torch.zeros(16, 9000),
    }
    Written(large).save(folder / "large.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    async with running_denoiser(checkpoint, adapters_folder=str(folder), adapter_memory_mib=1) as channel:
        facts = await described(channel)
        described_by_name = {adapter.name: adapter for adapter in facts.adapters}
        assert sorted(described_by_name) == sorted([*NAMES, "inner", "broken", "of-text", "large"])
        assert facts.adapter_count == 8
        assert "truncated" in described_by_name["broken"].problem
        assert "text encoder" in described_by_name["of-text"].problem
        assert not described_by_name["plain"].problem
        assert (described_by_name["kron.3"].kind, described_by_name["kron.3"].rank) == ("LoKr", 3)
        assert described_by_name["plain"].layer_count == len(FORMATS["diffusers"].targets(ORACLE))

        for name in ("nothing", "link", "pipe"):
            unknown = await refusal(channel, ("plain", 1.0), (name, 1.0))
            assert unknown.code is grpc.StatusCode.NOT_FOUND
            assert unknown.reason == "UNKNOWN_ADAPTER"
            assert unknown.violations[0].field == "adapters[1].name"
            assert name in unknown.message
            assert "Had-4, broken, inner, kron.3" in unknown.message
        for name, words in (
            ("broken", "truncated"),
            ("of-text", "text encoder"),
            ("large", "KLEIN_ADAPTER_MEMORY"),
        ):
            for _ in range(2):
                unusable = await refusal(channel, (name, 1.0))
                assert unusable.code is grpc.StatusCode.FAILED_PRECONDITION
                assert unusable.reason == "UNUSABLE_ADAPTER"
                assert words in unusable.message
                assert str(folder) not in unusable.message
        refused = await refusal(channel, ("../outside", 1.0), ("a", 99.0))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [each.field for each in refused.violations] == ["adapters[0].name", "adapters[1].scale"]
        assert (await denoise(channel, request(wish(("inner", 1.0))))).latents


async def test_an_unknown_adapter_is_refused_before_the_tensors_have_arrived(checkpoint, written):
    async with running_denoiser(checkpoint, adapters_folder=str(written)) as channel:
        first, *rest = request(wish(("nothing", 1.0)))

        async def slowly():
            yield first
            while True:
                # Longer than the pause after which a server answers a client that is still sending.
                await asyncio.sleep(0.5)
                yield rest[0]

        stub = channel.stream_stream(
            "/klein_api.v1.DenoiserService/DenoiseLatents",
            request_serializer=api.DenoiseLatentsRequest.SerializeToString,
            response_deserializer=api.DenoiseLatentsResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in stub(slowly(), timeout=60):
                pass
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_without_a_folder_there_are_no_adapters(checkpoint):
    async with running_denoiser(checkpoint) as channel:
        assert not (await described(channel)).adapters
        assert "known: none" in (await refusal(channel, ("plain", 1.0))).message


def test_a_missing_folder_is_refused_at_start(tmp_path):
    with pytest.raises(SettingsError, match="KLEIN_ADAPTERS_FOLDER"):
        DenoiserSettings(adapters_folder=str(tmp_path / "nowhere")).check()

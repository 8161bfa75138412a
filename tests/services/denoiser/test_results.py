"""Results through a real server: bit-identical to one process, whatever else is running."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from klein_api.v1 import image_pb2, stage_service_pb2
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    Tensors,
    alone,
    denoise,
    gated_steps,
    histories,
    image,
    prompt,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)

BASE_STEPS = 6


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("distilled"), distilled=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"), distilled=False)


def same(got, wanted) -> bool:
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


async def test_a_request_goes_through_its_stages_and_gives_the_samplers_bits(distilled):
    wish, tensors = spec(width_px=96, height_px=64, seeds=[5, 6]), Tensors(prompt(1))
    async with running_denoiser(distilled) as channel:
        heard = await denoise(channel, request(wish, tensors))
    assert same(heard.latents, alone(distilled, wish, tensors, steps=4))
    assert heard.steps[-1] == heard.started.step_count == heard.summary.step_count == 4
    assert heard.kinds[:2] == ["queued", "started"]
    assert heard.queued[0].position == 0
    assert heard.kinds[-1] == "summary"
    assert heard.summary.compute_duration.ToTimedelta().total_seconds() > 0


async def test_references_and_guidance_give_the_samplers_bits(base):
    tensors = Tensors(prompt(1), prompt(2), references=(image(3, 5, seed=7), image(4, 4, seed=8)))
    wish = spec(seeds=[9], step_count=BASE_STEPS, guidance_scale=3.5, reference_count=2)
    async with running_denoiser(base) as channel:
        heard = await denoise(channel, request(wish, tensors))
        frames_turned = [request(wish, tensors)[0], *reversed(request(wish, tensors)[1:])]
        turned = await denoise(channel, frames_turned)
    expected = alone(base, wish, tensors, BASE_STEPS, 3.5)
    assert same(heard.latents, expected)
    assert same(turned.latents, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_tensors_of_other_element_types_are_cast_to_the_models(base, dtype):
    tensors = (prompt(1), prompt(2), image(3, 5, seed=7), image(4, 4, seed=8), image(4, 4, seed=9))
    sent = [tensor.to(dtype) for tensor in tensors]
    wish = spec(seeds=[9], step_count=3, guidance_scale=3.5, reference_count=2, resume_step=1)
    answers = []
    async with running_denoiser(base) as channel:
        for each in (sent, [tensor.float() for tensor in sent]):
            wanted = Tensors(each[0], each[1], references=tuple(each[2:4]), resume=(each[4],))
            answers.append(await denoise(channel, request(wish, wanted)))
    assert answers[0].latents[0].dtype == torch.float32
    assert same(answers[0].latents, answers[1].latents)


async def test_values_that_the_models_element_type_cannot_hold_are_refused(distilled):
    large = image(4, 4)
    large[0, 0, 0] = -1e5
    wish, tensors = spec(reference_count=1), Tensors(prompt(1), references=(large,))
    async with running_denoiser(distilled, dtype="f16") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(wish, tensors))
    refused = explain(failure.value)
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = refused.violations
    assert violation.field == "reference_latents[0]"
    assert "outside ±65504, the range of float16" in violation.description


async def test_guidance_of_one_takes_no_negative_prompt_on_a_base_model(base):
    wish, tensors = spec(step_count=2, guidance_scale=1.0), Tensors(prompt(1))
    async with running_denoiser(base) as channel:
        heard = await denoise(channel, request(wish, tensors))
    assert same(heard.latents, alone(base, wish, tensors, steps=2))


async def test_eight_clients_at_once_each_get_the_bits_of_being_alone(distilled):
    wishes = [
        spec(
            width_px=64 + 16 * (i % 3),
            height_px=64 + 16 * (i % 4),
            seeds=[i],
            step_count=3 + i % 3,
            reference_count=i % 2,
            priority=(image_pb2.PRIORITY_BATCH, image_pb2.PRIORITY_INTERACTIVE)[i % 2],
        )
        for i in range(8)
    ]
    tensors = [Tensors(prompt(i), references=(image(4, 4 + i),) * (i % 2)) for i in range(8)]
    async with running_denoiser(distilled) as channel:
        calls = [denoise(channel, request(w, t)) for w, t in zip(wishes, tensors, strict=True)]
        heard = await asyncio.gather(*calls)
    for wish, conditioning, answer in zip(wishes, tensors, heard, strict=True):
        assert same(answer.latents, alone(distilled, wish, conditioning, wish.step_count))


async def test_packed_steps_carry_several_requests_and_differ_by_rounding_only(distilled, monkeypatch):
    wishes = [spec(width_px=64 + 16 * i, seeds=[i, i + 9], step_count=4) for i in range(3)]
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(distilled, packing="packed", token_budget=1000) as channel:
            gate.hold()
            calls = [asyncio.create_task(denoise(channel, request(wish))) for wish in wishes]
            while len(gate.steps) < 1:
                gate.allow()
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)
            gate.release()
            heard = await asyncio.gather(*calls)
    assert max(len(step) for step in gate.steps) == 6
    assert sum(len(step) for step in gate.steps) == 3 * 2 * 4
    for wish, answer in zip(wishes, heard, strict=True):
        for got, wanted in zip(answer.latents, alone(distilled, wish, Tensors(), 4), strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()


async def test_exact_steps_carry_one_image(distilled, monkeypatch):
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(distilled) as channel:
            await denoise(channel, request(spec(seeds=[1, 2, 3])))
    assert [len(step) for step in gate.steps] == [1] * 12


async def test_a_resumed_request_ends_with_the_bits_of_one_that_was_never_interrupted(distilled, monkeypatch):
    wish, tensors = spec(seeds=[3, 4], step_count=5, checkpoint_interval_steps=2), Tensors(prompt(1))
    async with running_denoiser(distilled) as channel:
        whole = await denoise(channel, request(wish, tensors))
        assert {step for step, _, _ in whole.checkpoints} <= {2, 4}
        last = whole.checkpoints[-1][0]
        kept = tuple(latents for step, _, latents in whole.checkpoints if step == last)
        resumed_wish = spec(seeds=[3, 4], step_count=5, resume_step=last)
        resumed = await denoise(channel, request(resumed_wish, Tensors(prompt(1), resume=kept)))
    assert same(resumed.latents, whole.latents)
    assert resumed.steps[0] > last
    assert resumed.summary.step_count == 5 - last
    assert resumed.started.step_count == 5


async def test_previews_are_the_first_images_estimates_in_order(distilled, monkeypatch):
    wish = spec(seeds=[3, 4], step_count=8, preview_interval_steps=1)
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(distilled) as channel:
            gate.hold()
            call = asyncio.create_task(denoise(channel, request(wish)))
            for _ in range(16):
                gate.allow()
                await asyncio.sleep(0.03)
            heard = await call
    (_, expected), *_ = histories(distilled, wish, Tensors(), steps=8)
    steps = [next(i for i, wanted in enumerate(expected) if torch.equal(p, wanted)) for p in heard.previews]
    assert steps == sorted(set(steps))
    assert 1 <= len(steps) <= 7


async def test_the_stage_describes_itself_and_its_load(base, monkeypatch):
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(base, queue_limit=9, warmup_sizes="64x64") as channel:
            stage = StageServiceStub(channel)
            idle = await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())
            assert (idle.stage, idle.model, idle.serving) == ("denoiser", "tiny", True)
            assert (idle.device, idle.dtype) == ("cpu", "f32")
            assert not idle.denoiser.distilled
            assert (idle.denoiser.default_step_count, idle.denoiser.default_guidance_scale) == (50, 4.0)
            assert (idle.denoiser.embedding_channels, idle.denoiser.latent_channels) == (24, 16)
            assert idle.load.estimated_wait.ToTimedelta().total_seconds() == 0
            gate.hold()
            tensors = Tensors(prompt(1), prompt(2))
            calls = [asyncio.create_task(denoise(channel, request(spec(), tensors))) for _ in range(3)]
            while True:
                load = (await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())).load
                if load.running_count == 1 and load.queued_count == 2:
                    break
            assert load.queue_limit == 9
            assert load.estimated_wait.ToTimedelta().total_seconds() > 0
            gate.release()
            await asyncio.gather(*calls)

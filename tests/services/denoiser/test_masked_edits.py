"""Masked edits through a real server: the library's bits, alone and among other requests; bad parts are refused."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from klein_api.v1 import stage_service_pb2
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from tests.services.fakes.denoiser_refusals import refusal, save_both_variants
from tests.services.fakes.denoiser_server import (
    LATENT_CHANNELS,
    Tensors,
    alone,
    denoise,
    gated_steps,
    histories,
    image,
    prompt,
    random_tensor,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_both_variants(tmp_path_factory)


@pytest.fixture(scope="module")
def caching_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("kv"), distilled=True, reference_cache=True)


def soft_mask(rows=4, columns=4):
    """A column that is kept, columns that are mixed, and one that is made anew."""
    return torch.linspace(0, 1, columns).repeat(rows, 1)[..., None].contiguous()


def masked(seed=3, rows=4, columns=4, **fields):
    return Tensors(
        prompt(seed),
        initial_latents=image(rows, columns, seed=seed + 40),
        mask=soft_mask(rows, columns),
        **fields,
    )


def same(got, wanted) -> bool:
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
async def test_a_masked_edit_gives_the_samplers_bits_and_counts_the_steps_that_are_run(folders, strength):
    wish, tensors = spec(width_px=96, seeds=[5, 6], step_count=5, strength=strength), masked(columns=6)
    async with running_denoiser(folders[True]) as channel:
        heard = await denoise(channel, request(wish, tensors))
    run = {0.2: 1, 0.5: 3, 1.0: 5}[strength]
    assert same(heard.latents, alone(folders[True], wish, tensors, steps=5))
    assert torch.equal(heard.latents[0][:, 0], tensors.initial_latents[:, 0])
    assert heard.steps[0] > 5 - run
    assert heard.steps[-1] == heard.started.step_count == 5
    assert heard.summary.step_count == run


async def test_references_and_guidance_may_come_along(folders):
    tensors = masked(references=(image(3, 5, seed=7),), negative_prompt_embedding=prompt(2))
    wish = spec(step_count=4, strength=0.8, guidance_scale=3.5, reference_count=1)
    async with running_denoiser(folders[False]) as channel:
        heard = await denoise(channel, request(wish, tensors))
    assert same(heard.latents, alone(folders[False], wish, tensors, 4, 3.5))


async def test_the_initial_image_is_part_of_the_reference_cache(caching_folder):
    wish = spec(strength=0.6, reference_count=1)
    first, second = (masked(seed, references=(image(3, 5, seed=7),)) for seed in (1, 2))
    async with running_denoiser(caching_folder) as channel:
        heard = [await denoise(channel, request(wish, tensors)) for tensors in (first, second, first)]
    for answer, tensors in zip(heard, (first, second, first), strict=True):
        assert same(answer.latents, alone(caching_folder, wish, tensors, 4))


async def test_masked_edits_share_steps_with_strangers_and_differ_by_rounding_only(folders, monkeypatch):
    wishes = [
        spec(step_count=4),
        spec(step_count=4, strength=1.0, seeds=[1, 2]),
        spec(step_count=4, reference_count=1),
        spec(width_px=96, step_count=6, strength=0.5),
    ]
    tensors = [Tensors(), masked(), Tensors(references=(image(4, 5),)), masked(columns=6)]
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folders[True], packing="packed", token_budget=1000) as channel:
            gate.hold()
            first = asyncio.create_task(denoise(channel, request(spec(step_count=2))))
            await gate.blocked(0)
            calls = [
                asyncio.create_task(denoise(channel, request(*each)))
                for each in zip(wishes, tensors, strict=True)
            ]
            stage = StageServiceStub(channel)
            async with asyncio.timeout(60):
                while True:
                    load = (await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())).load
                    if load.queued_count == len(calls):
                        break
            await asyncio.sleep(0.5)
            gate.release()
            heard = await asyncio.gather(*calls)
            await first
    assert any({4, 6} <= {trajectory.step_count for trajectory in step} for step in gate.steps)
    for wish, conditioning, answer in zip(wishes, tensors, heard, strict=True):
        expected = alone(folders[True], wish, conditioning, wish.step_count)
        for got, wanted in zip(answer.latents, expected, strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()


async def test_a_masked_edit_is_resumed_with_its_own_bits(folders, monkeypatch):
    fields = {"seeds": [3, 4], "step_count": 6, "strength": 0.7}
    tensors = masked()
    # Of 6 steps 2 are left out; the states after steps 3, 4, 5 and 6 are listed.
    states = [images for images, _ in histories(folders[True], spec(**fields), tensors, steps=6)]
    assert len(states[0]) == 5
    done = 3
    resumed = masked(resume=tuple(images[done - 2] for images in states))
    async with running_denoiser(folders[True]) as channel:
        heard = await denoise(channel, request(spec(resume_step=done, **fields), resumed))
    assert same(heard.latents, [images[-1] for images in states])
    assert heard.steps[0] > done
    assert heard.summary.step_count == 6 - done


async def test_previews_keep_what_is_outside_the_mask(folders, monkeypatch):
    wish, tensors = spec(step_count=6, strength=0.7, preview_interval_steps=1), masked()
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folders[True]) as channel:
            gate.hold()
            call = asyncio.create_task(denoise(channel, request(wish, tensors)))
            for _ in range(5):
                gate.allow()
                await asyncio.sleep(0.05)
            heard = await call
    (_, expected), *_ = histories(folders[True], wish, tensors, steps=6)
    assert heard.previews
    assert all(any(torch.equal(each, wanted) for wanted in expected) for each in heard.previews)
    assert all(torch.equal(each[:, 0], tensors.initial_latents[:, 0]) for each in heard.previews)


async def test_a_cancelled_masked_edit_leaves_nothing_in_the_queue(folders, monkeypatch):
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folders[True], queue_limit=1) as channel:
            gate.hold()
            wish = spec(step_count=100, strength=0.9)
            call = DenoiserServiceStub(channel).DenoiseLatents(iter(request(wish, masked())))
            await gate.blocked(0)
            call.cancel()
            gate.release()
            stage = StageServiceStub(channel)
            async with asyncio.timeout(60):
                while True:
                    load = (await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())).load
                    if load.queued_count == load.running_count == 0:
                        break
            assert len((await denoise(channel, request(spec(strength=0.5), masked()))).latents) == 1


def bad(**fields):
    tensors = masked()
    for name, value in fields.items():
        setattr(tensors, name, value)
    return tensors


def with_element(tensor, value):
    changed = tensor.clone()
    changed[1, 2, 0] = value
    return changed


@pytest.mark.parametrize(
    ("fields", "tensors", "field", "words"),
    [
        ({"strength": 0.0}, masked(), "strength", "above 0"),
        ({"strength": 1.5}, masked(), "strength", "up to 1"),
        ({"strength": float("nan")}, masked(), "strength", "up to 1"),
        ({"strength": 1e-30}, masked(), "strength", "none would be left"),
        ({"strength": 0.5, "resume_step": 1}, masked(), "resume_step", "0 or in [2, 3]"),
        ({"strength": 0.5}, bad(initial_latents=None), "initial_latents", "missing"),
        ({"strength": 0.5}, bad(mask=None), "mask", "missing"),
        ({}, bad(mask=None), "initial_latents", "not expected"),
        ({}, bad(initial_latents=None), "mask", "not expected"),
        (
            {"strength": 0.5},
            bad(initial_latents=image(4, 5)),
            "initial_latents",
            f"[4, 4, {LATENT_CHANNELS}]",
        ),
        ({"strength": 0.5}, bad(mask=random_tensor(4, 3, 1)), "mask", "[4, 4, 1]"),
        ({"strength": 0.5}, bad(mask=soft_mask().expand(4, 4, 2)), "mask", "at most 64"),
        (
            {"strength": 0.5},
            bad(initial_latents=with_element(image(4, 4), float("inf"))),
            "initial_latents",
            "infinity",
        ),
        ({"strength": 0.5}, bad(mask=with_element(soft_mask(), float("nan"))), "mask", "NaN"),
        ({"strength": 0.5}, bad(mask=with_element(soft_mask(), 1.01)), "mask", "outside [0, 1]"),
        ({"strength": 0.5}, bad(mask=with_element(soft_mask(), -0.01)), "mask", "outside [0, 1]"),
        (
            {"strength": 0.5, "reference_count": 1},
            bad(references=(image(9, 10),)),
            "reference_latents",
            "106 tokens, those of initial_latents included; at most 100",
        ),
    ],
)
async def test_parts_that_do_not_fit_are_refused_by_name(folders, fields, tensors, field, words):
    details = await refusal(folders[True], request(spec(**fields), tensors))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in details.violations] == [field]
    assert words in details.message

"""Reference caches through a real server: shared by requests, with bit-identical results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import grpc
import pytest
import torch
from torch import Tensor

from klein_api.v1 import image_pb2
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_services.denoiser import application
from klein_services.runtime.status import explain
from tests.services.denoiser.test_reference_caches import counted
from tests.services.fakes.denoiser_server import (
    Tensors,
    alone,
    denoise,
    eventually,
    image,
    prompt,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("kv"), distilled=True, reference_cache=True)


class Builds:
    """Counts the caches that are computed, and can delay or fail them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.before: Callable[[], None] = lambda: None


@pytest.fixture
def builds(monkeypatch) -> Builds:
    builds, cache_of = Builds(), application.cache_of

    def watched(transformer):
        build = cache_of(transformer)

        def cache(references: Sequence[Tensor], adapters):
            builds.tokens.append(sum(r.shape[0] * r.shape[1] for r in references))
            builds.before()
            return build(references, adapters)

        return cache

    monkeypatch.setattr(application, "cache_of", watched)
    return builds


def edit(*seeds: int, count: int = 1, **fields) -> object:
    return spec(seeds=seeds or (1,), reference_count=count, **fields)


def same(got, wanted) -> bool:
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


async def test_a_hit_gives_the_bits_of_a_miss_and_of_one_process(folder, builds):
    tensors = Tensors(references=(image(3, 5, seed=7), image(4, 4, seed=8)))
    turned = Tensors(references=tensors.references[::-1])
    wish, before = edit(5, 6, count=2), counted()
    async with running_denoiser(folder) as channel:
        first, again, other = [await denoise(channel, request(wish, t)) for t in (tensors, tensors, turned)]
        plain = await denoise(channel, request(spec(seeds=[5])))
        prompted = await denoise(channel, request(wish, Tensors(prompt(9), references=tensors.references)))
    assert builds.tokens == [31, 31], "the order decides, the prompt does not"
    assert {name: value - before[name] for name, value in counted().items()} == {
        "hit": 2, "miss": 2, "evicted": 0, "bytes": 2 * 31 * 1280,
    }  # fmt: skip
    expected = alone(folder, wish, tensors, steps=4)
    assert same(first.latents, expected)
    assert same(again.latents, expected)
    assert same(other.latents, alone(folder, wish, turned, steps=4))
    assert not torch.equal(other.latents[0], first.latents[0])
    assert same(plain.latents, alone(folder, spec(seeds=[5]), Tensors(), steps=4))
    assert not torch.equal(prompted.latents[0], first.latents[0])
    assert first.kinds.count("started") == 1
    assert first.steps[-1] == first.summary.step_count == 4


async def test_eight_at_once_share_what_they_can_and_each_gets_its_own_bits(folder, builds):
    references = [(image(4, 4 + i // 3, seed=i // 3),) for i in range(8)]
    wishes = [
        edit(
            i,
            step_count=2 + i % 3,
            width_px=64 + 16 * (i % 2),
            priority=(image_pb2.PRIORITY_BATCH, image_pb2.PRIORITY_INTERACTIVE)[i % 2],
        )
        for i in range(8)
    ]
    before = counted()
    async with running_denoiser(folder) as channel:
        calls = [
            denoise(channel, request(wish, Tensors(prompt(i), references=references[i])))
            for i, wish in enumerate(wishes)
        ]
        heard = await asyncio.gather(*calls)
    assert sorted(builds.tokens) == [16, 20, 24]
    assert (counted()["hit"] - before["hit"], counted()["miss"] - before["miss"]) == (5, 3)
    for i, (wish, answer) in enumerate(zip(wishes, heard, strict=True)):
        tensors = Tensors(prompt(i), references=references[i])
        assert same(answer.latents, alone(folder, wish, tensors, wish.step_count))


async def test_packed_steps_mix_cached_references_with_none(folder, builds):
    tensors = [Tensors(references=(image(4, 4 + i, seed=i),) * (i % 2)) for i in range(4)]
    wishes = [spec(seeds=[i, i + 9], reference_count=i % 2) for i in range(4)]
    async with running_denoiser(folder, packing="packed", token_budget=1000) as channel:
        calls = [denoise(channel, request(w, t)) for w, t in zip(wishes, tensors, strict=True)]
        heard = await asyncio.gather(*calls)
    for wish, given, answer in zip(wishes, tensors, heard, strict=True):
        for got, wanted in zip(answer.latents, alone(folder, wish, given, 4), strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("mebibytes", "built"), [(1, [400, 400, 400, 400]), (0, [400] * 6), (2, [400] * 3)])
async def test_the_limit_changes_what_is_kept_and_not_the_results(folder, builds, mebibytes, built):
    """A cache of 400 tokens takes half a mebibyte: two fit into one, three are asked for in turns."""
    references = [image(20, 20, seed=i) for i in range(3)]
    before = counted()
    async with running_denoiser(folder, reference_cache_mib=mebibytes) as channel:
        for index in (0, 1, 1, 2, 2, 0):
            given = Tensors(references=(references[index],))
            heard = await denoise(channel, request(edit(step_count=2), given))
            assert same(heard.latents, alone(folder, edit(step_count=2), given, steps=2))
    assert builds.tokens == built
    change = {name: value - before[name] for name, value in counted().items()}
    assert change == {
        "hit": 6 - len(built),
        "miss": len(built),
        "evicted": {0: 0, 1: 2, 2: 0}[mebibytes],
        "bytes": {0: 0, 1: 2, 2: 3}[mebibytes] * 400 * 1280,
    }


async def test_caches_above_the_limit_work_one_after_the_other(folder, builds):
    given = [Tensors(references=(image(40, 40, seed=i),)) for i in range(2)]
    async with running_denoiser(
        folder, reference_cache_mib=1, packing="packed", token_budget=10000
    ) as channel:
        calls = [denoise(channel, request(edit(i), tensors)) for i, tensors in enumerate(given)]
        heard = await asyncio.gather(*calls)
    for i, answer in enumerate(heard):
        wanted = alone(folder, edit(i), given[i], 4)[0]
        assert (answer.latents[0] - wanted).norm() <= 1e-5 * wanted.norm()


async def test_a_resumed_request_ends_with_the_bits_of_one_that_was_never_interrupted(folder, builds):
    references = (image(4, 4, seed=3),)
    wish = edit(3, 4, step_count=5, checkpoint_interval_steps=2)
    async with running_denoiser(folder) as channel:
        whole = await denoise(channel, request(wish, Tensors(references=references)))
    last = whole.checkpoints[-1][0]
    kept = tuple(latents for step, _, latents in whole.checkpoints if step == last)
    async with running_denoiser(folder) as channel:
        resumed = await denoise(
            channel,
            request(edit(3, 4, step_count=5, resume_step=last), Tensors(references=references, resume=kept)),
        )
    assert same(resumed.latents, whole.latents)
    assert len(builds.tokens) == 2


async def test_a_deadline_that_passes_while_references_are_computed_ends_only_its_request(folder, builds):
    held = threading.Event()
    builds.before = lambda: held.wait(30) or None
    tensors = Tensors(references=(image(4, 4),))
    async with running_denoiser(folder) as channel:
        late = asyncio.create_task(denoise(channel, request(edit(), tensors), seconds=1))
        await eventually(lambda: builds.tokens == [16])
        cancelled = DenoiserServiceStub(channel).DenoiseLatents(iter(request(edit(), tensors)))
        cancelled.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await late
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held.set()
        heard = await denoise(channel, request(edit(), tensors))
    assert same(heard.latents, alone(folder, edit(), tensors, 4))
    assert builds.tokens == [16], "the abandoned cache is reused by the next request"


async def test_references_that_cannot_be_computed_fail_their_request_alone(folder, builds):
    def fail() -> None:
        raise ValueError("a secret of ours")

    builds.before = fail
    tensors = Tensors(references=(image(4, 4),))
    async with running_denoiser(folder) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(edit(), tensors))
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        builds.before = lambda: None
        heard = await denoise(channel, request(edit(), tensors))
    assert same(heard.latents, alone(folder, edit(), tensors, 4))


async def test_out_of_memory_drops_unused_caches_and_retries(folder, builds):
    kept, wanted = Tensors(references=(image(4, 4),)), Tensors(references=(image(5, 5),))

    def fail_large() -> None:
        if builds.tokens[-1] == 25:
            raise torch.OutOfMemoryError("CUDA out of memory")

    async with running_denoiser(folder) as channel:
        await denoise(channel, request(edit(), kept))
        builds.before = fail_large
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(edit(), wanted))
        assert explain(failure.value).reason == "OUT_OF_MEMORY"
        await denoise(channel, request(edit(), kept))
    assert builds.tokens == [16, 25, 25, 16]


async def test_guidance_is_refused_as_for_distilled_models(folder):
    async with running_denoiser(folder) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(edit(guidance_scale=2.0)))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "guidance_scale" in str(explain(failure.value))

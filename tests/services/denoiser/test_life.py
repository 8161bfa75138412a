"""Requests that are cancelled, late, too many or hit by a fault."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_api.v1 import image_pb2, stage_service_pb2
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.denoiser.events import EventChannel, Finished, Preview, StepDone
from klein_services.denoiser.servicer import SERVICE_NAME
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    Heard,
    Tensors,
    alone,
    denoise,
    eventually,
    gated_steps,
    image,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)
from tests.services.fakes.simulated_device import metric


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), distilled=True)


@pytest.fixture
def gate(monkeypatch):
    with gated_steps(monkeypatch) as gate:
        yield gate


def abandoned_seconds() -> float:
    return metric("klein_abandoned_work_seconds_total", stage="denoiser")


async def load_of(channel):
    stage = StageServiceStub(channel)
    return (await stage.DescribeStage(stage_service_pb2.DescribeStageRequest())).load


async def until(channel, *, queued=None, running=None):
    """Waits for a load."""
    async with asyncio.timeout(60):
        while True:
            load = await load_of(channel)
            if queued in (None, load.queued_count) and running in (None, load.running_count):
                return
            await asyncio.sleep(0.01)


async def test_a_cancelled_request_stops_at_the_next_step_and_its_time_counts_as_abandoned(folder, gate):
    before = abandoned_seconds()
    async with running_denoiser(folder) as channel:
        gate.hold()
        call = DenoiserServiceStub(channel).DenoiseLatents(iter(request(spec(step_count=500))))
        heard = Heard()
        gate.allow(3)
        while 3 not in heard.steps:
            heard.take(await call.read())
        call.cancel()
        await asyncio.sleep(0.1)
        gate.release()
        await until(channel, queued=0, running=0)
        assert len(gate.steps) <= 4
        assert abandoned_seconds() > before
        follower = await denoise(channel, request(spec()))
        assert len(follower.latents) == 1


async def test_a_deadline_ends_a_running_request_at_the_next_step(folder, gate):
    before = abandoned_seconds()
    missed = metric("klein_deadline_missed_total", stage="denoiser")
    async with running_denoiser(folder) as channel:
        gate.hold()
        gate.allow(1)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(spec(step_count=500)), seconds=2)
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The server's deadline is later than the client's by the time that the call took to arrive.
        await asyncio.sleep(0.5)
        gate.release()
        await until(channel, queued=0, running=0)
        assert len(gate.steps) <= 2
        assert abandoned_seconds() > before
        assert metric("klein_deadline_missed_total", stage="denoiser") == missed + 1


async def test_a_full_queue_refuses_at_once_with_a_retry_hint(folder, gate):
    async with running_denoiser(folder, queue_limit=2) as channel:
        gate.hold()
        calls = [asyncio.create_task(denoise(channel, request(spec())))]
        await until(channel, running=1)
        calls += [asyncio.create_task(denoise(channel, request(spec()))) for _ in range(2)]
        await until(channel, queued=2)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(spec()))
        details = explain(failure.value)
        assert (details.code, details.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert details.retry_after_seconds > 0
        gate.release()
        await asyncio.gather(*calls)


async def test_a_deadline_that_cannot_be_met_is_refused_before_the_tensors_come(folder, gate):
    async with running_denoiser(folder, warmup_sizes="64x64") as channel:
        warm_steps = len(gate.steps)

        async def spec_only():
            yield request(spec(step_count=1000, seeds=[1] * 8))[0]
            await asyncio.sleep(60)

        call = DenoiserServiceStub(channel).DenoiseLatents(spec_only(), timeout=4)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call.read()
        details = explain(failure.value)
        assert details.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.reason == "DEADLINE_UNREACHABLE"
        assert len(gate.steps) == warm_steps


async def test_an_urgent_request_pauses_a_long_one_which_then_ends_with_its_own_bits(folder, gate):
    long, urgent = (
        spec(seeds=[7], step_count=30, priority=image_pb2.PRIORITY_BATCH),
        spec(seeds=[8], step_count=3, priority=image_pb2.PRIORITY_INTERACTIVE),
    )
    async with running_denoiser(folder) as channel:
        gate.hold()
        gate.allow(2)
        slow = asyncio.create_task(denoise(channel, request(long)))
        await gate.blocked(2)
        quick = asyncio.create_task(denoise(channel, request(urgent)))
        await until(channel, queued=1)
        # It is admitted; nothing shows when its tensors are there, too.
        await asyncio.sleep(0.5)
        gate.release()
        quick_heard, slow_heard = await asyncio.gather(quick, slow)
    whose = [step[0].step_count for step in gate.steps]
    assert whose == [30] * 3 + [3] * 3 + [30] * 27
    assert torch.equal(quick_heard.latents[0], alone(folder, urgent, Tensors(), 3)[0])
    assert torch.equal(slow_heard.latents[0], alone(folder, long, Tensors(), 30)[0])


async def test_waiting_requests_get_their_positions(folder, gate):
    async with running_denoiser(folder) as channel:
        gate.hold()
        calls, last = [], Heard()
        for waiting in range(4):
            calls.append(asyncio.create_task(denoise(channel, request(spec()), seconds=None, heard=last)))
            await until(channel, queued=waiting, running=1)
            last = last if waiting == 3 else Heard()
        await eventually(lambda: bool(last.queued))
        for _ in range(16):
            gate.allow()
            await asyncio.sleep(0.05)
        await asyncio.gather(*calls)
    positions = [queued.position for queued in last.queued]
    assert positions == sorted(set(positions), reverse=True)
    assert positions[0] == 3
    assert positions[-1] <= 1
    assert last.queued[-1].HasField("estimated_wait")


async def test_a_reader_that_stalls_does_not_stop_the_steps(folder, gate):
    wish = spec(width_px=256, height_px=256, step_count=100, preview_interval_steps=1)
    async with running_denoiser(folder) as channel:
        call = DenoiserServiceStub(channel).DenoiseLatents(iter(request(wish)))
        await call.read()
        await gate.reached(100)
        heard = Heard()
        while heard.summary is None:
            heard.take(await call.read())
    assert heard.steps == sorted(set(heard.steps))
    assert heard.steps[-1] == 100
    assert len(heard.latents) == 1


async def test_unread_events_do_not_pile_up():
    channel = EventChannel(asyncio.get_running_loop())
    previews = [image(16, 16) for _ in range(50)]
    alive = [weakref.ref(preview) for preview in previews]
    for step, preview in enumerate(previews):
        channel.post(StepDone(step))
        channel.post(Preview(step, preview))
    channel.post(Finished((image(16, 16),), 0.0, 0.0, 0.0))
    previews.clear()
    del preview
    assert sum(reference() is not None for reference in alive) == 1
    events = await channel.take()
    assert [type(event) for event in events] == [StepDone, Preview, Finished]
    assert events[0].step == events[1].step == 49


async def test_health_answers_while_a_step_runs(folder, gate):
    """One step computes until health has answered; benchmarks/health.py measures the times of a real load."""
    may_end = threading.Event()

    def compute(trajectories):
        matrix, end = torch.ones(400, 400), time.monotonic() + 30.0
        while not may_end.is_set() and time.monotonic() < end:
            matrix = matrix @ matrix

    gate.before = compute
    async with running_denoiser(folder) as channel:
        call = DenoiserServiceStub(channel).DenoiseLatents(iter(request(spec(step_count=1000))))
        await gate.reached(1)
        health = health_pb2_grpc.HealthStub(channel)
        try:
            async with asyncio.timeout(20):
                for _ in range(60):
                    answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert (await load_of(channel)).running_count == 1
        finally:
            may_end.set()
        call.cancel()


async def test_a_drain_lets_running_work_finish(folder, gate):
    wish = spec(step_count=20)
    async with running_denoiser(folder) as channel:
        gate.hold()
        gate.allow(1)
        running = asyncio.create_task(denoise(channel, request(wish)))
        await gate.reached(1)
        asyncio.get_running_loop().call_later(0.2, gate.release)
    heard = await running
    assert torch.equal(heard.latents[0], alone(folder, wish, Tensors(), 20)[0])


async def test_out_of_memory_fails_only_the_request_that_is_too_large(folder, gate):
    def fail_large(trajectories):
        if sum(trajectory.latents.numel() for trajectory in trajectories) >= 8 * 8 * 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gate.before = fail_large
    async with running_denoiser(folder, packing="packed", token_budget=10000) as channel:
        gate.hold()
        small = [spec(seeds=[i]) for i in range(6)]
        calls = [asyncio.create_task(denoise(channel, request(wish))) for wish in small]
        calls.append(asyncio.create_task(denoise(channel, request(spec(width_px=128, height_px=128)))))
        await asyncio.sleep(0.3)
        gate.release()
        *answers, failure = await asyncio.gather(*calls, return_exceptions=True)
    assert explain(failure).reason == "OUT_OF_MEMORY"
    assert explain(failure).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for wish, heard in zip(small, answers, strict=True):
        wanted = alone(folder, wish, Tensors(), 4)[0]
        assert (heard.latents[0] - wanted).norm() <= 1e-5 * wanted.norm()


async def test_a_bug_in_a_step_is_internal_and_the_next_request_is_served(folder, gate):
    def fail(trajectories):
        raise ValueError("a secret of ours")

    gate.before = fail
    async with running_denoiser(folder) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(spec()))
        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in failure.value.details()
        gate.before = lambda trajectories: None
        assert len((await denoise(channel, request(spec()))).latents) == 1


async def test_a_lost_device_fails_all_requests_and_refuses_new_ones(folder, gate):
    def fail(trajectories):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gate.before = fail
    async with running_denoiser(folder) as channel:
        gate.hold()
        calls = [asyncio.create_task(denoise(channel, request(spec()))) for _ in range(3)]
        await asyncio.sleep(0.3)
        gate.release()
        failures = await asyncio.gather(*calls, return_exceptions=True)
        assert {failure.code() for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, request(spec()))
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(gate.steps) == 1

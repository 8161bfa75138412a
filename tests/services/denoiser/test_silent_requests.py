"""Requests that were announced and send nothing hold a small share of the queue, and only while no other needs it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_services.denoiser.scheduled_request import ScheduledRequest, Urgency
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.denoiser.silent_requests import GRACE_SECONDS
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull
from klein_services.runtime.status import explain
from tests.services.fakes.denoiser_server import (
    denoise,
    eventually,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)
from tests.services.fakes.runtime_toy import failure
from tests.services.fakes.simulated_device import Device, activate

QUEUE_LIMIT = 64
SHARE = 16


def announced(connection: str = "a", **fields) -> ScheduledRequest:
    fields = {"image_tokens": 10, "step_count": 1, "connection": connection} | fields
    return ScheduledRequest(**fields)


def full_of_silence(connection: str = "a", **fields) -> Device:
    device = Device(SchedulerConfig(queue_limit=QUEUE_LIMIT))
    for _ in range(QUEUE_LIMIT):
        device.scheduler.admit(announced(connection, **fields), device.now)
    return device


def test_silent_requests_of_another_connection_make_room_at_once_down_to_their_share():
    device = full_of_silence("silent")
    for _ in range(QUEUE_LIMIT - SHARE):
        newcomer = announced("busy")
        [dropped] = device.scheduler.admit(newcomer, device.now)
        assert dropped.connection == "silent"
        activate(device.scheduler, newcomer, device.now)
    with pytest.raises(QueueFull):
        device.scheduler.admit(announced("busy"), device.now)
    assert device.scheduler.queued_count == QUEUE_LIMIT
    device.run()
    assert len(device.done) == QUEUE_LIMIT - SHARE


def test_those_of_the_same_connection_have_a_moment_to_begin():
    device = full_of_silence()
    with pytest.raises(QueueFull):
        device.scheduler.admit(announced(), device.now + 0.9 * GRACE_SECONDS)
    assert len(device.scheduler.admit(announced(), device.now + GRACE_SECONDS)) == 1


def test_what_has_begun_to_arrive_is_never_dropped():
    device = full_of_silence("silent")
    begun = device.scheduler.requests[: QUEUE_LIMIT - SHARE]
    for each in begun:
        device.scheduler.received(each)
    with pytest.raises(QueueFull):
        device.scheduler.admit(announced("busy"), device.now + 100)
    assert device.scheduler.overdue(device.now + 100) == []


def test_silence_alone_costs_nothing_within_the_share_and_ten_seconds_above_it():
    device = full_of_silence()
    limit = device.scheduler.config.silent_seconds
    assert device.scheduler.overdue(0.9 * limit) == []
    dropped = device.scheduler.overdue(limit)
    assert [each.sequence for each in dropped] == list(range(QUEUE_LIMIT - SHARE)), "the oldest"
    assert device.scheduler.overdue(100 * limit) == []
    assert device.scheduler.queued_count == SHARE


def test_memory_that_silent_requests_announce_is_given_to_others():
    device = Device(SchedulerConfig(queue_limit=4, memory_limit_bytes=100))
    silent = [announced("silent", memory_bytes=30) for _ in range(3)]
    for each in silent:
        device.scheduler.admit(each, device.now)
    dropped = device.scheduler.admit(announced("busy", memory_bytes=60), device.now)
    assert len(dropped) == 2
    assert set(dropped) <= set(silent)
    with pytest.raises(QueueFull):
        device.scheduler.admit(announced("busy", memory_bytes=60), device.now)


def test_a_request_that_is_refused_all_the_same_drops_nothing():
    device = Device(SchedulerConfig(queue_limit=4, memory_limit_bytes=100))
    for _ in range(4):
        device.scheduler.admit(announced("silent", memory_bytes=10), device.now)
    with pytest.raises(QueueFull):
        device.scheduler.admit(announced("busy", memory_bytes=99), device.now)
    assert device.scheduler.queued_count == 4


def test_deadlines_are_not_refused_for_the_sake_of_requests_that_send_nothing():
    device = Device(SchedulerConfig())
    device.submit(announced())
    device.run()
    urgent = {"urgency": Urgency.INTERACTIVE, "step_count": 1000}
    device.scheduler.admit(announced("silent", **urgent), device.now)
    with pytest.raises(DeadlineUnreachable):
        device.scheduler.admit(announced("busy", deadline=device.now + 2), device.now)
    later = device.now + GRACE_SECONDS
    device.scheduler.admit(announced("busy", deadline=later + 2), later)


@settings(deadline=None)
@given(
    limit=st.integers(1, 12),
    arrivals=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("sbr"), st.floats(0, 3)), max_size=40
    ),
)
def test_the_queue_stays_bounded_and_only_silent_requests_are_dropped(limit, arrivals):
    """Each arrival stays silent, begins to send, or is ready at once."""
    device = Device(SchedulerConfig(queue_limit=limit))
    now = 0.0
    for connection, kind, pause in arrivals:
        now += pause
        newcomer = announced(connection)
        before = device.scheduler.requests
        with contextlib.suppress(QueueFull):
            dropped = device.scheduler.admit(newcomer, now)
            assert all(each.is_silent for each in dropped)
            assert len(dropped) <= 1
            assert len(dropped) == 0 or sum(each.is_silent for each in before) > max(1, limit // 4)
            if kind != "s":
                device.scheduler.received(newcomer)
            if kind == "r":
                activate(device.scheduler, newcomer, now)
        assert device.scheduler.queued_count <= limit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), distilled=True)


async def announce(channel, count):
    """Opens calls that send a spec and nothing else."""

    async def spec_only():
        yield request(spec())[0]
        await asyncio.sleep(600)

    calls = [DenoiserServiceStub(channel).DenoiseLatents(spec_only()) for _ in range(count)]
    assert [(await call.read()).WhichOneof("event") for call in calls] == ["queued"] * count
    return calls


async def reason_of(call):
    """Reads a call that is never served to its end."""

    async def read() -> None:
        while True:
            assert (await call.read()).WhichOneof("event") == "queued"

    return explain(await failure(read())).reason


async def test_a_server_full_of_announced_requests_still_works_for_others(folder):
    async with running_denoiser(folder, queue_limit=8) as channel:
        silent = await announce(channel, 8)
        await asyncio.sleep(1.1 * GRACE_SECONDS)
        for _ in range(3):
            assert len((await denoise(channel, request(spec()))).latents) == 1
        ends = [asyncio.create_task(reason_of(call)) for call in silent]
        assert await next(asyncio.as_completed(ends)) == "QUEUE_FULL"
        for call in silent:
            call.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def test_announced_requests_above_a_quarter_time_out_in_seconds(folder):
    async with running_denoiser(folder, queue_limit=8, silent_seconds=0.2) as channel:
        silent = await announce(channel, 8)
        ends = [asyncio.create_task(reason_of(call)) for call in silent]
        await eventually(lambda: sum(task.done() for task in ends) == 6)
        await asyncio.sleep(1)
        ended = [task.result() for task in ends if task.done()]
        assert ended == ["RECEIVE_TIMEOUT"] * 6, "a quarter may stay"
        for call in silent:
            call.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def test_a_request_that_begins_late_is_served_while_nothing_else_needs_its_place(folder):
    async with running_denoiser(folder, queue_limit=8, silent_seconds=0.1) as channel:
        [announced_part, *tensors] = request(spec())

        async def late():
            yield announced_part
            await asyncio.sleep(1.2)
            for part in tensors:
                yield part

        call = DenoiserServiceStub(channel).DenoiseLatents(late())
        events = [response.WhichOneof("event") async for response in call]
        assert (events[0], events[-1]) == ("queued", "summary")

"""Works of one shape that are computed together: who joins, for how long one waits, and whose fault stays whose."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from klein_core.errors import DeviceFault
from klein_services.runtime.batching import BATCH_PIXEL_COUNT, BatchingSettings, BatchLimits, batch_limits
from klein_services.runtime.caller import Caller
from klein_services.runtime.errors import DeadlinePassed, DeviceOutOfMemory, StageUnavailable
from klein_services.runtime.urgency import Urgency
from klein_services.runtime.work_queue import Batch, Work, WorkQueue
from klein_services.runtime.worker import Worker

NO_WAIT, LONG_WAIT = Batch("square", 4, 0.0), Batch("square", 4, 60.0)


class Device:
    """Adds one to numbers, notes which came together, and can be stopped; a negative number fails its batch."""

    def __init__(self):
        self.batches = []
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.gates = {}
        """Events that batches wait for, by their first number, instead of `may_end`."""
        self.error = ValueError("negative")

    def compute(self, numbers):
        self.batches.append(list(numbers))
        self.begun.set()
        if not self.gates.get(numbers[0], self.may_end).wait(20):
            raise TimeoutError
        if min(numbers) < 0:
            raise self.error
        return [number + 1 for number in numbers]


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def worker():
    made = Worker("test-batches", queue_limit=32)
    yield made
    made.close()


@asynccontextmanager
async def stopped(worker, device):
    """Has the device compute 0 until the block ends."""
    device.may_end.clear()
    running = asyncio.create_task(worker.run_together(device.compute, 0, None, operation="add"))
    await asyncio.to_thread(device.begun.wait, 20)
    try:
        yield
        await asyncio.sleep(0)
    finally:
        device.may_end.set()
    assert (await running).value == 1


def start(worker, device, number, batch=NO_WAIT, **options):
    return asyncio.create_task(worker.run_together(device.compute, number, batch, operation="add", **options))


def works(stage="test-batches"):
    """Returns batches and the works in them, as counted."""
    labels = {"stage": stage, "operation": "add"}
    return tuple(
        REGISTRY.get_sample_value(f"klein_batch_works_{kind}", labels) or 0 for kind in ("count", "sum")
    )


async def test_what_waits_is_computed_together_up_to_the_limit(worker, device):
    before = works()
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in range(1, 7)]
    assert [task.value for task in await asyncio.gather(*tasks)] == [2, 3, 4, 5, 6, 7]
    assert device.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batches, total = (now - then for now, then in zip(works(), before, strict=True))
    assert (batches, total) == (2, 6), "works that cannot be batched are not counted"


async def test_the_time_of_a_batch_is_shared_by_its_works(worker, device):
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in range(1, 5)]
        device.begun.clear()
    begun = time.monotonic()
    shares = [task.compute_seconds for task in await asyncio.gather(*tasks)]
    assert len(set(shares)) == 1
    assert sum(shares) <= time.monotonic() - begun


async def test_only_what_would_be_next_joins(worker, device):
    async with stopped(worker, device):
        tasks = [
            start(worker, device, 1, urgency=Urgency.BATCH),
            start(worker, device, 2),
            start(worker, device, 3, Batch("wide", 4, 0.0)),
            start(worker, device, 4),
            start(worker, device, 5),
            start(worker, device, 6, urgency=Urgency.INTERACTIVE),
        ]
    await asyncio.gather(*tasks)
    assert device.batches == [[0], [6], [2], [3], [4, 5], [1]]


async def test_a_work_waits_for_others_until_the_batch_is_full(worker, device):
    tasks = [start(worker, device, number, LONG_WAIT) for number in range(1, 4)]
    await asyncio.sleep(0.05)
    assert device.batches == []
    tasks.append(start(worker, device, 4, LONG_WAIT))
    await asyncio.gather(*tasks)
    assert device.batches == [[1, 2, 3, 4]]


async def test_the_wait_ends(worker, device):
    begun = time.monotonic()
    assert (await start(worker, device, 1, Batch("square", 4, 0.05))).value == 2
    assert time.monotonic() - begun >= 0.05


async def test_the_wait_ends_when_work_comes_that_cannot_join(worker, device):
    waiting = start(worker, device, 1, LONG_WAIT)
    await asyncio.sleep(0.05)
    last = start(worker, device, 2, None)
    await asyncio.wait_for(asyncio.gather(waiting, last), 20)
    assert device.batches == [[1], [2]]


async def test_urgent_work_does_not_wait_for_a_batch(worker, device):
    waiting = start(worker, device, 1, LONG_WAIT)
    await asyncio.sleep(0.05)
    await asyncio.wait_for(start(worker, device, 2, None, urgency=Urgency.INTERACTIVE), 20)
    assert device.batches == [[2]]
    waiting.cancel()


async def test_the_wait_leaves_a_deadline_its_time(worker, device):
    for _ in range(3):
        await start(worker, device, 0)
    task = start(worker, device, 1, LONG_WAIT, deadline=time.monotonic() + 1)
    assert (await asyncio.wait_for(task, 20)).value == 2


async def test_a_work_that_fails_does_not_fail_the_others(worker, device):
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in (1, -2, 3)]
    first, failed, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first.value, last.value, type(failed)) == (2, 4, ValueError)
    assert device.batches == [[0], [1, -2, 3], [1], [-2], [3]]
    assert (worker.queued_count, worker.running_count) == (0, 0)


async def test_a_batch_without_memory_is_computed_one_by_one(worker, device):
    device.error = MemoryError()
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in (1, -2)]
    first, failed = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first.value, type(failed)) == (2, DeviceOutOfMemory)


async def test_urgent_work_comes_before_what_a_failed_batch_left(worker, device):
    gate = device.gates[1] = threading.Event()
    tasks = [start(worker, device, number, Batch("square", 2, 60.0)) for number in (1, -2)]
    await asyncio.to_thread(device.begun.wait, 20)
    tasks.append(start(worker, device, 7, urgency=Urgency.INTERACTIVE))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert device.batches == [[1, -2], [7], [1], [-2]]


async def test_a_lost_device_fails_the_whole_batch(worker, device):
    device.error = DeviceFault("gone")
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in (1, -2)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [DeviceFault, DeviceFault]
    assert device.batches == [[0], [1, -2]]


async def test_a_cancelled_work_leaves_its_batch_before_it_runs_and_is_dropped_after(worker, device):
    async with stopped(worker, device):
        tasks = [start(worker, device, number) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
    assert [task.value for task in await asyncio.gather(tasks[0], tasks[2])] == [2, 4]
    device.begun.clear()
    device.may_end.clear()
    tasks = [start(worker, device, number, Batch("square", 2, 60.0)) for number in (1, -2)]
    await asyncio.to_thread(device.begun.wait, 20)
    tasks[1].cancel()
    await asyncio.gather(tasks[1], return_exceptions=True)
    device.may_end.set()
    assert (await tasks[0]).value == 2, "the other one is computed again, because the batch failed"
    assert device.batches == [[0], [1, 3], [1, -2], [1]]
    assert (worker.queued_count, worker.running_count) == (0, 0)


async def test_what_is_late_is_not_computed_with_the_others(worker, device):
    async with stopped(worker, device):
        late = start(worker, device, 1, deadline=time.monotonic() + 0.02)
        other = start(worker, device, 2)
        await asyncio.sleep(0.05)
    assert (await other).value == 3
    with pytest.raises(DeadlinePassed):
        await late
    assert device.batches == [[0], [2]]


async def test_closing_ends_the_wait(worker, device):
    waiting = start(worker, device, 1, LONG_WAIT)
    await asyncio.sleep(0.05)
    worker.close()
    with pytest.raises(StageUnavailable):
        await waiting


async def test_a_function_that_loses_a_result_fails_each_alone(worker):
    tasks = [
        asyncio.create_task(worker.run_together(lambda items: [], n, Batch("x", 2, 60.0), operation="add"))
        for n in (1, 2)
    ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["0 results of 1 works"] * 2


shapes = st.sampled_from([None, Batch("square", 3, 0.0), Batch("wide", 3, 0.0)])
callers = st.sampled_from([Caller(name="a"), Caller(name="b", weight=3.0)])


@given(st.lists(st.tuples(shapes, callers, st.sampled_from(Urgency)), max_size=24))
def test_batches_are_parts_of_the_order_without_batches(arrivals):
    def filled():
        queue = WorkQueue(100)
        for batch, caller, urgency in arrivals:
            queue.add(Work(operation="add", batch=batch, caller=caller, urgency=urgency, queued_at=0.0), 0.0)
        return queue

    one_by_one, together = filled(), filled()
    order, batches = [], []
    while (work := one_by_one.take(0.0)) is not None:
        order.append(work.sequence)
    while taken := together.take_batch(0.0):
        batches.append(taken)
        assert len(taken) <= (taken[0].batch.count if taken[0].batch else 1)
        assert len({(work.batch, work.urgency) for work in taken}) == 1
    assert [work.sequence for taken in batches for work in taken] == order
    for work in [work for taken in batches for work in taken]:
        together.done(work, 0.5, is_measured=True)
    assert not together.running


def test_a_put_back_work_is_the_oldest_again():
    queue = WorkQueue(100)
    works = [
        Work(operation="add", batch=NO_WAIT, caller=Caller(name="a"), queued_at=float(n)) for n in range(3)
    ]
    for work in works:
        queue.add(work, 0.0)
    for work in queue.take_batch(0.0)[:2]:
        queue.done(work, 1.0, is_measured=False)
        queue.put_back(work)
    assert list(queue) == works[:2]
    assert queue.take_batch(0.0) == [works[0]]


def settings(**values):
    return BatchingSettings(model_name="tiny", **values)


def test_a_cpu_and_off_measure_nothing():
    def compute(count, pixel_count):
        raise AssertionError

    assert batch_limits(settings(), "cpu", compute).batch("any") is None
    assert batch_limits(settings(batch="off"), "cuda", compute).batch("any") is None
    forced = batch_limits(settings(batch="on", batch_size=5, batch_wait_ms=3), "cpu", compute)
    assert forced.batch("any") == Batch("any", 5, 0.003)


def test_batches_grow_while_a_measurement_shows_that_they_pay():
    def compute(count, pixel_count):
        # Small works take the same time in any number up to 4, others more than each alone.
        time.sleep(0.005 if pixel_count == 64 * 64 and count <= 4 else 0.005 * count**2)

    limits = batch_limits(settings(batch_size=32), "cuda", compute, (64 * 64, 512 * 512))
    assert limits.measured == ((64 * 64, 4), (512 * 512, 1))
    assert limits.batch("a", 32 * 32).count == 4
    assert limits.batch("a", 64 * 64 + 1) is None
    assert limits.batch("a", 1024 * 1024) is None, "not measured"


def test_a_measurement_ends_where_memory_does():
    def compute(count, pixel_count):
        if count > 2:
            raise MemoryError
        time.sleep(0.005)

    assert batch_limits(settings(), "cuda", compute).batch("any").count == 2


def test_an_error_of_a_measurement_is_no_measurement():
    def compute(count, pixel_count):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        batch_limits(settings(), "cuda", compute)


def test_a_batch_takes_no_more_memory_than_one_large_image():
    limits = BatchLimits(8)
    assert limits.batch("a", BATCH_PIXEL_COUNT // 4).count == 4
    assert limits.batch("a", BATCH_PIXEL_COUNT // 2 + 1) is None

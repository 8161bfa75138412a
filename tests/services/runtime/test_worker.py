"""The worker: order, bounds, and that nothing is computed for clients that have disconnected."""

import asyncio
import threading
import time
from contextvars import ContextVar

import pytest
from prometheus_client import REGISTRY

from klein_core.errors import DeviceFault
from klein_services.runtime.errors import DeadlinePassed, DeviceOutOfMemory, QueueFull, StageUnavailable
from klein_services.runtime.worker import Worker

marker = ContextVar("marker", default="unset")


def sample(name, **labels):
    return REGISTRY.get_sample_value(name, {"stage": "test", **labels}) or 0.0


@pytest.fixture
def worker():
    made = Worker("test", queue_limit=2)
    yield made
    made.close()


class Gate:
    """A function that begins, waits to be let through, and returns."""

    def __init__(self):
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self):
        self.begun.set()
        if not self.may_end.wait(10):
            raise TimeoutError
        return "done"


@pytest.fixture
async def busy(worker):
    gate = Gate()
    running = asyncio.create_task(worker.run(gate, operation="toy"))
    await asyncio.to_thread(gate.begun.wait, 10)
    yield gate, running
    gate.may_end.set()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_result_comes_with_its_times(worker):
    begun = time.monotonic()
    completed = await worker.run(lambda: time.sleep(0.02) or threading.current_thread().name)
    assert completed.value == "test-worker"
    assert completed.compute_seconds >= 0.02
    assert completed.queue_seconds >= 0
    assert completed.queue_seconds + completed.compute_seconds <= time.monotonic() - begun


async def test_functions_run_one_at_a_time_in_order(worker, busy):
    order = []
    waiting = [
        asyncio.create_task(worker.run(lambda number=number: order.append(number))) for number in (1, 2)
    ]
    await asyncio.sleep(0)
    assert (worker.queued_count, worker.running_count) == (2, 1)
    busy[0].may_end.set()
    await asyncio.gather(*waiting)
    assert order == [1, 2]
    assert (worker.queued_count, worker.running_count) == (0, 0)


async def test_a_full_queue_refuses_at_once(worker, busy):
    waiting = [asyncio.create_task(worker.run(lambda: None)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as raised:
        await asyncio.wait_for(worker.run(lambda: None), 0.5)
    assert raised.value.limit == 2
    busy[0].may_end.set()
    await asyncio.gather(*waiting)


async def test_a_cancelled_waiter_leaves_the_queue_and_is_never_computed(worker, busy):
    computed = []
    waiting = [asyncio.create_task(worker.run(lambda: computed.append(1))) for _ in range(2)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert worker.queued_count == 0
    busy[0].may_end.set()
    await worker.run(lambda: None)
    assert computed == []


async def test_work_whose_caller_goes_is_counted_as_abandoned(worker, busy):
    gate, running = busy
    before = sample("klein_abandoned_work_seconds_total")
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    gate.may_end.set()
    await worker.run(lambda: None)
    assert sample("klein_abandoned_work_seconds_total") - before >= 0.05


async def test_work_that_is_delivered_is_not_abandoned(worker):
    before = sample("klein_abandoned_work_seconds_total")
    await worker.run(lambda: time.sleep(0.01))
    assert sample("klein_abandoned_work_seconds_total") == before


async def test_what_expires_in_the_queue_is_not_computed(worker, busy):
    before = sample("klein_deadline_missed_total")
    computed = []
    deadline = time.monotonic() + 0.02
    late = asyncio.create_task(worker.run(lambda: computed.append(1), deadline=deadline))
    await asyncio.sleep(0.05)
    busy[0].may_end.set()
    with pytest.raises(DeadlinePassed):
        await late
    assert computed == []
    assert sample("klein_deadline_missed_total") == before + 1


async def test_what_expires_and_is_cancelled_at_the_same_time_is_counted_once(worker, busy):
    before = sample("klein_deadline_missed_total")
    late = asyncio.create_task(worker.run(lambda: None, deadline=time.monotonic() + 0.02))
    await asyncio.sleep(0.05)
    busy[0].may_end.set()
    time.sleep(0.2)  # noqa: ASYNC251 # the worker finds it expired before the event loop can act
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    assert sample("klein_deadline_missed_total") == before + 1


async def test_a_function_that_wants_to_end_the_process_does_not_end_the_thread(worker):
    def leave():
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="SystemExit"):
        await worker.run(leave)
    assert (await worker.run(lambda: "alive")).value == "alive"


async def test_context_variables_reach_the_function(worker):
    marker.set("request 7")
    assert (await worker.run(marker.get)).value == "request 7"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("a fault"), ValueError),
        (StopIteration(), RuntimeError),
        (MemoryError(), DeviceOutOfMemory),
        (RuntimeError("CUDA out of memory. Tried to allocate"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFault),
        (RuntimeError("CUDNN_STATUS is fine"), RuntimeError),
    ],
)
async def test_errors_reach_the_caller_and_device_faults_are_recognized(worker, raised, expected):
    def fail():
        raise raised

    with pytest.raises(expected) as caught:
        await worker.run(fail)
    assert type(caught.value) is expected
    assert (await worker.run(lambda: "still works")).value == "still works"


async def test_torch_classes_are_recognized_by_name(worker):
    import torch

    def fail():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(DeviceOutOfMemory):
        await worker.run(fail)


async def test_closing_refuses_what_waits_and_what_comes(worker, busy):
    waiting = asyncio.create_task(worker.run(lambda: None))
    await asyncio.sleep(0)
    threading.Timer(0.05, busy[0].may_end.set).start()
    worker.close()
    with pytest.raises(StageUnavailable):
        await waiting
    with pytest.raises(StageUnavailable):
        await worker.run(lambda: None)
    assert (await busy[1]).value == "done"


async def test_the_wait_is_estimated_from_measured_operations(worker, busy):
    gate, running = busy
    assert worker.estimated_wait_seconds is None
    await asyncio.sleep(0.02)
    gate.may_end.set()
    await running
    assert worker.estimated_wait_seconds == 0
    second = Gate()
    task = asyncio.create_task(worker.run(second))
    await asyncio.to_thread(second.begun.wait, 10)
    assert worker.estimated_wait_seconds >= 0.02
    second.may_end.set()
    await task


async def test_the_backlog_is_never_zero_while_work_waits(worker, busy):
    gate, running = busy
    second, third = (asyncio.create_task(worker.run(lambda: None, operation="toy")) for _ in range(2))
    await asyncio.sleep(0)
    assert sample("klein_backlog_seconds") == 3, "before a measurement each counts as a second"
    gate.may_end.set()
    await asyncio.gather(running, second, third)
    assert sample("klein_backlog_seconds") == 0
    last = Gate()
    task = asyncio.create_task(worker.run(last, operation="toy"))
    await asyncio.to_thread(last.begun.wait, 10)
    assert 0 < sample("klein_backlog_seconds") == worker.estimated_wait_seconds
    last.may_end.set()
    await task

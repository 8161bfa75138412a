"""Faults of real replicas under load: nothing is lost while one replica of each stage lives or comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient
from tests.e2e.fleet import Fleet, Replica, running_fleet
from tests.e2e.running_suite import picture
from tests.services.fakes.runtime_toy import until

CLIENTS = 3
CASES = 6
REQUEST_SECONDS = 120
LONGEST_WAIT_SECONDS = 60.0
"""Less than a stopped replica stays stopped, far more than a request takes next to other work."""
STEPS = 8


def spec(case: int) -> api.ImageSpec:
    """Returns one of a few requests of all kinds, long enough to be hit by a fault."""
    references = [picture(96, 80, 7 + case)] if case % 3 == 1 else []
    return api.ImageSpec(
        prompt=f"a red circle on a blue background {case}",
        references=references,
        width_px=64 + 16 * (case % 2),
        height_px=64,
        seed=case,
        image_count=1 + case % 2,
        step_count=STEPS,
        format=image_pb2.IMAGE_FORMAT_RAW_RGB,
    )


@dataclass
class Load:
    """Streams of clients that begin a request when the last one ends."""

    target: str
    expected: dict[int, list[bytes]]
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    answered: int = 0
    longest_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for client in range(CLIENTS):
                group.create_task(self._client(client))

    async def _client(self, number: int) -> None:
        async with AsyncClient(self.target) as client:
            stub, count = client.stub(), number
            while not self.stopped.is_set():
                count += 1
                begin = time.monotonic()
                try:
                    images = await streamed(stub, spec(count % CASES))
                except grpc.aio.AioRpcError as error:
                    self.failures.append(f"{error.code().name}: {error.details()}")
                    continue
                self.answered += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - begin)
                if images != self.expected[count % CASES]:
                    self.failures.append(f"case {count % CASES} has other bytes than undisturbed")

    async def answer_more(self, count: int = 2 * CLIENTS) -> None:
        """Waits until so many more requests were answered."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal, REQUEST_SECONDS)


async def streamed(stub, image_spec: api.ImageSpec) -> list[bytes]:
    """Returns a request's images, and checks that each step and image came once and in order."""
    steps, images = [], {}
    call = stub.StreamGenerateImage(
        api.StreamGenerateImageRequest(spec=image_spec, preview_interval_steps=4), timeout=REQUEST_SECONDS
    )
    async for event in call:
        if event.HasField("step"):
            steps.append(event.step.step)
        elif event.HasField("image"):
            assert event.image.index not in images, "an image came twice"
            images[event.image.index] = event.image.data
    assert steps == sorted(set(steps)), f"steps came as {steps}"
    assert steps[-1] == STEPS
    return [images[index] for index in range(image_spec.image_count)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    counts = {"text-encoder": 2, "denoiser": 2, "vae-decoder": 2}
    # Nothing comes from a cache, so that every request needs every stage.
    with running_fleet(
        tmp_path_factory.mktemp("fleet"), counts, settings={"KLEIN_CACHE_BYTES": "0"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> dict[int, list[bytes]]:
    """Images of all cases, undisturbed."""

    async def all_cases() -> dict[int, list[bytes]]:
        async with AsyncClient(fleet.target) as client:
            return {case: await streamed(client.stub(), spec(case)) for case in range(CASES)}

    return asyncio.run(all_cases())


def under_load(
    fleet: Fleet, expected: dict[int, list[bytes]], faults: Callable[[Load], Awaitable[None]]
) -> Load:
    """Causes faults while clients ask; every request must be answered, with the bytes of the undisturbed one."""

    async def run() -> Load:
        load = Load(fleet.target, expected)
        running = asyncio.create_task(load.run())
        await load.answer_more()
        try:
            await faults(load)
            await load.answer_more()
        finally:
            load.stopped.set()
            await running
        return load

    load = asyncio.run(run())
    assert load.failures == []
    assert "Traceback" not in fleet.logs()
    return load


def test_replicas_that_hang_delay_nobody_for_long(fleet, expected) -> None:
    """One of two replicas of every stage is stopped, its connections stay open."""
    hung = [pool[0] for pool in fleet.replicas.values()]

    async def faults(load: Load) -> None:
        for replica in hung:
            replica.stop()
        # Every client has been answered, so none waits for a stopped replica any more.
        await load.answer_more(4 * CLIENTS)

    try:
        load = under_load(fleet, expected, faults)
    finally:
        for replica in hung:
            replica.go_on()
    assert load.longest_seconds < LONGEST_WAIT_SECONDS


async def restart(replicas: list[Replica]) -> None:
    """Kills replicas at the same moment, and waits until they serve again."""
    for replica in replicas:
        await asyncio.to_thread(replica.kill)
    for replica in replicas:
        replica.start()
    for replica in replicas:
        await asyncio.to_thread(replica.wait_until_serving)


def test_killed_replicas_cost_no_request(fleet, expected) -> None:
    async def faults(load: Load) -> None:
        await restart([pool[0] for pool in fleet.replicas.values()])

    under_load(fleet, expected, faults)


def test_all_denoisers_gone_for_a_moment_cost_no_request(fleet, expected) -> None:
    async def faults(load: Load) -> None:
        await restart(fleet.replicas["denoiser"])

    under_load(fleet, expected, faults)


def test_drained_replicas_end_well_and_cost_no_request(fleet, expected) -> None:
    async def faults(load: Load) -> None:
        drained = [pool[1] for pool in fleet.replicas.values()]
        for replica in drained:
            assert await asyncio.to_thread(replica.drain)
        await load.answer_more()
        for replica in drained:
            replica.start()

    under_load(fleet, expected, faults)

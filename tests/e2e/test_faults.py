"""Faults of real replicas and their network under load: nothing is lost while one replica of each stage can be used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from tests.e2e.fleet import Fleet, Replica, running_fleet
from tests.e2e.links import CLEAR, Condition, Link
from tests.e2e.load import CLIENTS, Answer, Load, save_adapter, undisturbed
from tests.services.fakes.runtime_toy import until

LONGEST_WAIT_SECONDS = 60.0
"""Less than a stopped replica stays stopped, far more than a request takes next to other work."""
SLOW = Condition(delay_seconds=0.05, bytes_per_second=8_000)
"""Slow for tensors of many kilobytes, fast enough for pings now and then."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    settings = {
        # Nothing comes from a cache, so that every request needs every stage.
        "KLEIN_CACHE_BYTES": "0",
        # A busy machine takes its time to start a replica.
        "KLEIN_STAGE_WAIT_SECONDS": "120",
        "KLEIN_ADAPTERS_FOLDER": str(save_adapter(folder / "adapters")),
    }
    counts = {"text-encoder": 2, "denoiser": 2, "vae-decoder": 2}
    with running_fleet(folder, counts, settings=settings, has_links=True) as running:
        yield running


@pytest.fixture(scope="module")
def expected(fleet: Fleet) -> list[Answer]:
    return asyncio.run(undisturbed(fleet.target))


def first_of_each(fleet: Fleet) -> list[Replica]:
    return [pool[0] for pool in fleet.replicas.values()]


def links_of(replicas: list[Replica]) -> list[Link]:
    return [replica.link for replica in replicas if replica.link is not None]


def under_load(
    fleet: Fleet,
    expected: list[Answer],
    faults: Callable[[Load], Awaitable[None]],
    *,
    may_refuse: bool = False,
) -> Load:
    """Causes faults while clients ask; every request must be answered, with the bytes of the undisturbed one."""

    async def run() -> Load:
        load = Load(fleet.target, expected)
        running = asyncio.create_task(load.run())
        await load.answer_more(CLIENTS)
        try:
            await faults(load)
            await load.answer_more(CLIENTS)
        finally:
            load.stopped.set()
            await running
        return load

    load = asyncio.run(run())
    assert load.failures == []
    assert may_refuse or not load.refused
    assert "Traceback" not in fleet.logs()
    return load


def test_replicas_that_hang_delay_nobody_for_long(fleet, expected) -> None:
    """One of two replicas of every stage is stopped, its connections stay open."""
    hung = first_of_each(fleet)

    async def faults(load: Load) -> None:
        for replica in hung:
            replica.stop()
        # Every client has been answered, so none waits for a stopped replica any more.
        await load.answer_more(3 * CLIENTS)

    try:
        load = under_load(fleet, expected, faults)
    finally:
        for replica in hung:
            replica.go_on()
    assert load.longest_seconds < LONGEST_WAIT_SECONDS


async def restart(replicas: list[Replica], **settings: str) -> None:
    """Kills replicas at the same moment, and waits until they serve again."""
    for replica in replicas:
        await asyncio.to_thread(replica.kill)
    for replica in replicas:
        replica.start(**settings)
    for replica in replicas:
        await asyncio.to_thread(replica.wait_until_serving)


def test_all_denoisers_gone_for_a_moment_cost_no_request(fleet, expected) -> None:
    async def faults(load: Load) -> None:
        await restart(fleet.replicas["denoiser"])

    under_load(fleet, expected, faults)


def test_connections_that_end_in_the_middle_of_a_tensor_cost_no_request(fleet, expected) -> None:
    links = links_of(first_of_each(fleet))

    async def faults(load: Load) -> None:
        for link in links:
            link.condition = Condition(cuts=True)
            await until(lambda link=link: link.cut, LONGEST_WAIT_SECONDS)
            link.condition = CLEAR
        for link in links:
            fleet.network.refuse(link)
        await load.answer_more()
        for link in links:
            fleet.network.accept(link)

    under_load(fleet, expected, faults)


@pytest.mark.parametrize("condition", [SLOW, Condition(stalls=True)], ids=["slow", "stalled"])
def test_slow_and_stalled_connections_cost_no_request(fleet, expected, condition) -> None:
    links = links_of(first_of_each(fleet))

    async def faults(load: Load) -> None:
        for link in links:
            link.condition = condition
        await load.answer_more()
        for link in links:
            link.condition = CLEAR

    under_load(fleet, expected, faults)


def test_flipped_bits_change_no_image(fleet, expected) -> None:
    links = links_of(first_of_each(fleet))

    async def faults(load: Load) -> None:
        for link in links:
            link.condition = Condition(flip_share=0.5, flip_bytes=2048)
            await until(lambda link=link: link.flipped >= 5, LONGEST_WAIT_SECONDS)
            link.condition = CLEAR

    under_load(fleet, expected, faults)


def test_killed_and_full_replicas_cost_no_request_that_was_begun(fleet, expected) -> None:
    """One of two replicas of every stage is killed, and has room for one request only when it comes back."""

    async def faults(load: Load) -> None:
        await restart(first_of_each(fleet), KLEIN_QUEUE_LIMIT="1")
        await load.answer_more(3 * CLIENTS)

    under_load(fleet, expected, faults, may_refuse=True)


def test_drained_replicas_end_well_and_cost_no_request(fleet, expected) -> None:
    async def faults(load: Load) -> None:
        drained = first_of_each(fleet)
        for replica in drained:
            assert await asyncio.to_thread(replica.drain)
        await load.answer_more()
        for replica in drained:
            replica.start()

    # Until they drain, replicas of the test before may have room for one request only.
    under_load(fleet, expected, faults, may_refuse=True)

"""ReferenceCaches: the byte limit, its exceptions, and the metrics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klein_services.denoiser.reference_kv_cache import HIT, MISS, REFERENCE_CACHE, ReferenceCaches
from klein_services.denoiser.request_planner import references_key
from klein_services.denoiser.scheduled_request import Batch
from klein_services.denoiser.scheduler import SchedulerConfig
from klein_services.runtime.urgency import Urgency
from tests.services.fakes.caching_device import LIMIT, Block, Device, cache
from tests.services.fakes.simulated_device import metric


def counted() -> dict[str, float]:
    """Reads the metrics of the caches."""
    return {
        HIT: metric("klein_cache_requests_total", kind=REFERENCE_CACHE, outcome=HIT),
        MISS: metric("klein_cache_requests_total", kind=REFERENCE_CACHE, outcome=MISS),
        "evicted": metric("klein_cache_evictions_total", kind=REFERENCE_CACHE),
        "bytes": metric("klein_cache_bytes", kind=REFERENCE_CACHE),
    }


def make(caches: ReferenceCaches, key: str, size_bytes: int, *, released: bool = True) -> None:
    caches.make_room(size_bytes)
    caches.add(key, Block(size_bytes))
    if released:
        caches.release(key)


def test_the_least_recently_used_makes_room():
    caches, before = ReferenceCaches(LIMIT), counted()
    for key in "abc":
        make(caches, key, 30)
    caches.acquire("a")
    caches.release("a")
    make(caches, "d", 40)
    assert [key for key in "abcd" if key in caches] == ["a", "c", "d"]
    change = {name: value - before[name] for name, value in counted().items()}
    assert change == {HIT: 1, MISS: 4, "evicted": 1, "bytes": 100}
    assert caches.size_bytes == 100


def test_what_is_in_use_stays_whatever_comes():
    caches = ReferenceCaches(LIMIT)
    make(caches, "a", 60, released=False)
    assert caches.has_room(40)
    assert not caches.has_room(41)
    assert not caches.has_room(30, other_bytes=20)
    caches.make_room(90)
    assert "a" in caches
    assert not caches.drop_unused()
    caches.acquire("a")
    caches.release("a")
    assert not caches.has_room(41), "the first user is still there"
    caches.release("a")
    assert caches.has_room(41)
    assert caches.drop_unused()
    assert "a" not in caches


def test_one_larger_than_the_bound_is_used_alone_and_not_kept():
    caches = ReferenceCaches(LIMIT)
    make(caches, "small", 10)
    assert caches.has_room(500)
    make(caches, "large", 500, released=False)
    assert "small" not in caches
    caches.acquire("large")
    assert not caches.has_room(1)
    caches.release("large")
    assert "large" in caches
    caches.release("large")
    assert caches.size_bytes == 0


def test_a_bound_of_zero_keeps_nothing():
    caches = ReferenceCaches(0)
    make(caches, "a", 5)
    assert "a" not in caches
    assert caches.size_bytes == 0


def test_a_key_is_the_content_in_its_order():
    first, second = torch.arange(32.0).view(2, 2, 8), torch.ones(1, 4, 8)
    key = references_key([first, second], "model")
    assert key == references_key([first.clone(), second.clone()], "model")
    others = [
        references_key([second, first], "model"),
        references_key([first], "model"),
        references_key([first, second], "other model"),
        references_key([first.view(4, 1, 8), second], "model"),
        references_key([first.bfloat16(), second], "model"),
        references_key([first + 1e-6, second], "model"),
        references_key([first, second, second], "model"),
    ]
    assert len({key, *others}) == 8


def kinds(batches: list[Batch]) -> list[list[int | None]]:
    return [[item.image for item in batch.items] for batch in batches]


def test_a_cache_is_one_turn_before_the_first_step_and_not_made_again():
    device = Device(SchedulerConfig(), LIMIT)
    device.submit(cache=cache("a"), image_count=2)
    device.run()
    device.submit(cache=cache("a"))
    device.submit()
    device.run()
    assert kinds(device.batches) == [[None], *[[0], [1]] * 2, *[[0]] * 4]
    assert [batch.tokens for batch in device.batches[:2]] == [20, 10]
    assert [len(batch.starting) for batch in device.batches] == [1, 0, 0, 0, 0, 1, 0, 1, 0]


def test_packed_steps_carry_caches_beside_others_steps_within_the_budget():
    device = Device(SchedulerConfig(token_budget=50), LIMIT)
    device.submit(step_count=4)
    device.submit(cache=cache("a"))
    device.submit(cache=cache("a"))
    device.submit(cache=cache("b", tokens=30))
    device.run()
    assert kinds(device.batches) == [[0, None], [0, 0, 0], [0, 0, 0], [0, None], [0], [0]]


def test_a_cancelled_request_frees_its_cache_for_the_next():
    device = Device(SchedulerConfig(), LIMIT)
    first = device.submit(cache=cache("a", 70), step_count=500)
    device.step()
    second = device.submit(cache=cache("b", 70), urgency=Urgency.INTERACTIVE)
    device.scheduler.cancel(first)
    device.run()
    assert second.is_finished
    assert "a" not in device.caches


def test_a_cache_that_is_not_there_yet_counts_in_what_a_request_still_needs():
    device = Device(SchedulerConfig(), LIMIT)
    device.scheduler.step_times.observe([10], 0.01)
    device.scheduler.step_times.observe([20], 0.02)
    job = device.submit(cache=cache("a"), step_count=3)
    assert device.scheduler.estimates.seconds_left(job) == pytest.approx(0.05)
    device.step()
    assert device.scheduler.estimates.seconds_left(job) == pytest.approx(0.03)
    same = device.submit(cache=cache("a"), step_count=3)
    assert device.scheduler.estimates.seconds_left(same) == pytest.approx(0.03)


@settings(deadline=None)
@given(
    budget=st.sampled_from([0, 60, 500]),
    arrivals=st.lists(
        st.tuples(
            st.sampled_from([None, "a", "b", "c", "huge"]),
            st.integers(1, 3),
            st.sampled_from(Urgency),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_every_request_ends_and_the_limit_holds(budget, arrivals):
    device = Device(SchedulerConfig(token_budget=budget), LIMIT)
    sizes = {"a": 30, "b": 45, "c": 60, "huge": 250}
    jobs = []
    for key, image_count, urgency, steps_before, is_cancelled in arrivals:
        for _ in range(steps_before):
            device.step()
        wanted = cache(key, sizes[key]) if key else None
        jobs.append(device.submit(cache=wanted, image_count=image_count, urgency=urgency))
        if is_cancelled:
            device.scheduler.cancel(jobs[-1])
    device.run()
    assert all(job.is_finished or job.is_cancelled for job in jobs)
    has_huge = any(key == "huge" for key, *_ in arrivals)
    assert device.peak_bytes <= (LIMIT + 250 if has_huge else LIMIT)
    assert device.caches.size_bytes <= LIMIT

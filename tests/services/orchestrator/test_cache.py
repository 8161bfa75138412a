"""The cache is exact and bounded whatever is done to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_services.orchestrator.tensor_cache import CachedTensor, CacheKey, TensorCache

CAPACITY = 100
operations = st.lists(
    st.tuples(st.sampled_from(["put", "get", "discard"]), st.integers(0, 9), st.integers(0, 130)), max_size=60
)


def key(number: int) -> CacheKey:
    return CacheKey.of("prompt_embedding", "model", str(number).encode())


@given(operations)
def test_it_holds_what_was_put_last_within_its_bytes(steps):
    cache = TensorCache(CAPACITY)
    newest: dict[int, CachedTensor] = {}
    for step, number, size in steps:
        if step == "put":
            entry = CachedTensor(b"", (bytes([number]) * size,))
            cache.put(key(number), entry)
            if size <= CAPACITY:
                newest[number] = entry
                assert cache.get(key(number)) is entry
        elif step == "discard":
            cache.discard(key(number))
            newest.pop(number, None)
            assert cache.get(key(number)) is None
        else:
            found = cache.get(key(number))
            assert found is None or found is newest[number]
        held = [entry for n in range(10) if (entry := cache.get(key(n))) is not None]
        assert cache.size_bytes == sum(entry.size_bytes for entry in held) <= CAPACITY


def test_the_least_recently_used_makes_room():
    cache = TensorCache(CAPACITY)
    for number in range(2):
        cache.put(key(number), CachedTensor(b"", (bytes(45),)))
    cache.get(key(0))
    cache.put(key(2), CachedTensor(b"", (bytes(45),)))
    assert [cache.get(key(number)) is not None for number in range(3)] == [True, False, True]


def test_one_that_cannot_fit_drives_nothing_out():
    cache = TensorCache(CAPACITY)
    small = CachedTensor(b"", (bytes(10),))
    cache.put(key(0), small)
    cache.put(key(1), CachedTensor(b"", (bytes(CAPACITY + 1),)))
    assert cache.get(key(0)) is small
    assert cache.get(key(1)) is None
    assert cache.size_bytes == small.size_bytes


def test_keys_tell_kinds_models_and_contents_apart():
    keys = {
        CacheKey.of(kind, model, content)
        for kind in ("prompt_embedding", "reference_latents")
        for model in ("a", "b")
        for content in (b"x", b"y")
    }
    assert len(keys) == 8
    assert CacheKey.of("k", "m", b"x") == CacheKey.of("k", "m", b"x")


def test_a_response_that_grows_too_large_is_not_held():
    cache = TensorCache(10)
    writer = cache.writer(key(0))
    writer.add(bytes(6))
    writer.commit(b"s")
    assert cache.get(key(0)) == CachedTensor(b"s", (bytes(6),))
    cache.discard(key(0))
    writer.add(bytes(6))
    writer.add(bytes(1))
    assert not writer._frames
    writer.commit(b"s")
    assert key(0) not in cache


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = TensorCache(0)
    writer = cache.writer(key(0))
    writer.add(b"x")
    writer.commit(b"s")
    assert cache.get(key(0)) is None


def test_pinned_values_stay_even_over_the_limit():
    cache = TensorCache(CAPACITY)
    large, small = CachedTensor(b"", (bytes(CAPACITY + 1),)), CachedTensor(b"", (bytes(10),))
    cache.put(key(0), large, pinned=True)
    cache.put(key(1), small)
    # Over the limit already, so nothing else is kept next to it.
    assert (key(0) in cache, key(1) in cache) == (True, False)
    assert cache.pin(key(0)) is large
    assert cache.pinned_bytes == cache.size_bytes == CAPACITY + 1
    with pytest.raises(ValueError, match="pinned"):
        cache.put(key(0), small)
    cache.unpin(key(0))
    assert cache.is_pinned(key(0))
    cache.unpin(key(0))
    # Too large to be kept without a pin.
    assert (key(0) in cache, cache.size_bytes, cache.is_pinned(key(0))) == (False, 0, False)


def test_a_value_stays_after_its_last_pin_until_another_needs_its_room():
    cache = TensorCache(CAPACITY)
    cache.put(key(0), CachedTensor(b"", (bytes(60),)), pinned=True)
    cache.put(key(1), CachedTensor(b"", (bytes(60),)))
    assert (key(0) in cache, key(1) in cache) == (True, False)
    cache.unpin(key(0))
    assert key(0) in cache
    cache.make_room(50)
    assert key(0) not in cache

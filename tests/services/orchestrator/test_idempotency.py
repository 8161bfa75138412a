"""Requests with the same idempotency key are carried out once, within a window and bounded bytes."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    ImageSpec,
    StreamGenerateImageRequest,
    StreamGenerateImageResponse,
)
from klein_services.orchestrator.events import ImageEvent
from klein_services.orchestrator.idempotency import IdempotentRequests
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.errors import QueueFull, StageUnavailable
from klein_services.runtime.status import explain
from tests.services.fakes.orchestrator_suite import FakeSuite, nothing_left_running
from tests.services.fakes.runtime_toy import failure, until

KEY = (("idempotency-key", "3f2a"),)


@pytest.fixture
async def suite():
    async with FakeSuite().running() as suite:
        yield suite


def unary(suite, metadata=KEY, timeout=None, **spec):
    return suite.images.GenerateImage(
        GenerateImageRequest(spec=ImageSpec(**spec)), metadata=metadata, timeout=timeout
    )


def streamed(suite, metadata=KEY, timeout=None, **spec):
    return suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(**spec)), metadata=metadata, timeout=timeout
    )


async def events_of(call):
    return [event async for event in call]


async def test_a_repeated_request_gets_the_finished_result(suite):
    first = await unary(suite, prompt="fox")
    assert await unary(suite, prompt="fox") == first, "also the seed that was drawn"
    assert suite.denoiser.calls == 1
    assert (await unary(suite, metadata=(), prompt="fox")).images[0].seed != first.images[0].seed


async def test_a_stream_that_joins_gets_all_events_from_the_start(suite):
    suite.denoiser.step_gate = asyncio.Event()
    first = streamed(suite, prompt="fox", seed=1)
    kinds = []
    async for event in first:
        kinds.append(event.WhichOneof("event"))
        break
    second = asyncio.create_task(events_of(streamed(suite, prompt="fox", seed=1)))
    await asyncio.sleep(0.2)
    suite.denoiser.step_gate.set()
    kinds += [event.WhichOneof("event") async for event in first]
    joined = await second
    assert [event.WhichOneof("event") for event in joined] == kinds
    assert await events_of(streamed(suite, prompt="fox", seed=1)) == joined
    assert suite.denoiser.calls == 1
    [image] = [event.image for event in joined if event.HasField("image")]
    assert image.data == suite.expected_image("fox", 1)


@pytest.mark.parametrize("leaves", [0, 1])
async def test_a_client_that_leaves_does_not_end_the_other(suite, leaves):
    suite.denoiser.step_gate = asyncio.Event()
    calls = [asyncio.create_task(events_of(streamed(suite, prompt="fox", seed=1))) for _ in range(2)]
    await until(lambda: suite.orchestrator.generator.slots.in_use == 2)
    await until(lambda: suite.denoiser.calls == 1)
    calls[leaves].cancel()
    await asyncio.sleep(0.3)
    suite.denoiser.step_gate.set()
    assert (await calls[1 - leaves])[-1].HasField("summary")
    assert suite.denoiser.calls == 1


async def test_the_request_ends_with_its_last_client_and_the_key_is_free_again(suite):
    suite.denoiser.step_gate = asyncio.Event()
    calls = [asyncio.create_task(events_of(streamed(suite, prompt="fox", seed=1))) for _ in range(2)]
    await until(lambda: suite.orchestrator.generator.slots.in_use == 2)
    await until(lambda: suite.denoiser.calls == 1)
    for call in calls:
        call.cancel()
    await until(lambda: suite.denoiser.cancelled == 1)
    await nothing_left_running()
    assert suite.orchestrator.generator.slots.in_use == 0
    suite.denoiser.step_gate.set()
    assert (await unary(suite, prompt="fox", seed=1)).images[0].data == suite.expected_image("fox", 1)


async def test_the_key_of_another_request_is_refused(suite):
    await unary(suite, prompt="fox", seed=1)
    for other in (unary(suite, prompt="fox", seed=2), unary(suite, prompt="fax", seed=1)):
        error = await failure(other)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [violation.field for violation in explain(error).violations] == ["idempotency-key"]
    error = await failure(events_of(streamed(suite, prompt="fox", seed=1)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert suite.denoiser.calls == 1


@pytest.mark.parametrize("key", ["", "two words", "x" * 129])
async def test_malformed_keys_are_refused(suite, key):
    error = await failure(unary(suite, metadata=(("idempotency-key", key),)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert suite.denoiser.calls == 0


async def test_errors_are_not_kept(suite):
    suite.text_encoder.error = StageUnavailable("lost")
    assert (await failure(unary(suite, prompt="fox", seed=1))).code() is grpc.StatusCode.UNAVAILABLE
    suite.text_encoder.error = None
    assert (await unary(suite, prompt="fox", seed=1)).images[0].data == suite.expected_image("fox", 1)


async def test_the_deadline_of_the_first_client_is_not_that_of_the_other(suite):
    suite.text_encoder.delay_seconds = 0.6
    first = asyncio.create_task(failure(unary(suite, timeout=0.5, prompt="fox", seed=1)))
    await until(lambda: suite.denoiser.calls == 1)
    response = unary(suite, prompt="fox", seed=1)
    assert (await first).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await response).images[0].data == suite.expected_image("fox", 1)


@pytest.mark.parametrize("settings", [{"idempotency_seconds": 0.0}, {"idempotency_bytes": 0}])
async def test_keys_are_ignored_where_they_are_off(settings):
    async with FakeSuite(settings=settings).running() as suite:
        for _ in range(2):
            await unary(suite, prompt="fox", seed=1)
        assert suite.denoiser.calls == 2


def image_event(size_bytes: int) -> ImageEvent:
    return ImageEvent(StreamGenerateImageResponse().image, [memoryview(bytes(size_bytes))])


class Source:
    """Requests that make images of a size."""

    def __init__(self, size_bytes: int = 10, count: int = 1) -> None:
        self.size_bytes, self.count = size_bytes, count
        self.made: list[ImageEvent] = []
        self.requests = 0

    async def events(self):
        self.requests += 1
        for _ in range(self.count):
            self.made.append(image_event(self.size_bytes))
            yield self.made[-1]


async def all_of(requests, key, source):
    return [event async for event in requests.events(key, GenerateImageRequest(), source.events)]


async def test_results_are_bounded_in_bytes_and_time():
    requests, source = IdempotentRequests(0.3, 25, ConcurrencyLimit(9)), Source()
    for key in ("a", "b", "c", "c", "b"):
        await all_of(requests, key, source)
    assert source.requests == 3
    await all_of(requests, "a", source)
    assert source.requests == 4, "the least recently used made room"
    await asyncio.sleep(0.5)
    await all_of(requests, "a", source)
    assert source.requests == 5, "it was kept for a while only"


async def test_clients_that_read_anothers_result_are_bounded():
    requests, source = IdempotentRequests(60, 1000, ConcurrencyLimit(1)), Source()
    await all_of(requests, "a", source)
    reader = requests.events("a", GenerateImageRequest(), source.events)
    await anext(reader)
    with pytest.raises(QueueFull):
        await all_of(requests, "a", source)
    await reader.aclose()
    assert len(await all_of(requests, "a", source)) == source.requests == 1


async def test_a_result_beyond_the_limit_is_not_kept():
    requests, source = IdempotentRequests(60, 25, ConcurrencyLimit(9)), Source(size_bytes=10, count=9)
    for _ in range(2):
        assert len(await all_of(requests, "a", source)) == 9
    assert source.requests == 2


async def test_a_request_is_a_few_events_ahead_of_its_fastest_reader():
    requests, source = IdempotentRequests(60, 1000, ConcurrencyLimit(9)), Source(count=50)
    reader = requests.events("a", GenerateImageRequest(), source.events)
    for read in range(1, 21):
        await anext(reader)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(source.made) <= read + 5
    await reader.aclose()

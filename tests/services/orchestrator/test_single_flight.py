"""Requests that need the same tensor at the same time encode it once, and no failure is everybody's."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from klein_services.orchestrator.single_flight import SingleFlight
from klein_services.runtime.errors import StagesLost, StageUnavailable
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running
from tests.services.fakes.runtime_toy import failure, until

MESSAGES = [b"summary", b"first", b"second", b"last"]
BIG_TOKENS = 65536
"""Tokens of an embedding of several frames."""


@pytest.fixture
async def suite():
    async with FakeSuite().running() as suite:
        yield suite


class Calls:
    """Calls whose messages tests let through one by one."""

    def __init__(self) -> None:
        self.count = 0
        self.allowed = asyncio.Semaphore(0)
        self.error: Exception | None = None
        self.messages = MESSAGES

    async def open(self):
        self.count += 1
        for message in self.messages:
            await self.allowed.acquire()
            if self.error is not None:
                error, self.error = self.error, None
                raise error
            yield message


async def read(flights, calls, into=None):
    heard = [] if into is None else into
    async for message in flights.messages("key", calls.open):
        heard.append(message)
    return heard


async def started(count, flights, calls):
    heard = [[] for _ in range(count)]
    tasks = []
    for each in heard:
        tasks.append(asyncio.create_task(read(flights, calls, each)))
        await asyncio.sleep(0)
    return heard, tasks


async def test_followers_get_each_message_as_it_arrives_also_those_before_they_came():
    flights, calls = SingleFlight(100), Calls()
    heard, tasks = await started(2, flights, calls)
    calls.allowed.release()
    calls.allowed.release()
    await until(lambda: heard == [MESSAGES[:2]] * 2)
    late = asyncio.create_task(read(flights, calls))
    calls.allowed.release()
    calls.allowed.release()
    assert await asyncio.gather(*tasks, late) == [MESSAGES] * 3
    assert (calls.count, len(flights)) == (1, 0)


@pytest.mark.parametrize("messages_before", range(4))
@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_when_the_first_fails_another_goes_on_and_repeats_nothing(messages_before, is_cancelled):
    flights, calls = SingleFlight(100), Calls()
    heard, [leader, *followers] = await started(4, flights, calls)
    for _ in range(messages_before):
        calls.allowed.release()
    await until(lambda: heard == [MESSAGES[:messages_before]] * 4)
    calls.messages = [b"another summary", *MESSAGES[1:]]
    if is_cancelled:
        leader.cancel()
    else:
        calls.error = StageUnavailable("lost")
        calls.allowed.release()
    await asyncio.gather(leader, return_exceptions=True)
    for _ in MESSAGES:
        calls.allowed.release()
    for result in await asyncio.gather(*followers):
        assert result[0] == calls.messages[0] or messages_before
        assert result[1:] == MESSAGES[1:]
    assert (calls.count, len(flights)) == (2, 0)


async def test_a_second_call_with_other_bytes_is_not_mixed_with_the_first():
    flights, calls = SingleFlight(100), Calls()
    heard, [leader, follower] = await started(2, flights, calls)
    calls.allowed.release()
    calls.allowed.release()
    await until(lambda: len(heard[1]) == 2)
    leader.cancel()
    calls.messages = [b"summary", b"other", b"bytes"]
    for _ in MESSAGES:
        calls.allowed.release()
    with pytest.raises(StagesLost, match="other bytes"):
        await follower
    assert len(flights) == 0


@pytest.mark.parametrize("limit", [0, 15])
async def test_a_response_beyond_the_limit_is_not_held_and_everyone_gets_it(limit):
    flights, calls = SingleFlight(limit), Calls()
    _, tasks = await started(3, flights, calls)
    for _ in range(3 * len(MESSAGES)):
        calls.allowed.release()
    assert await asyncio.gather(*tasks) == [MESSAGES] * 3
    assert (calls.count, len(flights)) == (3, 0)


async def test_equal_prompts_at_once_are_encoded_once(suite):
    suite.text_encoder.delay_seconds = 0.3
    responses = await asyncio.gather(*(generate(suite, prompt="fox", seed=seed) for seed in range(10)))
    for seed, response in enumerate(responses):
        assert response.images[0].data == suite.expected_image("fox", seed)
    assert suite.text_encoder.prompts == ["fox"]


async def test_equal_references_at_once_are_encoded_once(suite):
    suite.vae_decoder.delay_seconds = 0.3
    image = b"image:64x96"
    responses = await asyncio.gather(*(generate(suite, references=[image, image], seed=1) for _ in range(5)))
    assert len({response.images[0].data for response in responses}) == 1
    assert suite.vae_decoder.references == [image]


async def test_a_follower_goes_on_when_the_first_client_leaves(suite):
    suite.text_encoder.tokens = BIG_TOKENS
    suite.text_encoder.last_frame_gate = asyncio.Event()
    first = asyncio.create_task(generate(suite, prompt="fox", seed=1))
    await until(lambda: suite.text_encoder.frames_sent > 0)
    second = asyncio.create_task(generate(suite, prompt="fox", seed=2))
    await until(lambda: suite.denoiser.calls == 2)
    first.cancel()
    await until(lambda: len(suite.text_encoder.prompts) == 2)
    suite.text_encoder.last_frame_gate.set()
    assert (await second).images[0].data == suite.expected_image("fox", 2)
    await nothing_left_running()
    assert len(suite.orchestrator.generator.cache.flights) == 0


async def test_a_failure_of_the_first_is_not_everybodys(suite):
    suite.text_encoder.delay_seconds = 0.3
    requests = [
        asyncio.create_task(generate(suite, prompt="fox", seed=seed, within_seconds=within))
        for seed, within in ((1, 0.2), (2, None), (3, None))
    ]
    assert (await failure(requests[0])).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for seed, request in ((2, requests[1]), (3, requests[2])):
        assert (await request).images[0].data == suite.expected_image("fox", seed)
    assert len(suite.text_encoder.prompts) <= 2

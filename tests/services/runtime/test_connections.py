"""Bounds of connections: what slow, idle and greedy clients may take, and what their neighbors notice of it."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.certificates import Authority
from tests.services.fakes.raw_connections import (
    CONTINUATION,
    HEADERS,
    PREFACE,
    client_context,
    frame,
    raw_connections,
)
from tests.services.fakes.runtime_toy import call, failure, until

QUICK = ServerSettings(drain_delay_seconds=0, grace_seconds=5, metrics_port=0)
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of one process share connections otherwise."""
HEADER = b"\x40\x05klein\x05klein"
"""A literal header field, in HPACK."""


@asynccontextmanager
async def neighbor(address, credentials=None):
    """A client that calls all the time on one connection; none of its calls may fail."""
    calls = 0

    async def keep_calling():
        nonlocal calls
        async with open_channel(address, credentials=credentials, options=OWN_CONNECTION) as channel:
            while True:
                assert await call(channel, "unary_unary", timeout=60) == b"x"
                calls += 1
                await asyncio.sleep(0.01)

    task = asyncio.create_task(keep_calling())

    async def has_called_again():
        before = calls
        await until(lambda: task.done() or calls >= before + 3, 60)
        assert not task.done(), task.exception()

    await has_called_again()
    try:
        yield has_called_again
        await has_called_again()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def pair_files(authority):
    pair = authority.issue("localhost", "127.0.0.1")
    return {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}


@pytest.mark.parametrize(
    "begin", [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HT"], ids=["silent", "half", "http"]
)
async def test_half_open_tls_handshakes_are_closed(toy, authority, pair_files, begin):
    settings = replace(QUICK, handshake_timeout_seconds=0.5, **pair_files)
    async with running_server(toy, settings) as address, neighbor(address, authority.credentials()):
        async with raw_connections(address, 40) as slow:
            for connection in slow:
                connection.writer.write(begin)
            assert all(await asyncio.gather(*(connection.is_closed() for connection in slow)))


@pytest.mark.parametrize("begin", [b"", PREFACE[:7], PREFACE], ids=["silent", "half", "no-settings"])
async def test_connections_that_never_begin_http2_are_closed(toy, begin):
    settings = replace(QUICK, handshake_timeout_seconds=0.5)
    async with running_server(toy, settings) as address, neighbor(address):
        async with raw_connections(address, 40) as slow:
            for connection in slow:
                connection.writer.write(begin)
            assert all(await asyncio.gather(*(connection.is_closed() for connection in slow)))


async def test_dribbled_headers_neither_keep_a_connection_nor_disturb_others(toy):
    settings = replace(QUICK, max_connection_idle_seconds=1)
    async with running_server(toy, settings) as address, neighbor(address):

        async def dribble(connection):
            await connection.begin_http2()
            connection.writer.write(frame(HEADERS, stream=1, payload=HEADER))
            closed = asyncio.create_task(connection.is_closed())
            while not closed.done():
                connection.writer.write(frame(CONTINUATION, stream=1, payload=HEADER))
                await asyncio.wait([closed], timeout=0.05)
            return await closed

        async with raw_connections(address, 20) as slow:
            assert all(await asyncio.gather(*map(dribble, slow)))


async def test_a_thousand_idle_connections_do_not_disturb_others(toy):
    async with running_server(toy) as address, neighbor(address) as has_called_again:
        async with raw_connections(address, 1000, begin=True) as opened:
            await has_called_again()
            async with open_channel(address, options=OWN_CONNECTION) as channel:
                assert await call(channel, "unary_unary", timeout=60) == b"x"
            assert not await opened[0].is_closed(0.2)


async def test_idle_connections_are_closed_after_their_time(toy, authority, pair_files):
    settings = replace(QUICK, max_connection_idle_seconds=0.5, **pair_files)
    context = client_context(str(authority.file))
    async with running_server(toy, settings) as address, neighbor(address, authority.credentials()):
        async with raw_connections(address, 20, context, begin=True) as opened:
            assert all(await asyncio.gather(*(connection.is_closed() for connection in opened)))


async def test_connections_above_the_limit_are_closed_and_those_within_it_stay(toy):
    settings = replace(QUICK, max_connections=8)
    async with running_server(toy, settings) as address, neighbor(address):
        async with raw_connections(address, 7, begin=True) as opened:
            async with raw_connections(address, 1) as (further,):
                further.writer.write(PREFACE)
                assert await further.is_closed()
            error = await failure(call_once(address))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert not await opened[0].is_closed(0.2)
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await call_once(address) == b"x"
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.1)


async def call_once(address):
    async with open_channel(address, options=OWN_CONNECTION) as channel:
        return await call(channel, "unary_unary", timeout=60)


async def test_calls_above_the_limit_of_a_connection_wait_and_others_do_not(toy):
    may_end = asyncio.Event()
    slow_calls = []

    async def behave(request, context):
        if request == b"slow":
            slow_calls.append(request)
            await may_end.wait()
        yield request

    toy.behavior = behave
    settings = replace(QUICK, max_connection_streams=2)
    async with running_server(toy, settings) as address, neighbor(address):
        async with open_channel(address, options=OWN_CONNECTION) as channel:
            slow = [asyncio.create_task(call(channel, "unary_unary", b"slow")) for _ in range(2)]
            await until(lambda: len(slow_calls) == 2)
            error = await failure(call(channel, "unary_unary", b"x", timeout=0.5))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            may_end.set()
            assert await asyncio.gather(*slow) == [b"slow"] * 2


@pytest.mark.parametrize(("size", "code"), [(12_000, None), (20_000, grpc.StatusCode.RESOURCE_EXHAUSTED)])
async def test_metadata_is_bounded(toy, toy_channel, size, code):
    calling = call(toy_channel, "unary_unary", metadata=(("x-large", "v" * size),))
    if code is None:
        assert await calling == b"x"
    else:
        assert (await failure(calling)).code() is code
        assert toy.calls == 0

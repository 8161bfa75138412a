"""Requests that are begun and reset at once by the thousand, from one socket."""

import asyncio
import time

from tests.services.fakes.raw_http2 import begun_and_reset, connect
from tests.services.fakes.runtime_toy import call

REQUESTS = 500
ROUNDS = 12


async def test_calls_of_others_succeed_while_one_socket_resets_thousands(toy_address, toy_channel):
    assert await call(toy_channel, "unary_unary", b"before") == b"before"
    with connect(toy_address) as connection:
        # The event loop stands still meanwhile, as on a machine that is busy: all of them wait for it.
        for index in range(ROUNDS):
            stream = 1 + 2 * REQUESTS * index
            connection.sendall(begun_and_reset("/toy.Toy/unary_unary", toy_address, REQUESTS, stream))
        time.sleep(0.5)  # noqa: ASYNC251  # the loop must not turn
        calls = [call(toy_channel, "unary_unary", b"%d" % number) for number in range(50)]
        assert await asyncio.gather(*calls) == [b"%d" % number for number in range(50)]

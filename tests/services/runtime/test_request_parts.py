"""Streamed requests are read in order, in time, and drained when they are refused."""

import asyncio

import pytest

from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.errors import InvalidInput
from klein_services.runtime.errors import ReceiveTimeout
from klein_services.runtime.request_parts import read_parts

SPEC = pb.EncodeReferenceRequest(spec=pb.ReferenceSpec(field_name="a"))
CHUNK = pb.EncodeReferenceRequest(image_chunk=b"x")


class Client:
    """A client's stream of parts; counts what has been read of it."""

    def __init__(self, *parts, stalls=False):
        self.parts, self.stalls, self.read_count = parts, stalls, 0

    async def __aiter__(self):
        for part in self.parts:
            self.read_count += 1
            yield part
        if self.stalls:
            await asyncio.sleep(600)


async def read(client, timeout_seconds=30.0):
    async with read_parts(aiter(client), timeout_seconds=timeout_seconds) as parts:
        spec = (await parts.spec_part()).spec
        return spec.field_name, [part.image_chunk async for part in parts]


async def test_the_spec_comes_first_and_the_data_follows():
    assert await read(Client(SPEC, CHUNK, CHUNK)) == ("a", [b"x", b"x"])


@pytest.mark.parametrize(
    ("parts", "field", "description"),
    [
        ([], "spec", "first part"),
        ([CHUNK], "spec", "first part"),
        ([pb.EncodeReferenceRequest()], "spec", "first part"),
        ([SPEC, CHUNK, SPEC], "spec", "twice"),
        ([SPEC, pb.EncodeReferenceRequest()], "part", "one of spec, image_chunk"),
    ],
    ids=["nothing", "data first", "an empty first part", "two specs", "an empty part"],
)
async def test_parts_out_of_order_are_refused(parts, field, description):
    with pytest.raises(InvalidInput) as refused:
        await read(Client(*parts))
    [violation] = refused.value.violations
    assert violation.field == field
    assert description in violation.description


@pytest.mark.parametrize("parts", [[], [SPEC], [SPEC, CHUNK]])
async def test_a_stream_that_stalls_times_out(parts):
    with pytest.raises(ReceiveTimeout, match=r"0\.05 s"):
        await read(Client(*parts, stalls=True), timeout_seconds=0.05)


async def test_the_time_is_for_the_whole_stream():
    async def trickle():
        yield SPEC
        while True:
            await asyncio.sleep(0.01)
            yield CHUNK

    with pytest.raises(ReceiveTimeout):
        await read(trickle(), timeout_seconds=0.2)


async def test_only_reading_is_timed():
    async with read_parts(aiter(Client(SPEC)), timeout_seconds=0.05) as parts:
        await parts.spec_part()
        assert [part async for part in parts] == []
        await asyncio.sleep(0.1)


async def refuse(client):
    """Fails as a handler does that refuses the spec."""
    async with read_parts(aiter(client), timeout_seconds=300) as parts:
        await parts.spec_part()
        raise ZeroDivisionError


async def test_a_refusal_discards_what_the_client_still_sends():
    client = Client(SPEC, *[CHUNK] * 20)
    with pytest.raises(ZeroDivisionError):
        await refuse(client)
    assert client.read_count == 21


async def test_a_refusal_does_not_wait_for_a_client_that_pauses():
    async with asyncio.timeout(60):
        with pytest.raises(ZeroDivisionError):
            await refuse(Client(SPEC, stalls=True))


async def test_a_cancelled_call_does_not_read_on():
    client = Client(SPEC, *[CHUNK] * 20)
    entered = asyncio.Event()

    async def handle():
        async with read_parts(aiter(client), timeout_seconds=300) as parts:
            await parts.spec_part()
            entered.set()
            await asyncio.sleep(600)

    handler = asyncio.create_task(handle())
    await entered.wait()
    handler.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handler
    assert client.read_count == 1

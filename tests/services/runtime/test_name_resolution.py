"""Names in gRPC's DNS targets, and channels that are replaced when their addresses change."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from klein_services.orchestrator.routing import StageAddress
from klein_services.orchestrator.stage_channels import Channels
from klein_services.runtime import name_resolution
from klein_services.runtime.name_resolution import DnsName
from tests.services.fakes.runtime_toy import until


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("dns:///denoiser.klein.svc:50052", DnsName("denoiser.klein.svc", None)),
        ("dns:denoiser:50052", DnsName("denoiser", None)),
        ("dns:///denoiser", DnsName("denoiser", None)),
        ("dns://10.0.0.10/denoiser:50052", DnsName("denoiser", ("10.0.0.10", 53))),
        ("dns://127.0.0.1:5353/denoiser:50052", DnsName("denoiser", ("127.0.0.1", 5353))),
        ("dns://name-of-a-server/denoiser:50052", None),
        ("dns:///10.0.0.7:50052", None),
        ("dns:///[::1]:50052", None),
        ("localhost:50052", None),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", None),
        ("unix:/tmp/socket", None),
    ],
)
def test_the_name_of_a_target(target, name):
    assert DnsName.of(target) == name


async def test_addresses_of_the_system_and_of_nothing():
    assert await DnsName("localhost", None).addresses() & {"127.0.0.1", "::1"}
    assert await DnsName("no-such-name.invalid", None).addresses() == frozenset()


async def test_a_server_that_does_not_answer_is_no_address(monkeypatch):
    monkeypatch.setattr(name_resolution, "_TIMEOUT_SECONDS", 0.2)
    silent = asyncio.DatagramProtocol()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: silent, local_addr=("127.0.0.1", 0)
    )
    try:
        port = transport.get_extra_info("sockname")[1]
        assert await DnsName("denoiser", ("127.0.0.1", port)).addresses() == frozenset()
    finally:
        transport.close()


async def test_new_addresses_get_a_new_channel_and_a_running_call_keeps_the_old_one(
    toy, toy_address, monkeypatch
):
    answers = [frozenset({"127.0.0.1"})]

    async def addresses(self):
        return answers[0]

    monkeypatch.setattr(DnsName, "addresses", addresses)
    released = asyncio.Event()

    async def behave(request, context):
        yield b"begun"
        await released.wait()
        yield b"done"

    toy.behavior = behave
    channels = Channels(dns_interval_seconds=0.02)
    # The toy serves the text-encoder's service; both names of this machine lead to it.
    address = StageAddress("text-encoder", f"dns:///localhost:{toy_address.rpartition(':')[2]}", "toy")
    try:
        before = channels.any(address)
        call = before.unary_stream("/toy.Toy/unary_stream")(b"x", timeout=30)
        channels.called(before, call)
        assert await call.read() == b"begun"
        answers[0] = frozenset()
        await asyncio.sleep(0.1)
        assert channels.any(address) is before
        answers[0] = frozenset({"127.0.0.1", "127.0.0.2"})
        await until(lambda: channels.any(address) is not before)
        assert before.get_state() is not grpc.ChannelConnectivity.SHUTDOWN
        released.set()
        assert await call.read() == b"done"
        assert await call.read() is grpc.aio.EOF
        await until(lambda: before.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
        after = channels.any(address)
        assert await after.unary_unary("/toy.Toy/unary_unary")(b"x", timeout=30) == b"begundone"
    finally:
        await channels.close()

"""Transfer time of a tensor: a raw socket, one gRPC hop, and two hops with a cut-through relay.

    python -m benchmarks.transport [--check] [--mebibytes 8] [--rounds 25]

Three processes on this machine: this one receives; a source sends the tensor, over a plain socket and as a
text-encoder would over gRPC; a relay passes serialized frames on as the orchestrator does. Each path is
timed from the request until the receiver has all bytes, in frames, and for gRPC until their digest is checked
as well; no path includes copying the frames into a tensor.
The paths alternate, so that noise affects all of them. With `--check` the exit code is 1 unless the
medians' ratios are within the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc

from klein_api.v1 import tensor_pb2, text_encoder_service_pb2_grpc
from klein_api.v1 import text_encoder_service_pb2 as pb
from klein_services.orchestrator.decoding import FrameQueue
from klein_services.runtime.channels import open_channel
from klein_services.runtime.entry import keep_large_blocks
from klein_services.runtime.frames import FrameEnvelope, FrameReader, TensorSpec, serialized_frames
from klein_services.runtime.protowire import frame_deserializer
from klein_services.runtime.server import running_server
from klein_services.runtime.stage import Service

ONE_HOP_BAR = 2.5
"""One hop over a raw socket, at most."""
TWO_HOPS_BAR = 1.4
"""Two hops over one hop, at most."""
PROCESS_COUNT = 3
METHOD = "/klein_api.v1.TextEncoderService/EncodePrompt"

ENVELOPE = FrameEnvelope(pb.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)


class Source(Service, text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Sends the same tensor for every call."""

    name = "text-encoder"
    service_names = ("klein_api.v1.TextEncoderService",)

    def __init__(self, byte_count: int) -> None:
        self._data = os.urandom(byte_count)
        self._spec = TensorSpec(tensor_pb2.DATA_TYPE_BF16, (byte_count // 2,))

    def register(self, server: grpc.aio.Server) -> None:
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)

    async def EncodePrompt(self, request: Any, context: Any) -> AsyncIterator[bytes]:
        for message in serialized_frames(memoryview(self._data), self._spec, ENVELOPE):
            yield message

    def serve_socket(self, port: int) -> None:
        """Answers each byte on a plain socket with the tensor."""
        listener = socket.create_server(("127.0.0.1", port))
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            connection.sendall(self._data)


class Relay(Service):
    """Relays serialized messages of a source as they arrive."""

    name = "orchestrator"
    service_names = ("klein_api.v1.TextEncoderService",)

    def __init__(self, target: str) -> None:
        self._target = target

    def register(self, server: grpc.aio.Server) -> None:
        handler = grpc.unary_stream_rpc_method_handler(self._relay)
        service, _, method = METHOD[1:].partition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))

    async def load(self) -> None:
        self._channel = open_channel(self._target)

    async def close(self) -> None:
        await self._channel.close()

    async def _relay(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        relay = FrameQueue()
        reading = asyncio.create_task(self._read(request, relay))
        async for message in relay.frames():
            yield message
        await reading

    async def _read(self, request: bytes, relay: FrameQueue) -> None:
        async for message in self._channel.unary_stream(METHOD)(request):
            await relay.put(message)
        await relay.finish()


async def serve(application: Service) -> None:
    """Serves until standard input ends; prints the address first."""
    async with running_server(application) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


@contextmanager
def other_process(*arguments: str) -> Iterator[str]:
    """Runs this script in another role and yields its address."""
    command = [sys.executable, "-m", "benchmarks.transport", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None or process.stdin is None:
            raise RuntimeError("pipes were asked for and not made")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def raw_path(port: int, byte_count: int) -> Callable[[], Awaitable[None]]:
    """Returns a coroutine function that fetches the tensor over a plain, blocking socket."""
    connection = socket.create_connection(("127.0.0.1", port))
    buffer = bytearray(byte_count)

    async def fetch() -> None:
        connection.sendall(b"?")
        view = memoryview(buffer)
        while view:
            view = view[connection.recv_into(view) :]

    return fetch


def hop_path(address: str, byte_count: int) -> Callable[[], Awaitable[None]]:
    """Returns a coroutine function that fetches and checks the tensor over gRPC."""
    deserialize = frame_deserializer(pb.EncodePromptResponse)
    call = open_channel(address).unary_stream(METHOD, response_deserializer=deserialize)

    async def fetch() -> None:
        reader = FrameReader("tensor", limit_bytes=byte_count)
        async for response in call(b""):
            reader.add(response.prompt_embedding)
        reader.require_finished()

    return fetch


async def measure(paths: dict[str, Callable[[], Awaitable[None]]], rounds: int) -> dict[str, float]:
    """Returns each path's median in milliseconds; the paths take turns, two unmeasured rounds first."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 2):
        for name, fetch in paths.items():
            started_at = time.perf_counter()
            await fetch()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started_at)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


async def compare(byte_count: int, rounds: int, addresses: tuple[str, str], raw_port: int) -> bool:
    """Measures, prints the table and returns whether the limits hold."""
    paths = {
        "raw socket": raw_path(raw_port, byte_count),
        "one hop": hop_path(addresses[0], byte_count),
        "two hops, cut-through": hop_path(addresses[1], byte_count),
    }
    medians = await measure(paths, rounds)
    raw, one, two = medians.values()
    print(f"{byte_count / 2**20:g} MiB, median of {rounds}, {os.cpu_count()} cores, {platform.machine()}")
    for name, milliseconds in medians.items():
        print(f"  {name:<22} {milliseconds:7.2f} ms")
    print(f"one hop / raw socket:  {one / raw:.2f}  (bar {ONE_HOP_BAR})")
    print(f"two hops / one hop:    {two / one:.2f}  (bar {TWO_HOPS_BAR})")
    if (os.cpu_count() or 1) < PROCESS_COUNT:
        print(
            f"  {PROCESS_COUNT} processes share fewer cores: two hops cost what all three compute, one after another"
        )
    return one / raw <= ONE_HOP_BAR and two / one <= TWO_HOPS_BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--mebibytes", type=int, default=8, help="size of the tensor")
    parser.add_argument("--rounds", type=int, default=25, help="measured fetches of each path")
    parser.add_argument(
        "--stock-allocator", action="store_true", help="without the servers' settings of the C allocator"
    )
    parser.add_argument("--source", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--relay", metavar="TARGET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    byte_count = arguments.mebibytes << 20
    if not arguments.stock_allocator:
        keep_large_blocks()
    if arguments.source:
        source = Source(byte_count)
        threading.Thread(target=source.serve_socket, args=(arguments.source,), daemon=True).start()
        asyncio.run(serve(source))
        return 0
    if arguments.relay:
        asyncio.run(serve(Relay(arguments.relay)))
        return 0
    with socket.create_server(("127.0.0.1", 0)) as probe:
        raw_port = probe.getsockname()[1]
    with ExitStack() as stack:
        shared = [f"--mebibytes={arguments.mebibytes}"]
        shared += ["--stock-allocator"] * arguments.stock_allocator
        source_address = stack.enter_context(other_process(f"--source={raw_port}", *shared))
        relay_address = stack.enter_context(other_process(f"--relay={source_address}", *shared))
        addresses = (source_address, relay_address)
        is_within = asyncio.run(compare(byte_count, arguments.rounds, addresses, raw_port))
    return int(arguments.check and not is_within)


if __name__ == "__main__":
    sys.exit(main())

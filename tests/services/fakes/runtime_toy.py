"""An application without a model: methods of all four shapes whose behavior a test sets."""

from __future__ import annotations

import asyncio

import grpc

from klein_api.v1 import stage_service_pb2, text_encoder_service_pb2, text_encoder_service_pb2_grpc
from klein_services.runtime.stage import STAGE_SERVICE, DescribeStageServicer, Service, worker_load
from klein_services.runtime.worker import Worker

TEXT_ENCODER = "klein_api.v1.TextEncoderService"
ENCODE_PROMPT = f"/{TEXT_ENCODER}/EncodePrompt"
SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Toy(Service, text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Serves EncodePrompt and, as `/toy.Toy/<shape>`, a bytes method of each shape."""

    name = "text-encoder"
    service_names = (TEXT_ENCODER,)
    open_service_names = (STAGE_SERVICE,)
    operations = ("toy",)

    def __init__(self) -> None:
        self.worker = Worker(self.name, queue_limit=2)
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.load_error: Exception | None = None
        self.behavior = _echo
        self.calls = 0
        self.ended: list[str] = []
        self.description = DescribeStageServicer(
            stage=self.name, model="toy", load=lambda: worker_load(self.worker)
        )

    def register(self, server):
        self.description.register(server)
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)
        handlers = {
            "unary_unary": grpc.unary_unary_rpc_method_handler(self._unary),
            "stream_unary": grpc.stream_unary_rpc_method_handler(self._unary),
            "unary_stream": grpc.unary_stream_rpc_method_handler(self._stream),
            "stream_stream": grpc.stream_stream_rpc_method_handler(self._written_stream),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("toy.Toy", handlers),))

    async def load(self):
        await self.may_load.wait()
        if self.load_error:
            raise self.load_error
        facts = stage_service_pb2.TextEncoderFacts(sequence_length=7)
        self.description.loaded(device="cpu", dtype="f32", weights_digest="toy", facts=facts)

    async def drain(self):
        self.description.draining()

    async def close(self):
        self.worker.close()

    def utilization(self):
        return 0.25

    async def EncodePrompt(self, request, context):
        async for value in self._behave(request.prompt, context):
            summary = text_encoder_service_pb2.PromptSummary(token_count=len(value))
            yield text_encoder_service_pb2.EncodePromptResponse(summary=summary)

    async def _unary(self, request, context):
        return b"".join([value async for value in self._behave(request, context)])

    async def _stream(self, request, context):
        async for value in self._behave(request, context):
            yield value

    async def _written_stream(self, request, context):
        async for value in self._behave(request, context):
            await context.write(value)

    async def _behave(self, request, context):
        self.calls += 1
        try:
            async for value in self.behavior(request, context):
                yield value
        finally:
            self.ended.append("ended")


async def _echo(request, context):
    if isinstance(request, str | bytes):
        yield request if isinstance(request, bytes) else request.encode()
    else:
        async for part in request:
            yield part


async def call(channel, shape: str, request: bytes = b"x", **options) -> bytes:
    """Calls the toy's method of a shape with one message and returns the joined answer."""
    multicallable = getattr(channel, shape)(f"/toy.Toy/{shape}")
    argument = iter([request]) if shape.startswith("stream") else request
    started = multicallable(argument, **options)
    if shape.endswith("unary"):
        return await started
    return b"".join([part async for part in started])


async def failure(awaitable) -> grpc.aio.AioRpcError:
    """Returns the error that a call ends with."""
    try:
        await awaitable
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


async def until(condition, seconds: float = 10) -> None:
    """Waits for what has no event to wait for; a condition may be a coroutine function."""
    async with asyncio.timeout(seconds):
        while True:
            value = condition()
            if await value if asyncio.iscoroutine(value) else value:
                return
            await asyncio.sleep(0.005)

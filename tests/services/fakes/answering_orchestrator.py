"""An orchestrator's servicer that only remembers and answers, behind a real gRPC server."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceServicer, add_ImageServiceServicer_to_server
from klein_services.runtime.status import status_of


class Orchestrator(ImageServiceServicer):
    """Remembers what it was asked; answers with what the test put in."""

    def __init__(self) -> None:
        self.specs: list[api.ImageSpec] = []
        self.error: Exception | None = None
        self.blocks = False
        self.last_image_first = False
        self.before_answer: Callable[[], object] = lambda: None
        self.called = threading.Event()
        self.cancelled = threading.Event()
        self.warnings: list[str] = []
        self.models = api.ListModelsResponse()

    def GenerateImage(self, request, context):
        raise NotImplementedError

    def StreamGenerateImage(self, request, context):
        self.specs.append(request.spec)
        self.called.set()
        if self.blocks:
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(30)
            return
        if self.error is not None:
            status = status_of(self.error)
            context.set_trailing_metadata(status.trailing_metadata())
            context.abort(status.code, status.message)
        self.before_answer()
        yield api.StreamGenerateImageResponse(queued=api.GenerationQueued(position=2))
        yield api.StreamGenerateImageResponse(step=api.GenerationStep(step=1, step_count=1))
        indices = range(request.spec.image_count or 1)
        for index in reversed(indices) if self.last_image_first else indices:
            image = api.GeneratedImage(
                index=index, seed=41 + index, width_px=64, height_px=96, data=b"picture %d" % index
            )
            yield api.StreamGenerateImageResponse(image=image)
        summary = api.GenerationSummary(model="fake", prompt_truncated=request.spec.prompt == "long")
        summary.warnings.extend(self.warnings)
        timing = summary.stage_timings.add(stage="denoiser", operation="denoise", call_count=1)
        timing.call_duration.FromMilliseconds(123)
        timing = summary.stage_timings.add(stage="text-encoder", operation="encode-prompt", call_count=1)
        timing.call_duration.FromMilliseconds(7)
        summary.total_duration.FromMilliseconds(1500)
        yield api.StreamGenerateImageResponse(summary=summary)

    def ListModels(self, request, context):
        return self.models


@contextmanager
def serving(
    servicer: ImageServiceServicer, credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_ImageServiceServicer_to_server(servicer, server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()

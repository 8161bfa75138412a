"""The orchestrator as a server."""

from __future__ import annotations

import grpc

from klein_api.v1.image_service_pb2_grpc import add_ImageServiceServicer_to_server
from services.orchestrator.cache import TensorCache
from services.orchestrator.calls import Channels
from services.orchestrator.generation import Generation
from services.orchestrator.routing import RoutingTable
from services.orchestrator.servicer import ImageApi
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.stages import StageDirectory
from services.runtime.application import Application
from services.runtime.channels import IMAGE_MESSAGE_BYTES
from services.runtime.places import Places

SERVICE_NAME = "klein_api.v1.ImageService"


class Orchestrator(Application):
    """Serves ImageService over the stages of a routing table; loads nothing and computes nothing."""

    name = "orchestrator"
    service_names = (SERVICE_NAME,)
    response_bytes = IMAGE_MESSAGE_BYTES

    def __init__(self, settings: OrchestratorSettings, table: RoutingTable) -> None:
        self.request_bytes = settings.limits().request_bytes
        self._channels = Channels()
        self.generation = Generation(
            table=table,
            channels=self._channels,
            directory=StageDirectory(self._channels, settings.describe_ttl_seconds),
            cache=TensorCache(settings.cache_bytes),
            limits=settings.limits(),
            places=Places(settings.queue_limit),
            maximum_seconds=settings.maximum_request_seconds,
            image_metadata=settings.image_metadata,
        )

    def register(self, server: grpc.aio.Server) -> None:
        add_ImageServiceServicer_to_server(ImageApi(self.generation), server)

    async def load(self) -> None:
        """Has nothing to load; stages are asked what they are when they are first needed."""

    async def drain(self) -> None:
        """Has nothing to tell anybody; running requests keep their stage calls."""

    async def close(self) -> None:
        await self._channels.close()

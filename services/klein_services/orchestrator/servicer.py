"""Servicer of the public API, and the application that serves it."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from klein_api.externalscaler.external_scaler_service_pb2_grpc import add_ExternalScalerServicer_to_server
from klein_api.inference.grpc_inference_service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    GenerationSummary,
    ListModelsRequest,
    ListModelsResponse,
    ModelLimits,
    RoutedModel,
    RoutedStage,
    StreamGenerateImageRequest,
)
from klein_api.v1.image_service_pb2_grpc import ImageServiceServicer, add_ImageServiceServicer_to_server
from klein_services.orchestrator import external_scaler, open_inference
from klein_services.orchestrator.authentication import Authentication
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.events import ImageEvent, collected
from klein_services.orchestrator.external_scaler import ExternalScaler
from klein_services.orchestrator.generator import ImageGenerator
from klein_services.orchestrator.idempotency import IDEMPOTENCY_KEY, IdempotentRequests
from klein_services.orchestrator.image_release import ImageRelease
from klein_services.orchestrator.open_inference import OpenInference
from klein_services.orchestrator.request import AdmissionLimits
from klein_services.orchestrator.routing import Route, RoutingTable, StageAddress
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.stage_channels import Channels
from klein_services.orchestrator.stage_directory import StageDirectory, incompatibility
from klein_services.orchestrator.tensor_cache import TensorCache
from klein_services.orchestrator.tokens import Tokens
from klein_services.orchestrator.usage import Usage, UsageLog
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES
from klein_services.runtime.errors import DeadlinePassed
from klein_services.runtime.grpc_quirks import write_response
from klein_services.runtime.metrics import ROUTING_TABLE_LOADS
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage import Service
from klein_services.runtime.tls import CLIENT, CredentialStore

SERVICE_NAME = "klein_api.v1.ImageService"
_log = logging.getLogger("klein.orchestrator")
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Orchestrator(Service):
    """Serves ImageService and KEDA's ExternalScaler over the stages of a routing table; computes nothing."""

    name = "orchestrator"
    service_names: tuple[str, ...] = (SERVICE_NAME, external_scaler.SERVICE_NAME)
    is_public = True
    response_bytes = IMAGE_MESSAGE_BYTES

    def __init__(self, settings: OrchestratorSettings, table: RoutingTable) -> None:
        self.request_bytes = settings.limits().request_bytes
        if settings.oip:
            self.service_names = (*type(self).service_names, open_inference.SERVICE_NAME)
        self.reload = self.reload_table if settings.routing_table else None
        self._settings = settings
        if problems := list(settings.stage_tls_problems()):
            raise SettingsError("\n".join(problems))
        self._credentials: CredentialStore | None = None
        if settings.stage_tls_ca:
            self._credentials = CredentialStore(
                settings.stage_tls_files, self.name, CLIENT, settings.tls_reload_seconds
            )
        self._channels = Channels(self._credentials, settings.stage_tls_name, settings.dns_interval_seconds)
        backlog = Backlog()
        self.generator = ImageGenerator(
            table=table,
            channels=self._channels,
            directory=StageDirectory(
                self._channels, settings.describe_ttl_seconds, settings.stage_wait_seconds, backlog
            ),
            cache=TensorCache(settings.cache_bytes),
            limits=settings.limits(),
            slots=ConcurrencyLimit(settings.queue_limit, self.name),
            maximum_seconds=settings.maximum_request_seconds,
            image_metadata=settings.image_metadata,
            backlog=backlog,
            log_prompts=settings.log_prompts,
            usage=Usage(UsageLog(settings.usage_log) if settings.usage_log else None),
            release=ImageRelease(
                settings.content_policy(self._credentials), settings.signer(), settings.image_metadata
            ),
            resume_bytes=settings.resume_bytes,
        )
        self._scaler = ExternalScaler(self.generator, settings.scaler_settle_seconds)
        for outcome in ("loaded", "refused"):
            ROUTING_TABLE_LOADS.labels(outcome)
        self._authentication = (
            Authentication(Path(settings.tokens_file), self._on_tokens) if settings.tokens_file else None
        )
        self.guard = self._authentication

    def _on_tokens(self, tokens: Tokens) -> None:
        self.generator.usage.set_tenants(tokens.names)
        self.generator.quotas.forget_all_but(tokens.names)
        if unrouted := tokens.models - self.generator.table.routes.keys():
            _log.warning(
                "the tokens file names models without a row in the routing table: %s",
                ", ".join(sorted(unrouted)),
            )

    def register(self, server: grpc.aio.Server) -> None:
        idempotent = IdempotentRequests(
            self._settings.idempotency_seconds, self._settings.idempotency_bytes, self.generator.slots
        )
        add_ImageServiceServicer_to_server(ImageApi(self.generator, idempotent), server)
        add_ExternalScalerServicer_to_server(self._scaler, server)
        if self._settings.oip:
            add_GRPCInferenceServiceServicer_to_server(OpenInference(self.generator, idempotent), server)

    async def load(self) -> None:
        """Follows the files of tokens and TLS; stages are asked for their descriptions when they are first needed."""
        if self._authentication is not None:
            self._authentication.start()
        if self._credentials is not None:
            self._credentials.start()
        self.generator.release.start()

    async def reload_table(self) -> None:
        """Reads the routing table again. One that cannot be used changes nothing."""
        try:
            table = await asyncio.to_thread(self._settings.table)
            if problems := list(self._settings.table_problems(table)):
                raise SettingsError("; ".join(problems))
        except SettingsError as error:
            ROUTING_TABLE_LOADS.labels("refused").inc()
            _log.error("the routing table was not loaded, the one before stays: %s", error)
            return
        self.generator.use(table)
        ROUTING_TABLE_LOADS.labels("loaded").inc()
        _log.info("the routing table was loaded", extra={"models": sorted(table.routes)})

    async def drain(self) -> None:
        """Ends what KEDA watches; running requests keep their stage calls."""
        self._scaler.drain()

    async def close(self) -> None:
        if self._authentication is not None:
            await self._authentication.close()
        if self.generator.usage.log is not None:
            await asyncio.to_thread(self.generator.usage.log.close)
        await self._channels.close()
        await self.generator.release.close()
        if self._credentials is not None:
            self._credentials.stop()


class ImageApi(ImageServiceServicer):
    """Handlers of ImageService; all images come from one `ImageGenerator`."""

    def __init__(self, generator: ImageGenerator, idempotent: IdempotentRequests) -> None:
        self._generator = generator
        self._idempotent = idempotent

    async def GenerateImage(self, request: GenerateImageRequest, context: _Context) -> Any:
        """Collects the images and the summary of the stream into one serialized response."""
        images: list[ImageEvent] = []
        summary = GenerationSummary()
        events = self._idempotent.events(
            _idempotency_key(context),
            request,
            lambda: self._generator.events(
                request.spec, remaining_seconds=context.time_remaining(), reports_progress=False
            ),
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, ImageEvent):
                    images.append(event)
                elif event.HasField("summary"):
                    summary = event.summary
        return collected(images, summary)

    async def StreamGenerateImage(  # type: ignore[override]  # stubs foresee generators only
        self, request: StreamGenerateImageRequest, context: _Context
    ) -> None:
        """Passes every event on as it happens, images as serialized bytes.

        Writes the messages itself, because a generator cannot end while its client leaves a message unread: a
        request keeps its slot for `maximum_seconds` at most, whatever its client does.

        Raises:
            DeadlinePassed: the request took longer, or its client did not read.
        """
        events = self._idempotent.events(
            _idempotency_key(context),
            request,
            lambda: self._generator.events(
                request.spec,
                remaining_seconds=context.time_remaining(),
                preview_interval_steps=request.preview_interval_steps,
            ),
        )
        seconds = self._generator.maximum_seconds
        try:
            async with asyncio.timeout(seconds), aclosing(events):
                async for event in events:
                    message = event.streamed() if isinstance(event, ImageEvent) else event
                    await write_response(message, context)
        except TimeoutError:
            raise DeadlinePassed(
                f"the request was not finished and its events not read within {seconds:g} s"
            ) from None

    async def ListModels(self, request: ListModelsRequest, context: _Context) -> ListModelsResponse:
        """Asks every stage of the models that the caller may use anew."""
        generator = self._generator
        return await list_models(
            generator.visible_table(), generator.directory, generator.limits, context.time_remaining()
        )


def _idempotency_key(context: _Context) -> str | None:
    """Returns the client's key for the request, if it sent one."""
    for name, value in context.invocation_metadata() or ():
        if name == IDEMPOTENCY_KEY:
            return str(value)
    return None


async def list_models(
    table: RoutingTable,
    directory: StageDirectory,
    limits: AdmissionLimits,
    remaining_seconds: float | None = None,
) -> ListModelsResponse:
    """Asks every stage of the table once and returns what requests may ask for.

    `remaining_seconds` is the time until the client's deadline: half of it is for the stages, so that the response
    reports a stage that does not answer, and reaches the client.
    """
    timeout = math.inf if remaining_seconds is None else remaining_seconds / 2

    async def probe(address: StageAddress) -> RoutedStage:
        description, problem = await directory.probe(address, timeout)
        return RoutedStage(target=address.target, description=description, problem=problem)

    addresses = table.addresses
    stages = dict(zip(addresses, await asyncio.gather(*map(probe, addresses)), strict=True))
    models = [_routed_model(route, stages, limits) for route in table.routes.values()]
    return ListModelsResponse(models=models, default_model=table.default_model)


def _routed_model(
    route: Route, stages: dict[StageAddress, RoutedStage], limits: AdmissionLimits
) -> RoutedModel:
    facts = stages[route.denoiser].description.denoiser
    route = route.narrowed(facts.default_size_px, facts.pixel_count)
    bounds = limits.of(route)
    model = RoutedModel(
        name=route.name,
        distilled=facts.distilled,
        default_step_count=facts.default_step_count,
        default_guidance_scale=facts.default_guidance_scale,
        limits=ModelLimits(
            reference_count=bounds.reference_count,
            reference_bytes=limits.reference_bytes,
            pixel_count=bounds.pixel_count,
            image_count=bounds.image_count,
            step_count=bounds.step_count,
            default_size_px=route.default_size_px,
            adapter_count=bounds.adapter_count,
        ),
        stages=[stages[address] for address in route.stages],
        adapters=facts.adapters,
        description=facts.description,
    )
    if not any(stage.problem for stage in model.stages):
        problem = incompatibility(route, *(stage.description for stage in model.stages))
        for stage in model.stages:
            stage.problem = problem
        model.serving = not problem
    return model

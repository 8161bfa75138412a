"""Directory of the stages behind the routing table: their descriptions, and whether they fit each other."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc

from klein_api.v1.stage_service_pb2 import DescribeStageRequest, DescribeStageResponse
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_services.orchestrator.routing import Route, StageAddress
from klein_services.orchestrator.stage_client import Channels
from klein_services.runtime.errors import StagesLost

_DESCRIBE_TIMEOUT_SECONDS = 5.0
_ATTEMPTS = 3
_BACKOFF_SECONDS = 0.1


@dataclass(frozen=True)
class RouteInfo:
    """The parts of the descriptions of a route's stages that requests depend on."""

    distilled: bool
    default_step_count: int
    default_guidance_scale: float
    text_encoder_version: str
    """Everything but the prompt that determines the bytes of a prompt embedding."""
    vae_decoder_version: str
    """Everything but the image file that determines the bytes of reference latents."""
    default_size_px: int
    """Width and height that the model was trained for; 0 when unknown."""
    pixel_count: int
    """Most pixels of one image that the model was trained for; 0 when unknown."""
    subject_words: tuple[str, ...]
    """Words or phrases of which a prompt must contain one; empty when the model understands any prompt."""

    def accepts_same_requests(self, other: RouteInfo) -> bool:
        """Returns whether a request that was validated for `other` is valid here and means the same."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in (
                "distilled",
                "default_step_count",
                "default_guidance_scale",
                "default_size_px",
                "pixel_count",
            )
        )


@dataclass(frozen=True)
class _Known:
    fresh_until: float
    description: DescribeStageResponse


class StageDirectory:
    """Descriptions of stages, kept for `ttl_seconds` and asked for again after a failure.

    Only a description of a stage that serves is kept: one that loads may serve a moment later.
    """

    def __init__(self, channels: Channels, ttl_seconds: float) -> None:
        self._channels = channels
        self._ttl_seconds = ttl_seconds
        self._known: dict[StageAddress, _Known] = {}

    async def describe_route(self, route: Route, timeout_seconds: float) -> RouteInfo:
        """Returns what requests for `route` depend on. Asks only the stages without a fresh description.

        Raises:
            StagesLost: a stage does not answer, does not serve, is another stage, serves another model
                than the table says, or does not fit the others; all such stages are named.
        """
        timeout = min(timeout_seconds, _DESCRIBE_TIMEOUT_SECONDS)
        answers = await asyncio.gather(*(self._description(address, timeout) for address in route.stages))
        if problems := [answer for answer in answers if isinstance(answer, str)]:
            raise StagesLost("; ".join(problems))
        text_encoder, denoiser, vae_decoder = (answer for answer in answers if not isinstance(answer, str))
        if problem := incompatibility(route, text_encoder, denoiser, vae_decoder):
            self.forget(route)
            raise StagesLost(problem)
        facts = denoiser.denoiser
        return RouteInfo(
            distilled=facts.distilled,
            default_step_count=facts.default_step_count,
            default_guidance_scale=facts.default_guidance_scale,
            text_encoder_version=_version(route.text_encoder, text_encoder),
            vae_decoder_version=_version(route.vae_decoder, vae_decoder),
            default_size_px=facts.default_size_px,
            pixel_count=facts.pixel_count,
            subject_words=tuple(facts.subject_words),
        )

    def forget(self, route: Route) -> None:
        """Makes the next request ask the route's stages again."""
        for address in route.stages:
            self._known.pop(address, None)

    async def probe(
        self, address: StageAddress, timeout_seconds: float
    ) -> tuple[DescribeStageResponse | None, str]:
        """Asks a stage now. Returns its description, `None` without an answer, and its problem, empty without one.

        Asks a replica that serves, so that a loading one next to it is no problem; any replica, if none serves.
        """
        timeout = min(timeout_seconds, _DESCRIBE_TIMEOUT_SECONDS) / 2
        description, problem = await self._describe(address, self._channels.serving(address), timeout)
        if problem:
            description, problem = await self._describe(address, self._channels.any(address), timeout)
        return description, problem

    async def _description(
        self, address: StageAddress, timeout_seconds: float
    ) -> DescribeStageResponse | str:
        """Returns a stage's description, or its problem. Without a fresh one, asks until the stage serves."""
        known = self._known.get(address)
        if known is not None and time.monotonic() < known.fresh_until:
            return known.description
        problem = ""
        for attempt in range(_ATTEMPTS):
            await asyncio.sleep(_BACKOFF_SECONDS * attempt)
            description, problem = await self.probe(address, timeout_seconds)
            if description is None:
                break
            if not problem:
                self._known[address] = _Known(time.monotonic() + self._ttl_seconds, description)
                return description
        return problem

    async def _describe(
        self, address: StageAddress, channel: grpc.aio.Channel, timeout_seconds: float
    ) -> tuple[DescribeStageResponse | None, str]:
        try:
            description = await StageServiceStub(channel).DescribeStage(
                DescribeStageRequest(), timeout=timeout_seconds
            )
        except grpc.aio.AioRpcError as error:
            reason = error.details() or error.code().name
            return None, f"{address.stage} at {address.target} does not answer: {reason}"
        place, problem = f"{address.stage} at {address.target}", ""
        if description.stage != address.stage:
            problem = f"is a {description.stage or 'nameless stage'}, not a {address.stage}"
        elif description.model != address.model:
            problem = f"serves the model {description.model!r}; the routing table says {address.model!r}"
        elif not description.serving:
            problem = "is loading or draining"
        elif description.WhichOneof("facts") != address.stage.replace("-", "_"):
            problem = "serves but does not describe its model"
        return description, problem and f"{place} {problem}"


def _version(address: StageAddress, description: DescribeStageResponse) -> str:
    """Returns what determines a stage's responses besides the request, its element type included.

    The target is part of it: two pools may give two checkpoints the same name.
    """
    lasting = DescribeStageResponse()
    lasting.CopyFrom(description)
    lasting.ClearField("load")
    lasting.ClearField("device")
    return f"{address.target}\n{lasting.SerializeToString(deterministic=True).hex()}"


def incompatibility(
    route: Route,
    text_encoder: DescribeStageResponse,
    denoiser: DescribeStageResponse,
    vae_decoder: DescribeStageResponse,
) -> str:
    """Returns why a route's stages do not fit each other; empty when they do.

    Element types do not matter: each stage casts what it receives.
    """
    made = text_encoder.text_encoder.embedding_channels
    taken = denoiser.denoiser.embedding_channels
    if made != taken:
        return (
            f"{_named(route.text_encoder)} makes prompt embeddings of {made} channels; "
            f"{_named(route.denoiser)} takes {taken}"
        )
    decoded = vae_decoder.vae_decoder.latent_channels
    made = denoiser.denoiser.latent_channels
    if made != decoded:
        return (
            f"{_named(route.denoiser)} makes latents of {made} channels; "
            f"{_named(route.vae_decoder)} takes {decoded}"
        )
    return ""


def _named(address: StageAddress) -> str:
    return f"{address.stage} at {address.target} ({address.model!r})"

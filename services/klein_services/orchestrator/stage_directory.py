"""Directory of the stages behind the routing table: their descriptions, and whether they fit each other."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from klein_api.v1.stage_service_pb2 import DescribeStageRequest, DescribeStageResponse
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.routing import Route, StageAddress
from klein_services.orchestrator.stage_channels import Channels
from klein_services.runtime.checksums import with_checksum, without_checksum
from klein_services.runtime.errors import DeadlinePassed, StagesLost

_DESCRIBE_STAGE = "/klein_api.v1.StageService/DescribeStage"
_DESCRIBE_TIMEOUT_SECONDS = 5.0
_NO_ANSWER = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
)
"""Codes of a stage that is away or refuses the orchestrator; others stand for damaged bytes or another server."""
_ATTEMPTS = 3
"""Questions to a stage that answers but does not serve, however short the wait."""
_PAUSE_SECONDS = 0.2


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
    denoiser_version: str
    """Everything but the request that determines the bytes of latents."""
    latent_channels: int
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

    def makes_same_latents(self, other: RouteInfo) -> bool:
        """Returns whether latents that the route's stages made as `other` may be mixed with those made now."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("text_encoder_version", "vae_decoder_version", "denoiser_version")
        )


@dataclass(frozen=True)
class _Known:
    fresh_until: float
    description: DescribeStageResponse


@dataclass(frozen=True)
class _Answer:
    """A stage's answer to DescribeStage."""

    description: DescribeStageResponse | None
    """`None` without an answer."""
    problem: str = ""
    """Why the stage cannot be used; empty when it serves."""
    is_lasting: bool = False
    """Whether the problem stays until someone changes the deployment."""


class StageDirectory:
    """Descriptions of stages, kept for `ttl_seconds` and asked for again after a failure.

    Only a description of a stage that serves is kept: one that loads may serve a moment later.

    Args:
        channels: channels to the stages.
        ttl_seconds: time for which a description is kept.
        wait_seconds: time for which a request waits for a stage that does not answer, loads or drains.
        backlog: where such requests count while they wait.
    """

    def __init__(
        self,
        channels: Channels,
        ttl_seconds: float,
        wait_seconds: float = 0.0,
        backlog: Backlog | None = None,
    ) -> None:
        self._channels = channels
        self._backlog = backlog or Backlog()
        self._ttl_seconds = ttl_seconds
        self.wait_seconds = wait_seconds
        self._known: dict[StageAddress, _Known] = {}
        self._asking: dict[StageAddress, asyncio.Task[_Answer]] = {}

    async def describe_route(self, route: Route, timeout_seconds: float) -> RouteInfo:
        """Returns what requests for `route` depend on. Asks only the stages without a fresh description.

        Waits for stages that do not answer or do not serve, `timeout_seconds` and the directory's wait at most.

        Raises:
            StagesLost: a stage does not answer, does not serve, is another stage, serves another model
                than the table says, or does not fit the others; all such stages are named.
            DeadlinePassed: `timeout_seconds` passed while a stage was waited for.
        """
        answers = await asyncio.gather(
            *(self._description(address, timeout_seconds) for address in route.stages)
        )
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
            denoiser_version=_denoiser_version(route.denoiser, denoiser),
            latent_channels=facts.latent_channels,
            default_size_px=facts.default_size_px,
            pixel_count=facts.pixel_count,
            subject_words=tuple(facts.subject_words),
        )

    def forget(self, route: Route) -> None:
        """Makes the next request ask the route's stages again."""
        for address in route.stages:
            self._known.pop(address, None)

    def retain(self, addresses: Iterable[StageAddress]) -> None:
        """Forgets the descriptions of all other stages."""
        kept = frozenset(addresses)
        self._known = {address: known for address, known in self._known.items() if address in kept}

    async def probe(
        self, address: StageAddress, timeout_seconds: float
    ) -> tuple[DescribeStageResponse | None, str]:
        """Asks a stage now. Returns its description, `None` without an answer, and its problem, empty without one.

        Asks a replica that serves, so that a loading one next to it is no problem; any replica, if none serves.
        """
        answer = await self._ask(address, min(timeout_seconds, _DESCRIBE_TIMEOUT_SECONDS))
        return answer.description, answer.problem

    async def _description(
        self, address: StageAddress, timeout_seconds: float
    ) -> DescribeStageResponse | str:
        """Returns a stage's description, or its problem. Without a fresh one, asks until the stage serves."""
        known = self._known.get(address)
        if known is not None and time.monotonic() < known.fresh_until:
            return known.description
        waits_until = time.monotonic() + self.wait_seconds
        problem = f"{address.stage} at {address.target} does not answer"
        try:
            with self._backlog.expected(address):
                async with asyncio.timeout(timeout_seconds):
                    for attempt in itertools.count(1):
                        answer = await self._shared_answer(address)
                        if answer.description is not None and not answer.problem:
                            fresh_until = time.monotonic() + self._ttl_seconds
                            self._known[address] = _Known(fresh_until, answer.description)
                            return answer.description
                        problem = answer.problem
                        has_tried_enough = answer.description is None or attempt >= _ATTEMPTS
                        if answer.is_lasting or (has_tried_enough and time.monotonic() >= waits_until):
                            break
                        await asyncio.sleep(_PAUSE_SECONDS)
        except TimeoutError:
            raise DeadlinePassed(problem) from None
        return problem

    async def _shared_answer(self, address: StageAddress) -> _Answer:
        """Asks a stage now; requests that ask at once share the answer."""
        task = self._asking.get(address)
        if task is None:
            task = asyncio.create_task(self._ask(address, _DESCRIBE_TIMEOUT_SECONDS))
            self._asking[address] = task
            task.add_done_callback(lambda _: self._asking.pop(address))
        # The others still wait for it when one of them is cancelled.
        return await asyncio.shield(task)

    async def _ask(self, address: StageAddress, timeout_seconds: float) -> _Answer:
        with self._channels.used(address):
            answer = await self._describe(address, self._channels.serving(address), timeout_seconds / 2)
            if answer.problem:
                answer = await self._describe(address, self._channels.any(address), timeout_seconds / 2)
                if not answer.problem:
                    # The other channel has another state of its replicas' health than they themselves, such as after
                    # damage to the one message that would have changed it.
                    self._channels.reconnect(address, is_damaged=False)
        return answer

    async def _describe(
        self, address: StageAddress, channel: grpc.aio.Channel, timeout_seconds: float
    ) -> _Answer:
        place = f"{address.stage} at {address.target}"
        try:
            ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_DESCRIBE_STAGE)
            call = ask(with_checksum(DescribeStageRequest().SerializeToString()), timeout=timeout_seconds)
            self._channels.called(channel, call)
            description = DescribeStageResponse.FromString(without_checksum(await call))
        except DecodeError as error:
            self._channels.reconnect(address)
            return _Answer(None, f"{place} sent a damaged message: {error}")
        except grpc.aio.AioRpcError as error:
            if error.code() not in _NO_ANSWER:
                self._channels.reconnect(address)
            return _Answer(None, f"{place} does not answer: {error.details() or error.code().name}")
        if description.stage != address.stage:
            problem = f"is a {description.stage or 'nameless stage'}, not a {address.stage}"
        elif description.model != address.model:
            problem = f"serves the model {description.model!r}; the routing table says {address.model!r}"
        elif not description.serving:
            return _Answer(description, f"{place} is loading or draining")
        elif description.WhichOneof("facts") != address.stage.replace("-", "_"):
            problem = "serves but does not describe its model"
        else:
            return _Answer(description)
        return _Answer(description, f"{place} {problem}", is_lasting=True)


def _version(address: StageAddress, description: DescribeStageResponse) -> str:
    """Returns what determines a stage's responses besides the request, its element type included.

    The target is part of it: two pools may give two checkpoints the same name.
    """
    lasting = DescribeStageResponse()
    lasting.CopyFrom(description)
    lasting.ClearField("load")
    lasting.ClearField("device")
    return f"{address.target}\n{lasting.SerializeToString(deterministic=True).hex()}"


def _denoiser_version(address: StageAddress, description: DescribeStageResponse) -> str:
    """Returns what determines a denoiser's latents besides the request; adapters come and go without a restart."""
    return f"{address.target}\n{description.version} {description.weights_digest} {description.dtype}"


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

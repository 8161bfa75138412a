"""One request in progress: its attempts, which go on where a lost stage left it, and its summary."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from klein_api.v1.image_service_pb2 import GenerationSummary, StreamGenerateImageResponse
from klein_services.orchestrator.attempt import Attempt
from klein_services.orchestrator.checkpoint_pace import CheckpointPace
from klein_services.orchestrator.events import EventQueue
from klein_services.orchestrator.progress import GenerationOptions, Progress
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER
from klein_services.orchestrator.stage_client import StageClient, StageDisagreement, StageFull
from klein_services.orchestrator.stage_directory import StageDirectory
from klein_services.orchestrator.tensor_cache import TensorCache
from klein_services.runtime.errors import StagesLost
from klein_services.runtime.logs import request_id
from klein_services.runtime.metrics import REQUEST_RECOVERIES
from klein_services.runtime.stage import duration

_DEVICES_LOST = 2
"""Attempts after which a request during whose steps devices fail is not tried again: it may be the cause."""
_DENOISERS_LOST = 3
"""The same for denoisers that vanish during a request's steps without progress."""
_FRUITLESS_ATTEMPTS = 8
"""Most attempts in a row without progress."""
_DAMAGED_ATTEMPTS = 12
"""The same after damage to messages, which may hit one attempt after the other."""
_ASKS = 3
"""Attempts of a request of which nothing was computed, at stages of several replicas of which one has no room."""
_FULL_PAUSE_SECONDS = (0.1, 1.0)
"""Bounds of the wait for a stage without room that a request needs which was computed in part."""
_ATTEMPT_SECONDS = 5.0
"""Most time of one attempt that counts as time without progress."""
_PAUSE_SECONDS = 0.1
_log = logging.getLogger("klein.orchestrator")


class Losses:
    """Decides whether a request that has lost a stage is tried again.

    Args:
        wait_seconds: time without progress after which it is not, but for a second attempt.
    """

    def __init__(self, wait_seconds: float) -> None:
        self._wait_seconds = wait_seconds
        self._noted_at = time.monotonic()
        self._fruitless_seconds = 0.0
        self._attempts = 0
        self._damages = 0
        self._devices = 0
        self._denoisers = 0
        self._asks = 0

    def may_ask_again(self, refusal: StageFull, *, was_computed: bool, made_progress: bool) -> bool:
        """Counts a refusal and returns whether another attempt may find room, which is looked for elsewhere at once.

        A request of which a part was computed is too dear to be refused, so that it waits for room.

        Args:
            refusal: the failure of the attempt.
            was_computed: whether the request has a checkpoint or an image.
            made_progress: whether the attempt completed one.
        """
        self._note_time(made_progress=made_progress)
        self._asks += 1
        if was_computed:
            return self._fruitless_seconds < self._wait_seconds
        return self._asks < _ASKS and refusal.address.may_have_replicas

    def may_retry(
        self, loss: StagesLost | StageDisagreement, *, made_progress: bool, was_computing: bool
    ) -> bool:
        """Counts a loss and returns whether another attempt may succeed.

        Args:
            loss: the failure of the attempt.
            made_progress: whether the attempt completed a checkpoint or an image.
            was_computing: whether the denoiser was running the request's steps.
        """
        self._note_time(made_progress=made_progress)
        if made_progress:
            self._attempts = self._damages = self._denoisers = 0
        if isinstance(loss, StagesLost):
            self._attempts += 1
            self._devices += loss.has_lost_device
            self._denoisers += was_computing and loss.stage == DENOISER
        else:
            self._damages += 1
        if self._devices >= _DEVICES_LOST or self._denoisers >= _DENOISERS_LOST:
            return False
        if self._fruitless_seconds >= self._wait_seconds:
            return self._attempts + self._damages < 2
        return self._attempts < _FRUITLESS_ATTEMPTS and self._damages < _DAMAGED_ATTEMPTS

    def _note_time(self, *, made_progress: bool) -> None:
        """Adds the time of an attempt, but not all of a long one: it computed, or waited in vain for lost bytes."""
        now = time.monotonic()
        spent = min(now - self._noted_at, _ATTEMPT_SECONDS)
        self._fruitless_seconds = 0.0 if made_progress else self._fruitless_seconds + spent
        self._noted_at = now

    @property
    def pause_seconds(self) -> float:
        """Time before the next attempt."""
        return _PAUSE_SECONDS * (self._attempts + self._damages - 1)


class Generation:
    """Makes the images of one request.

    Args:
        request: the validated request.
        stages: makes the stage calls.
        directory: describes the request's stages anew when one is lost.
        cache: tensors that need not be computed again.
        events: takes each event for the client, once there is room for it.
        options: contents of events and files.
        pace: decides how often checkpoints are asked for.
    """

    def __init__(
        self,
        request: ImageRequest,
        stages: StageClient,
        directory: StageDirectory,
        cache: TensorCache,
        events: EventQueue,
        options: GenerationOptions,
        pace: CheckpointPace,
    ) -> None:
        self._request = request
        self._stages = stages
        self._directory = directory
        self._cache = cache
        self._events = events
        self._options = options
        self._pace = pace
        self.progress = Progress(request.params, request.size_is_known)
        self._losses = Losses(directory.wait_seconds)

    async def run(self) -> None:
        """Makes the images. When a stage is lost, goes on with another replica, from the last checkpoint on.

        Images that the client has got are not sent again, and steps are reported once.

        Raises:
            StagesLost: a stage cannot be used, after all attempts.
            InvalidInput: a reference, the initial image or the mask cannot be used, or the size that it gives.
            PeerFailure: a stage failed in another way.
            StageFull: a stage has no room.
            StageDisagreement: a stage broke the protocol, after all attempts.
            ContentDenied, ContentPolicyFailed, SigningFailed: an image may not be sent.
        """
        while True:
            marks = self.progress.marks
            self.progress.is_computing = False
            attempt = Attempt(
                self._request,
                self.progress,
                self._stages,
                self._cache,
                self._events,
                self._options,
                self._pace,
            )
            try:
                await attempt.run()
                break
            except StageFull as refusal:
                was_computed = self.progress.marks > 0
                made_progress = self.progress.marks > marks
                if not self._losses.may_ask_again(
                    refusal, was_computed=was_computed, made_progress=made_progress
                ):
                    raise
                if was_computed:
                    shortest, longest = _FULL_PAUSE_SECONDS
                    await asyncio.sleep(min(max(refusal.retry_after_seconds, shortest), longest))
                continue
            except (StagesLost, StageDisagreement) as loss:
                self._directory.forget(self._request.route)
                if not self._losses.may_retry(
                    loss,
                    made_progress=self.progress.marks > marks,
                    was_computing=self.progress.is_computing,
                ):
                    raise
                _log.warning("a stage was lost; the request goes on: %s", loss)
                if isinstance(loss, StageDisagreement):
                    # Which of the connections damages bytes is not known: tensors are checked where they end.
                    for address in self._request.route.stages:
                        self._stages.channels.reconnect(address)
                stage = loss.stage if isinstance(loss, StagesLost) else ""
                REQUEST_RECOVERIES.labels(stage or "unknown").inc()
            await asyncio.sleep(self._losses.pause_seconds)
            await self._describe_stages_again()
        await self._events.put(StreamGenerateImageResponse(summary=self._summary()))

    async def _describe_stages_again(self) -> None:
        """Adapts the request to the stages that are there now, which may have other weights than before."""
        request, progress = self._request, self.progress
        info = await self._directory.describe_route(request.route, self._stages.deadline.remaining_seconds())
        if not info.makes_same_latents(request.info):
            progress.saved.clear()
        if not info.accepts_same_requests(request.info) or (
            progress.delivered and not info.makes_same_latents(request.info)
        ):
            name = request.route.name
            raise StagesLost(f"another model took the place of {name!r} meanwhile; ask again")
        self._request = replace(request, info=info)

    def _summary(self) -> GenerationSummary:
        progress = self.progress
        return GenerationSummary(
            request_id=request_id.get(),
            model=self._request.route.name,
            flow=self._request.flow,
            prompt_token_count=progress.prompt.token_count,
            prompt_truncated=progress.prompt.truncated,
            input_megapixels=progress.input_pixel_count / 1e6,
            output_megapixels=progress.output_pixel_count / 1e6,
            step_count=progress.params.steps,
            guidance_scale=progress.params.guidance,
            stage_timings=progress.timings.messages(),
            total_duration=duration(time.perf_counter() - self._options.arrived_at),
            warnings=[*self._request.warnings, *self._options.warnings],
        )

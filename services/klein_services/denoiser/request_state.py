"""RequestState: a request's tensors and trajectories, and the events that its steps post."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.sampler import Trajectory
from klein_services.denoiser.events import Checkpoint, EventChannel, Finished, Preview, StepDone
from klein_services.denoiser.scheduled_request import CacheSpec, ScheduledRequest
from klein_services.runtime.tensors import host_tensor

Step = Callable[[Sequence[Trajectory]], None]
"""Advances every trajectory by one step; returns when the device has finished."""
CacheReferences = Callable[[Sequence[Tensor], tuple[ScaledAdapter, ...]], ReferenceCache]
"""Computes the keys and values of references under some adapters; returns when the device has finished."""


@dataclass(eq=False, kw_only=True)
class RequestState:
    """One request's tensors on the device, what they cost, and which events the client asked for."""

    trajectories: list[Trajectory]
    """One per image. A paused request needs nothing else to go on."""
    image_tokens: int
    """Tokens of one step of one image: text, target and references, twice with guidance."""
    memory_bytes: int = 0
    """Bytes of all tensors."""
    cache: CacheSpec | None = None
    """Reference cache that the trajectories get before their first step, for models that cache references."""
    cached_references: tuple[Tensor, ...] = ()
    """References that `cache` is computed from: (rows, columns, latent channels) each."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Adapters of the trajectories, and of the cache."""
    preview_interval_steps: int = 0
    """Steps from one preview to the next; 0 posts none."""
    checkpoint_interval_steps: int = 0
    """Steps from one checkpoint to the next; 0 posts none."""


def post_progress(request: ScheduledRequest, state: RequestState, channel: EventChannel) -> None:
    """Posts the step that all images have just done, with a preview and a checkpoint when they are due."""
    step = request.steps_done
    channel.post(StepDone(step))
    if state.preview_interval_steps and step % state.preview_interval_steps == 0:
        channel.post(Preview(step, host_tensor(state.trajectories[0].preview())))
    if state.checkpoint_interval_steps and step % state.checkpoint_interval_steps == 0:
        latents = tuple(host_tensor(trajectory.latents) for trajectory in state.trajectories)
        channel.post(Checkpoint(step, latents))


def post_result(request: ScheduledRequest, state: RequestState, channel: EventChannel, now: float) -> None:
    """Posts the last step, then the final latents and the times that they took."""
    channel.post(StepDone(request.step_count))
    started_at = request.admitted_at if request.started_at is None else request.started_at
    latents = tuple(host_tensor(trajectory.latents) for trajectory in state.trajectories)
    queue_seconds, compute_seconds = started_at - request.admitted_at, now - started_at
    channel.post(Finished(latents, queue_seconds, compute_seconds, request.spent_seconds))

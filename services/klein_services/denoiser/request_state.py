"""What a request brings to the step loop, and what the loop asks of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.sampler import Trajectory
from klein_services.denoiser.events import Checkpoint, EventChannel, Finished, Preview, StepDone
from klein_services.denoiser.job import Job
from klein_services.runtime.tensors import host_tensor

Step = Callable[[Sequence[Trajectory]], None]
"""Does one step of every trajectory and returns when the device is done."""
CacheReferences = Callable[[Sequence[Tensor], tuple[ScaledAdapter, ...]], ReferenceCache]
"""Computes what images with some adapters attend to of their references, and returns when the device is done."""


@dataclass(eq=False, kw_only=True)
class Run:
    """A request's tensors and wishes."""

    trajectories: list[Trajectory]
    """One for each image; their state is all that a paused request needs."""
    cached_references: tuple[Tensor, ...] = ()
    """References whose cache the trajectories get before their first step, where the model takes them so."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Those of the trajectories."""
    preview_interval_steps: int = 0
    checkpoint_interval_steps: int = 0


def tell_progress(job: Job, run: Run, outbox: EventChannel) -> None:
    """Tells the step that all images have done, with a preview and a checkpoint where they are wanted."""
    step = job.steps_done
    outbox.post(StepDone(step))
    if run.preview_interval_steps and step % run.preview_interval_steps == 0:
        outbox.post(Preview(step, host_tensor(run.trajectories[0].preview())))
    if run.checkpoint_interval_steps and step % run.checkpoint_interval_steps == 0:
        latents = tuple(host_tensor(trajectory.latents) for trajectory in run.trajectories)
        outbox.post(Checkpoint(step, latents))


def tell_finished(job: Job, run: Run, outbox: EventChannel, now: float) -> None:
    """Tells the last step, the final latents and what they cost."""
    outbox.post(StepDone(job.spec.step_count))
    started_at = job.admitted_at if job.started_at is None else job.started_at
    latents = tuple(host_tensor(trajectory.latents) for trajectory in run.trajectories)
    outbox.post(Finished(latents, started_at - job.admitted_at, now - started_at))

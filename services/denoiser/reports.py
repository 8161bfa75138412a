"""What a request's caller is told of its steps. Copies tensors to the host, so call it without the engine's lock."""

from __future__ import annotations

from services.denoiser.job import Job
from services.denoiser.outbox import Checkpoint, Finished, Outbox, Preview, StepDone
from services.denoiser.run import Run
from services.runtime.tensors import host_tensor


def tell_progress(job: Job, run: Run, outbox: Outbox) -> None:
    """Tells the step that all images have done, with a preview and a checkpoint where they are wanted."""
    step = job.steps_done
    outbox.post(StepDone(step))
    if run.preview_interval_steps and step % run.preview_interval_steps == 0:
        outbox.post(Preview(step, host_tensor(run.trajectories[0].preview())))
    if run.checkpoint_interval_steps and step % run.checkpoint_interval_steps == 0:
        latents = tuple(host_tensor(trajectory.latents) for trajectory in run.trajectories)
        outbox.post(Checkpoint(step, latents))


def tell_finished(job: Job, run: Run, outbox: Outbox, now: float) -> None:
    """Tells the last step, the final latents and what they cost."""
    outbox.post(StepDone(job.spec.step_count))
    started_at = job.admitted_at if job.started_at is None else job.started_at
    latents = tuple(host_tensor(trajectory.latents) for trajectory in run.trajectories)
    outbox.post(Finished(latents, started_at - job.admitted_at, now - started_at))

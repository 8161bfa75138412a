"""Progress of one request over its attempts, and the options that hold for all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from klein_api.v1.text_encoder_service_pb2 import PromptSummary
from klein_core.params import GenerationParams
from klein_services.orchestrator.image_release import ImageRelease
from klein_services.orchestrator.saved_latents import SavedLatents
from klein_services.orchestrator.timings import Timings


@dataclass(frozen=True)
class GenerationOptions:
    """Contents of a request's events and image files, and what is kept to resume it."""

    reports_progress: bool = True
    """Whether queue positions and steps become events."""
    image_metadata: bool = True
    """Whether the seed, model and steps are stored in the image files."""
    release: ImageRelease = field(default_factory=ImageRelease)
    """Passed by every image before the client gets it."""
    warnings: tuple[str, ...] = ()
    """Sentences for the client besides those of the request."""
    arrived_at: float = field(default_factory=time.perf_counter)
    """Reading of `time.perf_counter()` when the request came."""
    resume_bytes: int = 0
    """Most bytes of latents kept to resume the request; 0 keeps none."""


@dataclass
class Progress:
    """Results of a request so far, shared by its attempts."""

    params: GenerationParams
    """With the size of the images once an input image has given it."""
    size_is_known: bool
    timings: Timings = field(default_factory=Timings)
    saved: SavedLatents = field(default_factory=SavedLatents)
    delivered: set[int] = field(default_factory=set)
    """Images that the client has got."""
    reported_step: int = 0
    """The last step that became an event."""
    marks: int = 0
    """Checkpoints and images that were completed: a larger number than before means progress."""
    is_computing: bool = False
    """Whether the denoiser had begun this attempt's steps and not ended them."""
    prompt: PromptSummary = field(default_factory=PromptSummary)
    input_pixel_count: int = 0
    """Pixels of the initial image and the references that are encoded."""
    has_denoised: bool = False
    """Whether a denoiser was asked for the images."""
    output_pixel_count: int = 0

    @property
    def asked_pixel_count(self) -> int:
        """Pixels that the stages were asked for so far: of the input images, and of all images once denoising began."""
        output = self.params.width_px * self.params.height_px * len(self.params.seeds)
        return self.input_pixel_count + (output if self.has_denoised else 0)

    @property
    def undelivered(self) -> list[int]:
        """Images that are still to be sent to the client, by index."""
        return [image for image in range(len(self.params.seeds)) if image not in self.delivered]

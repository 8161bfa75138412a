"""Nodes of ComfyUI that compute at a suite or at its stages. torch is ComfyUI's own and imported by the calls."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from klein_client.client import Client
from klein_client.request import ImageOptions
from klein_client.results import Image, Preview, Step
from klein_client.stages import TextEncoder, VaeDecoder

if TYPE_CHECKING:
    import torch

CATEGORY = "klein"
MAXIMUM_SIDE_PX = 4096
PREVIEW_SIDE_PX = 512
"""Longest side of previews as ComfyUI sends them to its page."""


class RemoteTextEncode:
    """Encodes a prompt at a text-encoder."""

    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    FUNCTION = "encode"
    CATEGORY = CATEGORY
    DESCRIPTION = "Encodes a prompt at a text-encoder of a klein suite."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs as ComfyUI asks for them."""
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "target": _target("127.0.0.1:50051", "HOST:PORT of a text-encoder"),
            }
        }

    def encode(self, prompt: str, target: str) -> tuple[list[list[Any]]]:
        """Returns the conditioning: the embedding, (1, sequence length, channels), without a pooled one.

        Raises:
            KleinError: the call failed.
        """
        from klein_client.torch_tensors import to_torch

        with TextEncoder(target) as stage:
            embedding = to_torch(stage.encode(prompt))
        return ([[embedding.unsqueeze(0), {"pooled_output": None}]],)


class RemoteVAEDecode:
    """Decodes FLUX.2's latents at a vae-decoder."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "decode"
    CATEGORY = CATEGORY
    DESCRIPTION = "Decodes latents of FLUX.2 at a vae-decoder of a klein suite."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs as ComfyUI asks for them."""
        return {
            "required": {
                "samples": ("LATENT",),
                "target": _target("127.0.0.1:50053", "HOST:PORT of a vae-decoder"),
            }
        }

    def decode(self, samples: dict[str, Any], target: str) -> tuple[torch.Tensor]:
        """Returns the images, (batch, height, width, 3), 0…1.

        Args:
            samples: packed and normalized, (batch, 128, height / 16, width / 16), as ComfyUI holds FLUX.2's latents.
            target: `HOST:PORT` of a vae-decoder.

        Raises:
            KleinError: a call failed, for example because these are latents of another model.
        """
        from klein_client.torch_tensors import decoded

        with VaeDecoder(target) as stage:
            return (decoded(stage, samples["samples"]) / 255.0,)


class KleinGenerate:
    """Makes images at a suite, with previews and progress in ComfyUI's page."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    FUNCTION = "generate"
    CATEGORY = CATEGORY
    DESCRIPTION = "Makes or edits images at a klein suite; 0 stands for the model's default."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs as ComfyUI asks for them."""
        side = ("INT", {"default": 0, "min": 0, "max": MAXIMUM_SIDE_PX, "step": 16})
        return {
            "required": {
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "target": _target("127.0.0.1:50050", "HOST:PORT of a suite"),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
                "width": side,
                "height": side,
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
            },
            "optional": {"references": ("IMAGE",), "model": ("STRING", {"default": ""})},
        }

    def generate(
        self,
        prompt: str,
        target: str,
        seed: int,
        width: int,
        height: int,
        steps: int,
        count: int,
        references: torch.Tensor | None = None,
        model: str = "",
    ) -> tuple[torch.Tensor]:
        """Returns the images, (count, height, width, 3), 0…1.

        Raises:
            KleinError: the request failed.
        """
        import torch

        options = ImageOptions(
            model=model or None,
            references=[_picture(each) for each in references] if references is not None else None,
            width=width or None,
            height=height or None,
            steps=steps or None,
            seed=seed,
            count=count,
            format="raw",
        )
        page = Page()
        images: dict[int, torch.Tensor] = {}
        with Client(target) as client, client.stream(prompt, preview_interval=1, **options) as events:
            for event in events:
                page.raise_if_interrupted()
                match event:
                    case Step():
                        page.show(event.step, event.step_count)
                    case Preview():
                        page.preview = event.image
                    case Image():
                        levels = torch.frombuffer(bytearray(event.data), dtype=torch.uint8)
                        images[event.index] = levels.view(event.height_px, event.width_px, 3) / 255.0
        return (torch.stack([images[index] for index in sorted(images)]),)


class Page:
    """Progress and interruption of the ComfyUI that runs this process; without one, neither does anything."""

    _MODULES: ClassVar = ("comfy.utils", "comfy.model_management")

    def __init__(self) -> None:
        self.preview: Image | None = None
        """The latest preview, which the next step shows."""
        self._bar: Any = None
        self._new_bar: Callable[[int], Any] | None = None
        self._raise: Callable[[], None] | None = None
        try:
            utils, management = map(importlib.import_module, self._MODULES)
        except ModuleNotFoundError as error:
            if error.name not in ("comfy", *self._MODULES):
                raise
        else:
            self._new_bar = utils.ProgressBar
            self._raise = management.throw_exception_if_processing_interrupted

    def raise_if_interrupted(self) -> None:
        """Raises ComfyUI's own exception once its user has cancelled; that cancels the request."""
        if self._raise is not None:
            self._raise()

    def show(self, step: int, step_count: int) -> None:
        """Shows a step and the latest preview."""
        if self._new_bar is None:
            return
        if self._bar is None:
            self._bar = self._new_bar(step_count)
        preview = ("JPEG", self.preview.pil(), PREVIEW_SIDE_PX) if self.preview is not None else None
        self._bar.update_absolute(step, step_count, preview)


def _target(default: str, tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("STRING", {"default": default, "tooltip": tooltip})


def _picture(pixels: torch.Tensor) -> Any:
    """Returns Pillow's image of ComfyUI's, (height, width, 3), 0…1."""
    import torch
    from PIL import Image as pillow

    levels = (pixels.detach().to("cpu", torch.float32) * 255).round().clamp(0, 255).to(torch.uint8)
    return pillow.fromarray(levels.contiguous().numpy())


NODE_CLASS_MAPPINGS = {
    "KleinRemoteTextEncode": RemoteTextEncode,
    "KleinRemoteVAEDecode": RemoteVAEDecode,
    "KleinGenerate": KleinGenerate,
}
"""Nodes by their ids in saved workflows."""
NODE_DISPLAY_NAME_MAPPINGS = {
    "KleinRemoteTextEncode": "Remote Text Encode (klein)",
    "KleinRemoteVAEDecode": "Remote VAE Decode (klein)",
    "KleinGenerate": "Generate Image (klein)",
}

"""DenoiserSettings: the settings that the denoiser adds to those of every stage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from klein_services.runtime.settings import SettingsError, metrics_port_setting, setting
from klein_services.runtime.stage_settings import StageSettings, quantization_setting

AUTOMATIC = "auto"
OFFLOAD_BLOCKS = "blocks"
OFFLOADS = ("none", OFFLOAD_BLOCKS)
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(StageSettings):
    """Settings of `klein_services.denoiser`."""

    port: int = setting(50052, help="Port of the gRPC server; 0 takes a free one", minimum=0, maximum=65535)
    metrics_port: int = metrics_port_setting(9465)
    receive_timeout_seconds: float = setting(
        300.0,
        help="Seconds within which a whole request must arrive; other stages may still be computing its tensors",
        minimum=0.01,
        maximum=3600,
    )
    silent_seconds: float = setting(
        10.0,
        help="Seconds after which a request that has sent nothing after its spec is dropped, while such requests hold "
        "more than a quarter of the queue",
        minimum=0.01,
        maximum=3600,
    )
    quantization: str = quantization_setting()
    offload: str = setting(
        "none",
        help="blocks: weights stay in host memory and each block is copied to the GPU ahead of its use; "
        "slower, with identical results",
        choices=OFFLOADS,
    )
    compile: str = setting(
        AUTOMATIC,
        help="Whether the blocks are compiled by torch.compile, during the warm-up: on, off, or auto, which is on for "
        "CUDA without offload. What the warm-up did not compile runs uncompiled",
        choices=(AUTOMATIC, "on", "off"),
    )
    packing: str = setting(
        AUTOMATIC,
        help="packed: requests share steps; exact: each image steps alone, bit for bit as in one process; "
        "auto: packed on CUDA, exact elsewhere",
        choices=(AUTOMATIC, "exact", "packed"),
    )
    token_budget: int = setting(
        0, help="Tokens of one packed step; 0 measures the device at warm-up", minimum=0, maximum=10**7
    )
    step_image_limit: int = setting(64, help="Images in one packed step", minimum=1, maximum=1024)
    ageing_seconds: float = setting(
        30.0, help="Seconds after which a waiting request counts as starving", minimum=0, maximum=86400
    )
    aged_share: float = setting(
        0.125,
        help="Share of device time for the oldest starving request, however urgent the others are",
        minimum=0.01,
        maximum=1,
    )
    memory_limit_mib: int = setting(
        4096, help="MiB that the tensors of all admitted requests may take", minimum=1, maximum=10**7
    )
    reference_cache_mib: int = setting(
        4096,
        help="MiB of device memory for cached references, for models that cache them: klein-9B in bf16 takes 2048 "
        "for a megapixel. Caches in use count; one request may exceed the limit while no other uses a cache",
        minimum=0,
        maximum=10**7,
    )
    adapters_folder: str = setting(
        "", help="Folder of the adapters that requests may name, NAME.safetensors each; empty: no adapters"
    )
    adapter_memory_mib: int = setting(
        2048, help="MiB of device memory for adapters, those in use included", minimum=1, maximum=10**7
    )
    adapter_limit: int = setting(8, help="Adapters of one request", minimum=0, maximum=64)
    image_limit: int = setting(8, help="Images of one request", minimum=1, maximum=64)
    reference_limit: int = setting(10, help="References of one request", minimum=0, maximum=64)
    reference_token_limit: int = setting(
        40960,
        help="Tokens of all references of one request, the initial image included; 4096 are a megapixel",
        minimum=0,
        maximum=10**6,
    )
    text_token_limit: int = setting(512, help="Tokens of a prompt embedding", minimum=1, maximum=65536)
    warmup_sizes: str = setting(
        AUTOMATIC,
        help="Sizes to warm up and measure before serving, such as 1024x1024,512x512; empty: no warm-up; "
        "auto is 1024x1024 on CUDA and 128x128 elsewhere",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        try:
            self.sizes_px(on_gpu=False)
        except SettingsError as error:
            yield str(error)
        if self.adapters_folder and not Path(self.adapters_folder).is_dir():
            yield f"KLEIN_ADAPTERS_FOLDER is {self.adapters_folder!r}; it must be an existing folder"
        if self.compile == "on" and self.offload == OFFLOAD_BLOCKS:
            yield "KLEIN_COMPILE is 'on' with KLEIN_OFFLOAD 'blocks'; offloaded blocks cannot be compiled"

    def compiles(self, on_gpu: bool) -> bool:
        """Returns whether blocks are compiled."""
        return (
            on_gpu and self.offload != OFFLOAD_BLOCKS if self.compile == AUTOMATIC else self.compile == "on"
        )

    def packs(self, on_gpu: bool) -> bool:
        """Returns whether requests share steps."""
        return on_gpu if self.packing == AUTOMATIC else self.packing == "packed"

    def sizes_px(self, on_gpu: bool) -> tuple[tuple[int, int], ...]:
        """Returns `warmup_sizes` as (width, height) pairs.

        Raises:
            SettingsError: an entry is not of the form WIDTHxHEIGHT in multiples of 16.
        """
        text = ("1024x1024" if on_gpu else "128x128") if self.warmup_sizes == AUTOMATIC else self.warmup_sizes
        return tuple(_size(entry.strip()) for entry in text.split(",") if entry.strip())


def _size(entry: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(entry)
    width, height = (int(side) for side in match.groups()) if match else (0, 0)
    if min(width, height) < 64 or width % 16 or height % 16:
        raise SettingsError(
            f"KLEIN_WARMUP_SIZES has {entry!r}; sizes must be WIDTHxHEIGHT, multiples of 16, at least 64"
        )
    return width, height

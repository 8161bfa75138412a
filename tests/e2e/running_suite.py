"""Four real processes, next to the pipeline that they must equal, and requests that both take."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient, Generation, ImageOptions
from klein_client.errors import ARGUMENTS
from klein_client.request import image_sources, image_spec
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_services.cli.suite import Suite, SuiteOptions
from tests.services.fakes.denoiser_server import one_thread
from tests.tiny.adapters import FORMATS
from tests.tiny.checkpoint import save_tiny_checkpoint

READY_SECONDS = 120.0
UNSEEN = itertools.count(1)


@dataclass(frozen=True)
class Case:
    """One request, as both sides take it."""

    prompt: str
    size: tuple[int | None, int | None] = (None, None)
    references: tuple[bytes, ...] = ()
    seeds: tuple[int, ...] = (0,)
    options: dict = field(default_factory=dict)

    def arguments(self, default_size: tuple[int | None, int | None]) -> ImageOptions:
        width, height = self._size(default_size)
        options = {ARGUMENTS.get(name, name): value for name, value in self.options.items()}
        if sides := options.pop("expand", None):
            options["expand"] = (sides.left, sides.top, sides.right, sides.bottom)
        if adapters := options.pop("adapters", None):
            options["adapters"] = [(each.name, each.scale) for each in adapters]
        return ImageOptions(
            references=self.references,
            width=width,
            height=height,
            seed=self.seeds[0],
            count=len(self.seeds),
            format="raw",
            **options,
        )

    def spec(self, default_size: tuple[int | None, int | None]) -> api.ImageSpec:
        options = self.arguments(default_size)
        return image_spec(self.prompt, options, image_sources(options))

    def expected(self, pipeline: Pipeline, default_size: tuple[int | None, int | None]) -> list[bytes]:
        width, height = self._size(default_size)
        images = pipeline.generate(
            self.prompt,
            references=self.references,
            width_px=width,
            height_px=height,
            seeds=self.seeds,
            **self.options,
        )
        return [image.numpy().tobytes() for image in images]

    def afresh(self) -> Case:
        """The same request with a prompt and images that no stage has seen, so that no cache answers it."""
        seed = next(UNSEEN)
        changed = {"negative_prompt": f"dull {seed}"} if "negative_prompt" in self.options else {}
        if "initial_image" in self.options:
            size = Image.open(BytesIO(self.options["initial_image"])).size
            changed["initial_image"] = picture(*size, seed * 100 + 99)
        return replace(
            self,
            prompt=f"{seed} {self.prompt}",
            references=tuple(
                picture(*Image.open(BytesIO(data)).size, seed * 100 + index)
                for index, data in enumerate(self.references)
            ),
            options=self.options | changed,
        )

    def _size(self, default_size: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
        if "initial_image" in self.options:
            return None, None
        return self.size if self.references or self.size != (None, None) else default_size


def picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Running:
    """A suite and the pipeline that it must equal."""

    suite: Suite
    pipeline: Pipeline
    default_size: tuple[int | None, int | None]
    """Of requests that give none; `None` leaves it to the model."""
    adapters: Path | None
    """Folder of `plain` and `kron`; pico has none."""

    def ask(self, *cases: Case) -> list[Generation]:
        """Sends all requests at once, each from its own client."""

        async def one(case: Case) -> Generation:
            async with AsyncClient(self.suite.target, retry=False) as client:
                options = case.arguments(self.default_size)
                return await client.generate(case.prompt, timeout_seconds=120, **options)

        async def all_of_them() -> list[Generation]:
            return await asyncio.gather(*map(one, cases))

        return asyncio.run(all_of_them())


@contextmanager
def running_suite(folder: Path, model: Path | str, adapters: Path | None = None) -> Iterator[Running]:
    """Runs all services with a model, and its pipeline in this process."""
    options = SuiteOptions(
        model=str(model),
        device="cpu",
        threads=1,
        log_folder=folder / "logs",
        adapters=adapters,
    )
    # A matrix product may differ in its last bit with the number of threads, so both sides use one.
    with one_thread(), Suite(options) as suite:
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        pipeline = Pipeline.from_folder(WEIGHTS if model == "pico" else Path(model))
        # pico's own description makes it 128 × 128 on both sides; other models' images would have 1024 × 1024 pixels.
        default_size = (None, None) if pipeline.description else (128, 128)
        yield Running(suite, pipeline, default_size, adapters)


def save_with_adapters(folder: Path, **variant: bool) -> tuple[Path, Path]:
    """Writes a tiny model and two adapters for it; returns the model's folder and theirs."""
    tiny = save_tiny_checkpoint(folder / "model", **variant)
    adapters = folder / "adapters"
    adapters.mkdir()
    for name, form in (("plain", "ai-toolkit"), ("kron", "lokr-both")):
        FORMATS[form].write(tiny.transformer).save(adapters / f"{name}.safetensors")
    return folder / "model", adapters


def of_variant(case: Case, pipeline: Pipeline) -> Case:
    """Gives base models, whose default is 50 steps, fewer of them and something to avoid."""
    if pipeline.is_distilled:
        return case
    guided = {"step_count": 3, "guidance_scale": 2.5, "negative_prompt": "dull"}
    return replace(case, options=case.options | guided)


def encoder_calls(generation: Generation) -> dict[str, int]:
    """How often a request asked the encoders; 0 stands for an answer from the cache."""
    calls = {timing.operation: timing.call_count for timing in generation.timings}
    return {operation: count for operation, count in calls.items() if operation.startswith("encode")}


def expected_encoder_calls(case: Case) -> dict[str, int]:
    """Of a request that nothing is cached of."""
    prompts = {"encode-prompt": 2 if "negative_prompt" in case.options else 1}
    prompts |= {"encode-initial-image": 1} if "initial_image" in case.options else {}
    return prompts | ({"encode-reference": len(case.references)} if case.references else {})

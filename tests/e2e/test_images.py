"""Four real processes give the same bytes as the pipeline in one process, for every flow, alone and in company."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_pb2 import Adapter
from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.pico.location import WEIGHTS
from klein_core.pipeline import Pipeline
from services.cli.client import Generation, connect, generate
from services.cli.status import list_models
from services.cli.suite import Suite, SuiteOptions
from services.runtime.status import explain
from tests.tiny.adapters import FORMATS
from tests.tiny.checkpoint import save_tiny_checkpoint

READY_SECONDS = 120.0


@dataclass(frozen=True)
class Case:
    """One request, as both sides take it."""

    prompt: str
    size: tuple[int | None, int | None] = (None, None)
    references: tuple[bytes, ...] = ()
    seeds: tuple[int, ...] = (0,)
    options: dict = field(default_factory=dict)

    def spec(self, default_size: tuple[int, int]) -> api.ImageSpec:
        width, height = self._size(default_size)
        return api.ImageSpec(
            prompt=self.prompt,
            references=self.references,
            width_px=width,
            height_px=height,
            seed=self.seeds[0],
            image_count=len(self.seeds),
            format=image_pb2.IMAGE_FORMAT_RAW_RGB,
            **self.options,
        )

    def expected(self, pipeline: Pipeline, default_size: tuple[int, int]) -> list[bytes]:
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

    def _size(self, default_size: tuple[int, int]) -> tuple[int | None, int | None]:
        return self.size if self.references or self.size != (None, None) else default_size


def picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FIRST, SECOND = picture(96, 80, 1), picture(70, 130, 2)
CASES = {
    "text-to-image": Case("a large red heart on a yellow background", seeds=(7,)),
    "text-to-image, rectangle, three steps": Case(
        "a blue star", size=(144, 64), seeds=(1,), options={"step_count": 3}
    ),
    "text-to-image, three seeds": Case("", seeds=(4, 5, 6)),
    "text-to-image, long prompt": Case("green " * 700, size=(64, 64)),
    "edit": Case("make the background blue", references=(FIRST,), seeds=(3,)),
    "edit to another size": Case("make it green", size=(64, 128), references=(SECOND,), seeds=(8,)),
    "two references": Case("the shape of image 1 on the background of image 2", references=(FIRST, SECOND)),
    "four references": Case(
        "<|im_end|> combine all", size=(64, 64), references=(FIRST, SECOND, SECOND, FIRST)
    ),
}
FLOWS = {0: "text-to-image", 1: "edit", 2: "multi-reference", 4: "multi-reference"}


@dataclass(frozen=True)
class Running:
    """A suite and the pipeline that it must equal."""

    target: str
    pipeline: Pipeline
    default_size: tuple[int, int]
    adapters: Path | None
    """Folder of `plain` and `kron`; pico has none."""

    def ask(self, *cases: Case) -> list[Generation]:
        """Sends all requests at once, each from a client of its own."""

        async def one(case: Case) -> Generation:
            async with connect(self.target) as stub:
                return await generate(stub, case.spec(self.default_size), timeout_seconds=120)

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
        settings={"KLEIN_DEFAULT_SIZE_PX": "128"},
    )
    threads = torch.get_num_threads()
    # A matrix product may differ in its last bit with the number of threads, so both sides use one.
    torch.set_num_threads(1)
    with Suite(options) as suite:
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        pipeline = Pipeline.from_folder(WEIGHTS if model == "pico" else Path(model))
        yield Running(suite.target, pipeline, (128, 128), adapters)
    torch.set_num_threads(threads)


def save_with_adapters(folder: Path, **variant: bool) -> tuple[Path, Path]:
    """Writes a tiny model and two adapters for it; returns the model's folder and theirs."""
    tiny = save_tiny_checkpoint(folder / "model", **variant)
    adapters = folder / "adapters"
    adapters.mkdir()
    for name, form in (("plain", "ai-toolkit"), ("kron", "lokr-both")):
        FORMATS[form].write(tiny.transformer).save(adapters / f"{name}.safetensors")
    return folder / "model", adapters


@pytest.fixture(scope="module", params=["tiny", "pico", "base"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("suite")
    model, adapters = (
        ("pico", None)
        if request.param == "pico"
        else save_with_adapters(folder, distilled=request.param == "tiny")
    )
    with running_suite(folder, model, adapters) as running:
        yield running


def of_variant(case: Case, pipeline: Pipeline) -> Case:
    """Gives base models, whose default is 50 steps, fewer of them and something to avoid."""
    if pipeline.is_distilled:
        return case
    return Case(
        case.prompt,
        case.size,
        case.references,
        case.seeds,
        {"step_count": 3, "guidance_scale": 2.5, "negative_prompt": "dull"},
    )


@pytest.mark.parametrize("name", CASES)
def test_a_request_alone_gives_the_pipelines_bytes(running: Running, name: str) -> None:
    case = of_variant(CASES[name], running.pipeline)
    [generation] = running.ask(case)
    assert [image.data for image in generation.images] == case.expected(
        running.pipeline, running.default_size
    )
    assert [image.seed for image in generation.images] == list(case.seeds)
    assert generation.summary.flow == FLOWS[len(case.references)]
    assert generation.summary.prompt_truncated == (name == "text-to-image, long prompt")


def test_eight_clients_at_once_each_get_the_pipelines_bytes(running: Running) -> None:
    cases = [of_variant(case, running.pipeline) for case in CASES.values()]
    assert len(cases) == 8
    for case, generation in zip(cases, running.ask(*cases), strict=True):
        expected = case.expected(running.pipeline, running.default_size)
        assert [image.data for image in generation.images] == expected, case.prompt[:40]


def assert_adapters_do_not_mix(running: Running, case: Case) -> None:
    """Asks at once with four different choices of adapters."""
    wishes = ([("plain", 0.5)], [("kron", -1.0)], [], [("kron", 0.3), ("plain", 1.0)])
    read = {
        name: running.pipeline.read_adapter(running.adapters / f"{name}.safetensors")
        for name in ("plain", "kron")
    }
    cases = [
        replace(
            case,
            options=case.options | {"adapters": [Adapter(name=name, scale=scale) for name, scale in wish]},
        )
        for wish in wishes
    ]
    different = set()
    for wish, generation in zip(wishes, running.ask(*cases), strict=True):
        adapters = [ScaledAdapter(read[name], scale) for name, scale in wish]
        told = replace(case, options=case.options | {"adapters": adapters})
        [image] = generation.images
        assert [image.data] == told.expected(running.pipeline, running.default_size)
        different.add(image.data)
    assert len(different) == len(wishes)


def test_requests_with_different_adapters_at_once_each_get_the_pipelines_bytes(running: Running) -> None:
    if running.adapters is None:
        pytest.skip("pico has no adapters")
    assert_adapters_do_not_mix(running, of_variant(CASES["edit"], running.pipeline))


def test_adapters_are_listed(running: Running) -> None:
    [model] = asyncio.run(list_models(running.target, 30.0)).models
    listed = [(adapter.name, adapter.kind, adapter.problem) for adapter in model.adapters]
    assert listed == ([] if running.adapters is None else [("kron", "LoKr", ""), ("plain", "LoRA", "")])
    assert model.limits.adapter_count == 8


def test_an_unknown_adapter_is_not_found(running: Running) -> None:
    case = Case("a star", size=(64, 64), options={"adapters": [Adapter(name="nothing")]})
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        running.ask(case)
    told = explain(failure.value)
    assert told.code is grpc.StatusCode.NOT_FOUND
    assert told.violations[0].field == "adapters[0].name"
    assert ("known: none" if running.adapters is None else "known: kron, plain") in told.message


def test_a_summary_accounts_for_the_request(running: Running) -> None:
    case = of_variant(CASES["two references"], running.pipeline)
    [generation] = running.ask(case)
    summary = generation.summary
    operations = {timing.operation: timing.call_count for timing in summary.stage_timings}
    assert operations["encode-reference"] in (0, 2)
    assert operations["denoise"] == operations["decode"] == 1
    assert summary.output_megapixels == pytest.approx(96 * 80 / 1e6)
    assert summary.input_megapixels == pytest.approx((96 * 80 + 64 * 128) / 1e6)
    assert summary.request_id
    assert summary.total_duration.ToTimedelta().total_seconds() > 0


def test_references_that_are_cached_give_the_pipelines_bytes_at_first_and_again(tmp_path: Path) -> None:
    names = ["edit", "two references", "edit to another size", "text-to-image"]
    with running_suite(tmp_path, *save_with_adapters(tmp_path, reference_cache=True)) as running:
        assert running.pipeline.uses_reference_cache
        cases = [CASES[name] for name in names] * 2
        for case, generation in zip(cases, running.ask(*cases), strict=True):
            expected = case.expected(running.pipeline, running.default_size)
            assert [image.data for image in generation.images] == expected
        assert_adapters_do_not_mix(running, CASES["edit"])

"""Four real processes give the same bytes as the pipeline in one process, for every flow, alone and in company."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_pb2 import Adapter
from klein_client import AsyncClient, Client, InvalidRequest, NotFound, Preview, Step
from klein_client import Image as FinishedImage
from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.params import Expansion
from klein_services.cli.status import fetch_status
from tests.e2e.running_suite import (
    Case,
    Running,
    encoder_calls,
    expected_encoder_calls,
    of_variant,
    picture,
    running_suite,
    save_with_adapters,
)
from tests.services.fakes.runtime_toy import until

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


def mask(band: str, image: Image.Image) -> bytes:
    """An image whose only band, or whose alpha band, is `image`."""
    file = BytesIO()
    if band == "A":
        image = Image.merge("LA", [Image.new("L", image.size), image])
    image.save(file, "PNG")
    return file.getvalue()


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int], fill: int = 255) -> Image.Image:
    drawn = Image.new("L", size, 255 - fill)
    drawn.paste(fill, box)
    return drawn


INITIAL, LARGE = picture(96, 80, 4), picture(150, 116, 5)
CENTER = mask("L", rectangle((96, 80), (20, 30, 70, 60)))
MASKED = {
    "white mask": Case(
        "a red heart", options={"initial_image": INITIAL, "mask": mask("L", Image.new("L", (96, 80), 255))}
    ),
    "soft mask, with a reference, two seeds": Case(
        "make it blue",
        references=(FIRST,),
        seeds=(5, 6),
        options={
            "initial_image": INITIAL,
            "mask": mask("L", Image.linear_gradient("L").resize((192, 160))),
            "strength": 0.5,
        },
    ),
    "padding crop": Case(
        "a star",
        seeds=(3,),
        options={
            "initial_image": LARGE,
            "mask": mask("L", rectangle((150, 116), (60, 20, 100, 50))),
            "mask_padding_px": 12,
            "strength": 1.0,
        },
    ),
    "expansion": Case("wider", options={"initial_image": INITIAL, "expand": Expansion(16, 0, 37, 9)}),
    "alpha mask": Case(
        "a ring",
        options={
            "initial_image": INITIAL,
            "mask": mask("A", rectangle((96, 80), (20, 30, 70, 60), fill=0)),
            "mask_is_alpha": True,
            # Ten steps, of which exactly eight are run: rounding the strength would make it nine.
            "step_count": 10,
        },
    ),
    "nothing preserved": Case(
        "a circle", options={"initial_image": INITIAL, "mask": CENTER, "preserve_unmasked": False}
    ),
    # More pixels than pico makes, so that it is scaled down there.
    "no mask": Case("a circle", options={"initial_image": picture(300, 260, 6), "strength": 0.6}),
}
FLOWS = {0: "text-to-image", 1: "edit", 2: "multi-reference", 4: "multi-reference"}


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


def test_pico_alone_decides_its_sizes_behind_a_plain_orchestrator(running: Running) -> None:
    if running.pipeline.description is None:
        pytest.skip("only pico has a description")
    edit = Case("make the background blue", references=(picture(416, 288, 3),), seeds=(3,))
    [drawn, edited, strange] = running.ask(Case("a red circle"), edit, Case("a harbor at dusk"))
    assert [(image.width_px, image.height_px) for image in drawn.images] == [(128, 128)]
    assert [(image.width_px, image.height_px) for image in edited.images] == [(304, 208)]
    assert [image.data for image in edited.images] == edit.expected(running.pipeline, running.default_size)
    assert (len(drawn.summary.warnings), len(strange.summary.warnings)) == (0, 1)
    assert "circle" in strange.summary.warnings[0]
    [model] = fetch_status(running.suite.target, 30.0).models
    assert (model.limits.default_size_px, model.limits.pixel_count) == (128, 256 * 256)
    assert model.description == running.pipeline.description.description
    with pytest.raises(InvalidRequest, match="at most 65536 are allowed"):
        running.ask(Case("a star", size=(272, 256)))


def test_eight_clients_at_once_each_get_the_pipelines_bytes(running: Running) -> None:
    cases = [of_variant(case, running.pipeline).afresh() for case in CASES.values()]
    assert len(cases) == 8
    for case, generation in zip(cases, running.ask(*cases), strict=True):
        expected = case.expected(running.pipeline, running.default_size)
        assert [image.data for image in generation.images] == expected, case.prompt[:40]
        assert encoder_calls(generation) == expected_encoder_calls(case)


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_edit_alone_gives_the_pipelines_bytes(running: Running, name: str) -> None:
    case = of_variant(MASKED[name], running.pipeline)
    [generation] = running.ask(case)
    assert [image.data for image in generation.images] == case.expected(running.pipeline, (None, None))
    assert generation.summary.flow == "masked-edit"


def test_masked_edits_among_strangers_give_the_pipelines_bytes(running: Running) -> None:
    cases = [of_variant(case, running.pipeline).afresh() for case in (*MASKED.values(), *CASES.values())]
    for case, generation in zip(cases, running.ask(*cases), strict=True):
        expected = case.expected(running.pipeline, running.default_size)
        assert [image.data for image in generation.images] == expected, case.prompt[:40]
        assert encoder_calls(generation) == expected_encoder_calls(case)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"mask": CENTER}, "mask", "needs an initial_image"),
        ({"initial_image": INITIAL, "mask": picture(96, 96, 1)}, "mask", "aspect"),
        ({"initial_image": INITIAL, "mask": CENTER, "mask_is_alpha": True}, "mask", "no alpha channel"),
        (
            {"initial_image": INITIAL, "mask": mask("L", Image.new("L", (96, 80)))},
            "mask",
            "is empty: no pixel is bright enough",
        ),
        ({"initial_image": INITIAL, "strength": 1.5}, "strength", "above 0 and at most 1"),
        ({"initial_image": INITIAL, "strength": 1e-30}, "strength", "none would be left"),
        ({"initial_image": b"no image"}, "initial_image", "is not"),
    ],
)
def test_a_masked_edit_that_cannot_be_made_is_refused(
    running: Running, options: dict, field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest) as failure:
        running.ask(Case("a star", size=(None, None), options=options))
    assert [violation.field for violation in failure.value.violations] == [field]
    assert words in failure.value.violations[0].description


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
        expected = replace(case, options=case.options | {"adapters": adapters})
        [image] = generation.images
        assert [image.data] == expected.expected(running.pipeline, running.default_size)
        different.add(image.data)
    assert len(different) == len(wishes)


def test_requests_with_different_adapters_at_once_each_get_the_pipelines_bytes(running: Running) -> None:
    if running.adapters is None:
        pytest.skip("pico has no adapters")
    assert_adapters_do_not_mix(running, of_variant(CASES["edit"], running.pipeline))


def test_adapters_are_listed(running: Running) -> None:
    [model] = fetch_status(running.suite.target, 30.0).models
    listed = [(adapter.name, adapter.kind, adapter.problem) for adapter in model.adapters]
    assert listed == ([] if running.adapters is None else [("kron", "LoKr", ""), ("plain", "LoRA", "")])
    assert model.limits.adapter_count == 8


def test_an_unknown_adapter_is_not_found(running: Running) -> None:
    case = Case("a star", size=(64, 64), options={"adapters": [Adapter(name="nothing")]})
    with pytest.raises(NotFound) as failure:
        running.ask(case)
    assert failure.value.violations[0].field == "adapters[0].name"
    assert ("known: none" if running.adapters is None else "known: kron, plain") in failure.value.message


def test_a_summary_accounts_for_the_request(running: Running) -> None:
    case = of_variant(CASES["two references"], running.pipeline).afresh()
    [generation] = running.ask(case)
    summary = generation.summary
    operations = {timing.operation: timing.call_count for timing in summary.timings}
    assert encoder_calls(generation) == expected_encoder_calls(case)
    assert operations["denoise"] == operations["decode"] == 1
    assert summary.output_megapixels == pytest.approx(96 * 80 / 1e6)
    assert summary.input_megapixels == pytest.approx((96 * 80 + 64 * 128) / 1e6)
    assert summary.request_id
    assert summary.total_seconds > 0


def test_a_unary_request_gives_the_pipelines_bytes(running: Running) -> None:
    case = of_variant(CASES["two references"], running.pipeline)
    case = replace(case, seeds=(3, 4))

    async def asked() -> api.GenerateImageResponse:
        async with AsyncClient(running.suite.target) as client:
            request = api.GenerateImageRequest(spec=case.spec(running.default_size))
            return await client.stub().GenerateImage(request, timeout=120)

    response = asyncio.run(asked())
    assert [image.data for image in response.images] == case.expected(running.pipeline, running.default_size)
    assert [(image.index, image.seed) for image in response.images] == [(0, 3), (1, 4)]
    assert response.summary.flow == "multi-reference"


def test_previews_are_images_of_the_images_size_and_change_nothing(running: Running) -> None:
    case = of_variant(Case("a green ring", size=(144, 64), seeds=(5,)), running.pipeline)
    case = replace(case, options=case.options | {"step_count": 20})

    with Client(running.suite.target) as client:
        options = case.arguments(running.default_size)
        received = list(client.stream(case.prompt, preview_interval=1, timeout_seconds=120, **options))
    previews = [event for event in received if isinstance(event, Preview)]
    assert previews
    for preview in previews:
        shown = preview.image
        assert (shown.index, shown.seed, shown.format) == (0, 5, "jpeg")
        assert 1 <= preview.step <= 20
        with Image.open(BytesIO(shown.data)) as opened:
            assert (opened.format, opened.size) == ("JPEG", (144, 64))
    assert [preview.step for preview in previews] == sorted({preview.step for preview in previews})
    images = [event.data for event in received if isinstance(event, FinishedImage)]
    assert images == case.expected(running.pipeline, running.default_size)
    steps = [event.step for event in received if isinstance(event, Step)]
    assert (steps, steps[-1]) == (sorted(set(steps)), 20)


def denoiser_metric(running: Running, name: str) -> float:
    """Reads one of the denoiser process's metrics, all of its labels together."""
    url = f"http://127.0.0.1:{running.suite.metrics_ports['denoiser']}/metrics"
    page = urllib.request.urlopen(url, timeout=10).read().decode()
    samples = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert samples, name
    return sum(map(float, samples))


def test_a_caller_that_goes_away_stops_the_denoiser(running: Running) -> None:
    if running.adapters is None:
        pytest.skip("pico's three steps would only take longer than the tiny models'")
    # Large, so that a thousand steps take much longer than it takes a slow client to receive the third.
    case = of_variant(Case("a blue star", size=(512, 512)), running.pipeline)
    case = replace(case, options=case.options | {"step_count": 1000})
    names = ("klein_denoise_step_seconds_count", "klein_abandoned_work_seconds_total")
    steps, abandoned = (denoiser_metric(running, name) for name in names)

    async def go_away_after_step(step: int) -> None:
        async with AsyncClient(running.suite.target) as client:
            options = case.arguments(running.default_size)
            events = client.stream(case.prompt, timeout_seconds=120, **options)
            async for event in events:
                if isinstance(event, Step) and event.step >= step:
                    break
            assert denoiser_metric(running, "klein_running_requests") == 1
            await events.aclose()
            await until(lambda: denoiser_metric(running, "klein_running_requests") == 0, seconds=60)

    asyncio.run(go_away_after_step(3))
    assert 3 <= denoiser_metric(running, names[0]) - steps < 1000
    assert denoiser_metric(running, names[1]) > abandoned
    assert denoiser_metric(running, "klein_queue_depth") == 0
    assert denoiser_metric(running, "klein_backlog_seconds") == 0


def test_references_that_are_cached_give_the_pipelines_bytes_at_first_and_again(tmp_path: Path) -> None:
    names = ["edit", "two references", "edit to another size", "text-to-image"]
    with running_suite(tmp_path, *save_with_adapters(tmp_path, reference_cache=True)) as running:
        assert running.pipeline.uses_reference_cache
        cases = [*(CASES[name] for name in names), MASKED["soft mask, with a reference, two seeds"]] * 2
        for case, generation in zip(cases, running.ask(*cases), strict=True):
            expected = case.expected(running.pipeline, running.default_size)
            assert [image.data for image in generation.images] == expected
        assert_adapters_do_not_mix(running, CASES["edit"])

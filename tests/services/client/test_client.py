"""Both clients against a real gRPC server: requests, events, results, and the state of a suite."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as pillow

import klein_client
from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1 import stage_service_pb2 as stage_api
from klein_client import AsyncClient, Client, Generation, Image, InvalidRequest, Queued, Step, Summary
from tests.services.fakes.answering_orchestrator import Orchestrator, serving


@pytest.fixture
def orchestrator() -> Orchestrator:
    return Orchestrator()


@pytest.fixture
def target(orchestrator: Orchestrator) -> Iterator[str]:
    with serving(orchestrator) as address:
        yield address


EVERY_OPTION = {
    "model": "fake",
    "negative_prompt": "a heart",
    "references": [b"one", bytearray(b"two")],
    "initial_image": memoryview(b"painted over"),
    "mask": BytesIO(b"white"),
    "mask_is_alpha": True,
    "mask_padding": 0,
    "strength": 0.5,
    "expand": (1, 2, 3, 40),
    "preserve_unmasked": False,
    "width": 64,
    "height": 96,
    "steps": 7,
    "guidance_scale": 2.5,
    "seed": 41,
    "count": 2,
    "format": "webp",
    "quality": 80,
    "priority": "batch",
    "adapters": {"ink": 0.5, "oil.v2": -0.5},
    "embed_prompt": True,
    "timeout_seconds": 60,
    "idempotency_key": "one",
    "token": "secret",
    "metadata": [("x-note", "here")],
}


def test_every_option_reaches_the_request(orchestrator: Orchestrator, target: str) -> None:
    assert set(EVERY_OPTION) == set(klein_client.ImageOptions.__annotations__)
    with Client(target) as client:
        client.generate("a star", **EVERY_OPTION)
    assert orchestrator.specs == [
        api.ImageSpec(
            model="fake",
            prompt="a star",
            negative_prompt="a heart",
            references=[b"one", b"two"],
            initial_image=b"painted over",
            mask=b"white",
            mask_is_alpha=True,
            mask_padding_px=0,
            strength=0.5,
            expand=image_pb2.ImageExpansion(left_px=1, top_px=2, right_px=3, bottom_px=40),
            preserve_unmasked=False,
            width_px=64,
            height_px=96,
            step_count=7,
            guidance_scale=2.5,
            seed=41,
            image_count=2,
            format=image_pb2.IMAGE_FORMAT_WEBP,
            quality=80,
            priority=image_pb2.PRIORITY_BATCH,
            adapters=[
                image_pb2.Adapter(name="ink", scale=0.5),
                image_pb2.Adapter(name="oil.v2", scale=-0.5),
            ],
            embed_prompt=True,
        )
    ]


async def test_both_clients_send_the_same_request(orchestrator: Orchestrator, target: str) -> None:
    options = EVERY_OPTION | {"mask": b"white"}
    with Client(target) as client:
        one = client.generate("a star", **options)
    async with AsyncClient(target) as client:
        other = await client.generate("a star", **options)
    assert orchestrator.specs[0] == orchestrator.specs[1]
    assert one == other


async def test_a_stream_has_typed_events_in_order(target: str) -> None:
    with Client(target) as client:
        events = list(client.stream("a star"))
    assert [type(event) for event in events] == [Queued, Step, Image, Summary]
    async with AsyncClient(target) as client:
        assert [event async for event in client.stream("a star")] == events


def test_a_result_is_images_summary_warnings_and_timings(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.warnings = ["It knows no cat."]
    with Client(target) as client:
        made = client.generate("long", count=3)
    assert [image.data for image in made] == [b"picture 0", b"picture 1", b"picture 2"]
    assert (len(made), made[1].seed, made.image.index) == (3, 42, 0)
    assert made.warnings == ("It knows no cat.", "The prompt was too long: its end was cut off.")
    assert [(each.operation, each.call_seconds) for each in made.timings] == [
        ("encode-prompt", 0.007),
        ("denoise", 0.123),
    ]
    assert made.summary.total_seconds == 1.5


def test_the_state_of_a_suite_is_typed(orchestrator: Orchestrator, target: str) -> None:
    stage = stage_api.DescribeStageResponse(stage="denoiser", serving=True, device="cpu", dtype="bf16")
    stage.load.queued_count, stage.load.queue_limit = 3, 64
    stage.denoiser.subject_words.append("ring")
    model = api.RoutedModel(
        name="pico", serving=True, stages=[api.RoutedStage(target="a:1", description=stage)]
    )
    gone = api.RoutedModel(name="gone", stages=[api.RoutedStage(target="b:1", problem="nothing answers")])
    orchestrator.models = api.ListModelsResponse(models=[model, gone], default_model="pico")
    with Client(target) as client:
        status, models = client.status(), client.models()
    assert status.models == models
    assert not status.is_serving
    assert status.problems == ("gone: nothing answers",)
    pico, gone_model = models
    assert (pico.is_default, pico.is_serving, pico.subject_words) == (True, True, ("ring",))
    assert (pico.stages[0].queued_count, pico.stages[0].estimated_wait_seconds) == (3, None)
    assert not gone_model.stages[0].is_reachable


def picture(format_name: str, size: tuple[int, int] = (4, 2)) -> bytes:
    file = BytesIO()
    pillow.new("RGB", size, "red").save(file, format_name)
    return file.getvalue()


def image(format_name: str, data: bytes, index: int = 0) -> Image:
    return Image(index, 7, 4, 2, format_name, data)


@pytest.mark.parametrize(
    ("format_name", "name", "written"),
    [
        ("png", "ring.png", "ring.png"),
        ("png", "ring.PNG", "ring.PNG"),
        ("png", "ring", "ring.png"),
        ("jpeg", "ring.jpg", "ring.jpg"),
        ("jpeg", "ring.jpeg", "ring.jpeg"),
        ("webp", "ring", "ring.webp"),
    ],
)
def test_an_image_is_saved_under_a_name_of_its_format(
    tmp_path: Path, format_name: str, name: str, written: str
) -> None:
    data = picture(format_name)
    path = image(format_name, data).save(tmp_path / name)
    assert path == tmp_path / written
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["ring.jpg", "ring.txt"])
def test_a_suffix_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="image is png; ask for another format"):
        image("png", picture("png")).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_several_images_are_numbered(tmp_path: Path) -> None:
    images = (image("png", b"one"), image("png", b"two", 1))
    summary = api.GenerationSummary()
    with_summary = Generation(images, klein_client.results.read_event(_message(summary)))
    assert with_summary.save(tmp_path / "ring.png") == (tmp_path / "ring-1.png", tmp_path / "ring-2.png")
    assert with_summary.save(str(tmp_path / "heart"))[1] == tmp_path / "heart-2.png"


def _message(summary: api.GenerationSummary) -> api.StreamGenerateImageResponse:
    return api.StreamGenerateImageResponse(summary=summary)


def test_pillow_gets_the_pixels() -> None:
    assert image("png", picture("png")).pil().getpixel((1, 1)) == (255, 0, 0)
    raw = image("raw", bytes(range(24))).pil()
    assert (raw.size, raw.getpixel((1, 0))) == ((4, 2), (3, 4, 5))


def test_a_violation_names_the_argument(target: str) -> None:
    with Client(target) as client, pytest.raises(InvalidRequest) as failure:
        client.generate("a star", width="wide")
    assert failure.value.violations[0].field == "width_px"
    assert failure.value.violations[0].argument == "width"
    assert str(failure.value) == "width cannot be of type str"


def test_an_unknown_option_is_a_type_error(target: str) -> None:
    with Client(target) as client:
        with pytest.raises(TypeError, match="'step'; did you mean 'steps'"):
            client.generate("a star", step=4)
        with pytest.raises(TypeError, match="stream"):
            client.stream("a star", nonsense=4)

"""Bad input: every violation at once, by the field's public name, and nothing is left running."""

from __future__ import annotations

import grpc
import pytest

from klein_api.v1.image_pb2 import Adapter
from klein_api.v1.image_service_pb2 import GenerateImageRequest, ImageSpec, StreamGenerateImageRequest
from klein_services.runtime.status import explain
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, refusal

REFERENCE = reference_file(64, 64)


@pytest.fixture
async def suite():
    async with FakeSuite(settings={"maximum_reference_bytes": 1024}).running() as running:
        yield running


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"width_px": 65}, "width_px", "multiple of 16"),
        ({"width_px": 48}, "width_px", "at least 64"),
        ({"height_px": 0}, "height_px", "at least 64"),
        ({"height_px": -64}, "height_px", "at least 64"),
        ({"width_px": 2064, "height_px": 2048}, "width_px", "4194304"),
        ({"width_px": 2147483632, "height_px": 2147483632}, "width_px", "4194304"),
        ({"references": [REFERENCE], "width_px": 65552}, "width_px", "pixels"),
        ({"width_px": 16400, "height_px": 64, "format": 3}, "width_px", "webp allows at most 16383"),
        ({"width_px": 64, "height_px": 65536, "format": 2}, "height_px", "jpeg allows at most 65500"),
        ({"step_count": 0}, "step_count", "[1, 1000]"),
        ({"step_count": 100000}, "step_count", "[1, 1000]"),
        ({"seed": -1}, "seed", "2^63 - 1"),
        ({"seed": 2**63 - 1, "image_count": 2}, "seed", "2^63 - 1"),
        ({"image_count": 0}, "image_count", "[1, 8]"),
        ({"image_count": -3}, "image_count", "is -3"),
        ({"image_count": 2147483647}, "image_count", "[1, 8]"),
        ({"references": [REFERENCE] * 5}, "references", "at most 4"),
        ({"adapters": [Adapter(name=f"a{i}") for i in range(9)]}, "adapters", "has 9; at most 8"),
        ({"adapters": [Adapter(name="../secret")]}, "adapters[0].name", "is '../secret'; must be"),
        ({"adapters": [Adapter(name="a"), Adapter()]}, "adapters[1].name", "is ''; must be"),
        ({"adapters": [Adapter(name="a"), Adapter(name="a")]}, "adapters[1].name", "is 'a' again"),
        ({"adapters": [Adapter(name="a", scale=10.5)]}, "adapters[0].scale", "is 10.5; must be in [-10, 10]"),
        ({"adapters": [Adapter(name="a", scale=float("nan"))]}, "adapters[0].scale", "is nan"),
        ({"adapters": [Adapter(name="a", scale=float("-inf"))]}, "adapters[0].scale", "is -inf"),
        ({"references": [REFERENCE, b""]}, "references[1]", "is empty"),
        ({"references": [REFERENCE, bytes(1025)]}, "references[1]", "at most 1024"),
        ({"references": [REFERENCE, b"no image"]}, "references[1]", "is not an image"),
        ({"format": 99}, "format", "IMAGE_FORMAT_WEBP"),
        ({"quality": 90}, "quality", "lossless"),
        ({"format": 1, "quality": 90}, "quality", "lossless"),
        ({"format": 2, "quality": 0}, "quality", "[1, 100]"),
        ({"format": 3, "quality": 101}, "quality", "[1, 100]"),
        ({"guidance_scale": 4.0}, "guidance_scale", "distilled"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "finite"),
        ({"negative_prompt": "blur"}, "negative_prompt", "distilled"),
        ({"prompt": "x" * 32769}, "prompt", "32768"),
        ({"prompt": "é" * 32768, "embed_prompt": True}, "embed_prompt", "60000"),
        ({"priority": 9}, "priority", "PRIORITY_BATCH"),
    ],
)
async def test_a_bad_field_is_named_with_its_limit(suite, spec, field, words):
    details = await refusal(suite, **spec)
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {violation.field for violation in details.violations} == {field}
    assert words in details.violations[0].description
    # Only what the stages have to judge reaches them.
    reached = sum(stage.calls for stage in suite.stages)
    assert reached == 0 or spec.get("references") == [REFERENCE, b"no image"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": 101.0}, "guidance_scale"),
        ({"negative_prompt": "x" * 32769}, "negative_prompt"),
    ],
)
async def test_a_base_model_has_limits_of_its_own(suite, spec, field):
    suite.denoiser.distilled = False
    details = await refusal(suite, **spec)
    assert [violation.field for violation in details.violations] == [field]


async def test_all_violations_come_at_once(suite):
    details = await refusal(
        suite,
        width_px=65,
        height_px=1,
        step_count=0,
        seed=-5,
        image_count=99,
        format=42,
        quality=3,
        priority=8,
    )
    assert {violation.field for violation in details.violations} == {
        "width_px",
        "height_px",
        "step_count",
        "seed",
        "image_count",
        "format",
        "quality",
        "priority",
    }


async def test_a_negative_preview_interval_is_refused(suite):
    request = StreamGenerateImageRequest(spec=ImageSpec(), preview_interval_steps=-1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in suite.images.StreamGenerateImage(request):
            pass
    (violation,) = explain(caught.value).violations
    assert violation.field == "preview_interval_steps"


async def test_an_unknown_model_is_not_found_and_the_known_ones_are_named(suite):
    details = await refusal(suite, model="klein-9000")
    assert details.code is grpc.StatusCode.NOT_FOUND
    assert "klein-9000" in details.message
    assert "fake" in details.message


async def test_a_model_name_of_any_length_is_not_found(suite):
    details = await refusal(suite, model="klein" * 20_000)
    assert details.code is grpc.StatusCode.NOT_FOUND
    assert len(details.message) < 500


@pytest.mark.parametrize(
    ("given", "size_px"),
    [({}, (144, 96)), ({"width_px": 128}, (128, 96)), ({"width_px": 128, "height_px": 128}, (128, 128))],
)
async def test_a_size_that_a_huge_reference_gives_is_scaled_to_fit(given, size_px):
    async with FakeSuite(settings={"maximum_pixel_count": 128 * 128}).running() as suite:
        references = (reference_file(1248, 832),)
        response = await generate(suite, references=references, seed=1, **given)
        assert response.images[0].data == suite.expected_image("", 1, size_px, references)


async def test_a_given_side_that_is_too_long_with_the_references_other_is_refused():
    async with FakeSuite(settings={"maximum_pixel_count": 128 * 128}).running() as suite:
        details = await refusal(suite, references=[reference_file(1024, 1024)], width_px=144)
        assert details.code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.violations[0].field == "width_px"
        assert "at most 16384 are allowed" in details.violations[0].description


async def test_ten_references_are_allowed_by_setting():
    async with FakeSuite(settings={"maximum_reference_count": 10}).running() as suite:
        references = [reference_file(64, 64, str(index)) for index in range(10)]
        spec = ImageSpec(references=references, seed=1)
        response = await suite.images.GenerateImage(GenerateImageRequest(spec=spec))
        assert response.images[0].data == suite.expected_image("", 1, (64, 64), tuple(references))
        details = await refusal(suite, references=[*references, references[0]])
        assert "at most 10" in details.violations[0].description

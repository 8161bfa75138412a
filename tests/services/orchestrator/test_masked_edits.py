"""Masked edits: their fields, their files and tensors at each stage, their cache, and what is refused."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from klein_api.v1 import image_pb2
from klein_api.v1.image_pb2 import ImageExpansion, InpaintingSpec
from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.tensor_cache import CacheKey
from klein_services.runtime.errors import StageUnavailable
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running, refusal
from tests.services.fakes.runtime_toy import failure, until

INITIAL, MASK, REFERENCE = reference_file(96, 80, "initial"), b"mask:", reference_file(64, 64)
PIXEL_COUNT = 4 * 1024 * 1024


@pytest.fixture
async def suite():
    async with FakeSuite(settings={"maximum_reference_bytes": 4 << 20}).running() as running:
        yield running


def masked_edit(*, strength: float = 0.8, has_overlay: bool = True, mask: bytes | None = MASK, **options):
    inpainting = InpaintingSpec(pixel_count=PIXEL_COUNT, **options)
    return MaskedEdit(INITIAL, mask, strength, inpainting, has_overlay)


@pytest.mark.parametrize(
    ("spec", "edit"),
    [
        ({"mask": MASK}, masked_edit()),
        ({"mask": MASK, "strength": 0.3}, masked_edit(strength=0.3)),
        ({"mask": MASK, "mask_is_alpha": True}, masked_edit(mask_is_alpha=True)),
        ({"mask": MASK, "preserve_unmasked": False}, masked_edit(has_overlay=False)),
        ({"mask": MASK, "format": image_pb2.IMAGE_FORMAT_JPEG}, masked_edit(has_overlay=False)),
        ({"mask": MASK, "format": image_pb2.IMAGE_FORMAT_WEBP, "preserve_unmasked": True}, masked_edit()),
        (
            {"mask": MASK, "mask_padding_px": 0, "preserve_unmasked": False},
            masked_edit(mask_padding_px=0),
        ),
        ({"expand": ImageExpansion(left_px=8)}, masked_edit(mask=None, expand=ImageExpansion(left_px=8))),
        # Without a mask all is made anew, and nothing is left to lay over.
        ({}, masked_edit(mask=None, has_overlay=False)),
    ],
)
async def test_files_and_options_reach_every_stage(suite, spec, edit):
    response = await generate(suite, prompt="fox", seed=1, initial_image=INITIAL, **spec)
    image_format = spec.get("format", image_pb2.IMAGE_FORMAT_PNG)
    expected = suite.expected_image("fox", 1, (96, 80), edit=edit, image_format=image_format)
    assert [image.data for image in response.images] == [expected]
    assert response.summary.flow == "masked-edit"
    assert response.summary.input_megapixels == pytest.approx(96 * 80 / 1e6)
    assert response.summary.output_megapixels == pytest.approx(96 * 80 / 1e6)
    [decoded] = suite.vae_decoder.decode_specs
    assert decoded.metadata["strength"] == f"{edit.strength:g}"


async def test_references_come_after_the_initial_image_and_its_timing(suite):
    images = await generate(
        suite, prompt="fox", seed=1, image_count=2, initial_image=INITIAL, mask=MASK, references=[REFERENCE]
    )
    assert [image.data for image in images.images] == [
        suite.expected_image("fox", seed, (96, 80), (REFERENCE,), edit=masked_edit()) for seed in (1, 2)
    ]
    operations = [timing.operation for timing in images.summary.stage_timings]
    assert operations == ["encode-prompt", "encode-initial-image", "encode-reference", "denoise", "decode"]
    assert images.summary.input_megapixels == pytest.approx((96 * 80 + 64 * 64) / 1e6)
    assert images.summary.output_megapixels == pytest.approx(2 * 96 * 80 / 1e6)
    assert suite.denoiser.specs[0].reference_count == 1


async def test_files_of_several_chunks_arrive_whole(suite):
    initial, mask = INITIAL + bytes(range(256)) * (3 << 12), MASK + bytes(3 << 20)
    await generate(suite, seed=1, initial_image=initial, mask=mask)
    assert suite.vae_decoder.initial_images == [(initial, mask)]


async def test_the_cache_answers_only_equal_files_and_options(suite):
    specs = [{}, {"mask": MASK}, {"mask": MASK, "mask_is_alpha": True}, {"mask": MASK + b"other"}]
    for spec in specs * 2:
        response = await generate(suite, prompt="fox", seed=1, initial_image=INITIAL, **spec)
    assert len(suite.vae_decoder.initial_images) == len(specs)
    calls = {timing.operation: timing.call_count for timing in response.summary.stage_timings}
    assert calls["encode-initial-image"] == 0
    # Strength is the denoiser's; the tensors stay the same.
    await generate(suite, prompt="fox", seed=1, initial_image=INITIAL, mask=MASK, strength=0.5)
    assert len(suite.vae_decoder.initial_images) == len(specs)


def test_parts_of_a_cache_key_do_not_run_into_each_other():
    keys = {CacheKey.of("k", "m", *parts) for parts in ([b"ab"], [b"a", b"b"], [b"ab", b""], [b"", b"ab"])}
    assert len(keys) == 4


async def test_previews_have_no_overlay(suite):
    suite.denoiser.step_seconds = 0.05
    spec = ImageSpec(prompt="fox", seed=1, initial_image=INITIAL, mask=MASK)
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=spec, preview_interval_steps=2))
    events = [event async for event in call]
    assert any(event.HasField("preview") for event in events)
    overlays = {decoded.format: decoded.HasField("overlay") for decoded in suite.vae_decoder.decode_specs}
    assert overlays == {image_pb2.IMAGE_FORMAT_JPEG: False, image_pb2.IMAGE_FORMAT_PNG: True}


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"mask": MASK}, "mask", "needs an initial_image"),
        ({"strength": 0.5}, "strength", "needs an initial_image"),
        ({"mask_padding_px": 8}, "mask_padding_px", "needs an initial_image"),
        ({"expand": ImageExpansion(top_px=1)}, "expand", "needs an initial_image"),
        ({"mask_is_alpha": True}, "mask_is_alpha", "needs an initial_image"),
        ({"preserve_unmasked": False}, "preserve_unmasked", "needs an initial_image"),
        ({"initial_image": INITIAL, "mask_is_alpha": True}, "mask_is_alpha", "needs a mask"),
        ({"initial_image": INITIAL, "mask_padding_px": 8}, "mask_padding_px", "needs a mask"),
        ({"initial_image": INITIAL, "mask": MASK, "mask_padding_px": 1025}, "mask_padding_px", "[0, 1024]"),
        ({"initial_image": INITIAL, "strength": 0.0}, "strength", "above 0"),
        ({"initial_image": INITIAL, "strength": float("nan")}, "strength", "above 0"),
        ({"initial_image": INITIAL, "expand": ImageExpansion(right_px=-1)}, "expand", "negative"),
        ({"initial_image": INITIAL, "width_px": 64}, "width_px", "decides the size"),
        ({"initial_image": b""}, "initial_image", "is empty"),
        ({"initial_image": INITIAL + bytes(4 << 20)}, "initial_image", "at most 4194304"),
        ({"initial_image": INITIAL, "mask": b""}, "mask", "is empty"),
        ({"initial_image": INITIAL, "mask": bytes((4 << 20) + 1)}, "mask", "at most 4194304"),
        ({"initial_image": INITIAL, "references": [REFERENCE] * 5}, "references", "at most 4"),
    ],
)
async def test_a_bad_field_is_named_before_any_stage_is_asked(suite, spec, field, words):
    details = await refusal(suite, **spec)
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {violation.field for violation in details.violations} == {field}
    assert words in details.violations[0].description
    assert not any(stage.calls for stage in suite.stages)


async def test_every_bad_file_is_named_at_once(suite):
    details = await refusal(
        suite, initial_image=INITIAL, mask=b"no mask", references=[REFERENCE, b"no image"]
    )
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert {violation.field for violation in details.violations} == {"mask", "references[1]"}
    await nothing_left_running()


async def test_an_initial_image_below_the_smallest_size_is_refused(suite):
    details = await refusal(suite, initial_image=reference_file(48, 80))
    assert [violation.field for violation in details.violations] == ["width_px"]


async def test_a_lost_stage_is_tried_again_with_the_same_files(suite):
    suite.vae_decoder.encode_error = StageUnavailable("lost")
    request = generate(suite, seed=1, initial_image=INITIAL, mask=MASK)
    details = await failure(request)
    assert details.code() is grpc.StatusCode.UNAVAILABLE
    assert len(suite.vae_decoder.initial_images) >= 2
    assert set(suite.vae_decoder.initial_images) == {(INITIAL, MASK)}


async def test_a_caller_that_goes_away_ends_the_encoding(suite):
    suite.vae_decoder.delay_seconds = 60.0
    spec = ImageSpec(seed=1, initial_image=INITIAL, mask=MASK)
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=spec))
    reading = call.read()
    await suite.vae_decoder.started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: suite.vae_decoder.cancelled == 1)
    await nothing_left_running()

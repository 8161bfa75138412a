"""What requests turn into when all goes well: flows, sizes, seeds, events, caches, and many at once."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import REGISTRY

from klein_api.v1 import image_pb2
from klein_api.v1.image_pb2 import Adapter
from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    ImageSpec,
    ListModelsRequest,
    StreamGenerateImageRequest,
)
from klein_core.image_format import TRAINED_ALGORITHMIC_MEDIA
from klein_services.runtime.channels import STAGE_MESSAGE_BYTES
from klein_services.runtime.errors import StageUnavailable
from tests.services.fakes.fake_denoiser import FakeDenoiser
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, refusal
from tests.services.fakes.runtime_toy import until


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


async def test_text_to_image_gives_the_image_of_its_prompt_and_seed(suite):
    response = await generate(suite, prompt="a fox", seed=7)
    assert [image.data for image in response.images] == [suite.expected_image("a fox", 7)]
    image, summary = response.images[0], response.summary
    assert (image.seed, image.width_px, image.height_px) == (7, 64, 64)
    assert image.format == image_pb2.IMAGE_FORMAT_PNG
    assert (summary.flow, summary.model, summary.step_count) == ("text-to-image", "fake", 4)
    assert summary.guidance_scale == 1.0
    assert summary.output_megapixels == pytest.approx(64 * 64 / 1e6)
    assert summary.input_megapixels == 0
    assert summary.prompt_token_count == len("a fox")
    encode, *_ = summary.stage_timings
    assert not summary.warnings
    assert encode.queue_duration.ToMilliseconds() == 3
    assert encode.compute_duration.ToMilliseconds() == 5
    assert encode.call_duration.ToMicroseconds() > 0


async def test_an_empty_prompt_is_a_prompt(suite):
    response = await generate(suite, seed=1)
    assert response.images[0].data == suite.expected_image("", 1)


async def test_a_truncated_prompt_is_reported(suite):
    suite.text_encoder.truncated = True
    response = await generate(suite, prompt="long")
    assert response.summary.prompt_truncated


@pytest.mark.parametrize(
    ("given", "size_px"),
    [
        ({}, (96, 80)),
        ({"width_px": 128}, (128, 80)),
        ({"height_px": 64}, (96, 64)),
        ({"width_px": 64, "height_px": 128}, (64, 128)),
    ],
)
async def test_an_edit_takes_each_side_that_is_not_given_from_the_first_reference(suite, given, size_px):
    references = (reference_file(96, 80), reference_file(64, 64, "second"))
    for count, flow in ((1, "edit"), (2, "multi-reference")):
        response = await generate(suite, prompt="edit", seed=3, references=references[:count], **given)
        assert response.images[0].data == suite.expected_image("edit", 3, size_px, references[:count])
        assert (response.images[0].width_px, response.images[0].height_px) == size_px
        assert response.summary.flow == flow
        seen = sum(width * height for width, height in [(96, 80), (64, 64)][:count])
        assert response.summary.input_megapixels == pytest.approx(seen / 1e6)


async def test_the_pixels_that_are_counted_are_those_of_the_images(suite):
    labels = {"model": "fake", "flow": "edit"}
    before = REGISTRY.get_sample_value("klein_pixels_total", labels) or 0
    await generate(suite, references=[reference_file(96, 80)], image_count=2)
    assert REGISTRY.get_sample_value("klein_pixels_total", labels) == before + 2 * 96 * 80


async def test_several_images_take_consecutive_seeds_in_order(suite):
    response = await generate(suite, prompt="foxes", seed=10, image_count=3)
    assert [(image.index, image.seed) for image in response.images] == [(0, 10), (1, 11), (2, 12)]
    assert [image.data for image in response.images] == [
        suite.expected_image("foxes", s) for s in (10, 11, 12)
    ]
    assert suite.denoiser.calls == 1


async def test_an_unset_seed_is_random_and_reported(suite):
    seeds = {(await generate(suite, prompt="fox")).images[0].seed for _ in range(3)}
    assert len(seeds) == 3
    response = await generate(suite, prompt="fox")
    assert response.images[0].data == suite.expected_image("fox", response.images[0].seed)


async def test_format_and_quality_reach_the_decoder(suite):
    response = await generate(suite, seed=1, format=image_pb2.IMAGE_FORMAT_WEBP, quality=80)
    expected = suite.expected_image("", 1, image_format=image_pb2.IMAGE_FORMAT_WEBP, quality=80)
    assert response.images[0].data == expected


async def test_the_file_holds_its_seed_but_not_the_prompt(suite):
    await generate(suite, prompt="secret", seed=5)
    assert dict(suite.vae_decoder.decode_specs[0].metadata) == {
        "DigitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
        "model": "fake",
        "seed": "5",
        "steps": "4",
    }


async def test_the_file_holds_the_prompts_of_a_client_that_asks_for_it(suite):
    suite.denoiser.distilled = False
    await generate(suite, prompt="a fox", negative_prompt="blur", seed=5, embed_prompt=True)
    metadata = dict(suite.vae_decoder.decode_specs[0].metadata)
    assert (metadata["prompt"], metadata["negative_prompt"], metadata["seed"]) == ("a fox", "blur", "5")


async def test_a_base_model_gets_its_defaults_and_a_negative_prompt(suite):
    suite.denoiser.distilled = False
    response = await generate(suite, prompt="fox", negative_prompt="blur", seed=2)
    assert response.images[0].data == suite.expected_image("fox", 2, negative="blur")
    assert (response.summary.step_count, response.summary.guidance_scale) == (50, 4.0)
    response = await generate(suite, prompt="fox", seed=2)
    assert response.images[0].data == suite.expected_image("fox", 2, negative="")
    response = await generate(suite, prompt="fox", seed=2, guidance_scale=1)
    assert response.images[0].data == suite.expected_image("fox", 2)


async def test_the_stream_has_queued_steps_previews_images_and_one_summary(suite):
    suite.denoiser.step_seconds = 0.05
    request = StreamGenerateImageRequest(
        spec=ImageSpec(prompt="fox", seed=4, image_count=2), preview_interval_steps=2
    )
    events = [event async for event in suite.images.StreamGenerateImage(request)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "queued"
    assert (events[0].queued.position, events[0].queued.estimated_wait.ToMilliseconds()) == (2, 1500)
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3, 4]
    assert kinds.count("preview") >= 1
    preview = events[kinds.index("preview")].preview
    assert preview.step == 2
    assert {event.image.step for event in events if event.HasField("image")} == {0}
    assert (preview.index, preview.seed, preview.format) == (0, 4, image_pb2.IMAGE_FORMAT_JPEG)
    assert preview.data.startswith(b"IMAGE")
    assert sorted(event.image.index for event in events if event.HasField("image")) == [0, 1]
    assert kinds.count("summary") == 1
    assert kinds[-1] == "summary"


async def test_timings_are_in_the_order_of_the_requests_life_whatever_ends_first(suite):
    suite.text_encoder.delay_seconds = 0.2
    response = await generate(suite, references=[reference_file(64, 64)], width_px=64, height_px=64)
    operations = [timing.operation for timing in response.summary.stage_timings]
    assert operations == ["encode-prompt", "encode-reference", "denoise", "decode"]


async def test_an_image_larger_than_a_stages_message_reaches_the_caller(suite):
    suite.vae_decoder.padding = bytes(range(256)) * (5 << 12)
    expected = suite.expected_image("fox", 1) + suite.vae_decoder.padding
    assert len(expected) > STAGE_MESSAGE_BYTES
    response = await generate(suite, prompt="fox", seed=1)
    assert response.images[0].data == expected
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec(prompt="fox", seed=1)))
    assert [event.image.data async for event in call if event.HasField("image")] == [expected]


async def test_each_image_is_sent_as_soon_as_it_is_finished(suite):
    suite.denoiser.image_gates[1] = asyncio.Event()
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec(seed=1, image_count=2)))
    seen = []
    async for event in call:
        if event.HasField("image"):
            seen.append(event.image.index)
            suite.denoiser.image_gates[1].set()
    assert seen == [0, 1]


async def test_a_failing_preview_does_not_fail_the_request(suite):
    suite.denoiser.step_seconds = 0.05
    suite.vae_decoder.decode_error = StageUnavailable("no previews today")
    suite.denoiser.image_gates[0] = asyncio.Event()
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(seed=1), preview_interval_steps=1)
    )
    kinds = []
    async for event in call:
        kinds.append(event.WhichOneof("event"))
        if event.step.step == 4:
            await until(lambda: suite.vae_decoder.calls >= 2)
            suite.vae_decoder.decode_error = None
            suite.denoiser.image_gates[0].set()
    assert kinds.count("preview") <= 1
    assert kinds[-1] == "summary"


async def test_a_slow_preview_never_holds_up_the_steps(suite):
    suite.vae_decoder.decode_gate = asyncio.Event()
    suite.denoiser.step_seconds = 0.01
    call = suite.images.StreamGenerateImage(
        StreamGenerateImageRequest(spec=ImageSpec(seed=1, step_count=30), preview_interval_steps=1)
    )
    async for event in call:
        if event.step.step == 30:
            suite.vae_decoder.decode_gate.set()
    # The first preview and the image; the previews in between were dropped.
    assert len(suite.vae_decoder.decode_specs) <= 3


async def test_the_request_id_travels_to_every_stage_and_back(suite):
    request = GenerateImageRequest(spec=ImageSpec(references=[reference_file(64, 64)]))
    response = await suite.images.GenerateImage(request, metadata=(("x-request-id", "order-66"),))
    assert response.summary.request_id == "order-66"
    for stage in suite.stages:
        assert {call["x-request-id"] for call in stage.metadata} == {"order-66"}


async def test_the_deadline_travels_to_every_stage(suite):
    request = GenerateImageRequest(spec=ImageSpec(references=[reference_file(64, 64)]))
    await suite.images.GenerateImage(request, timeout=400)
    for stage in suite.stages:
        # gRPC rounds up what is left.
        assert all(100 < remaining < 410 for remaining in stage.remaining_seconds)
    await suite.images.GenerateImage(request)
    assert all(remaining < 4000 for remaining in suite.denoiser.remaining_seconds)


async def test_eight_requests_at_once_never_mix(suite):
    suite.denoiser.step_seconds = 0.005
    cases = [
        (f"prompt {index}", index, tuple(reference_file(64, 80, f"{index} {n}") for n in range(index % 3)))
        for index in range(8)
    ]
    responses = await asyncio.gather(
        *(generate(suite, prompt=p, seed=s, references=r, width_px=64, height_px=96) for p, s, r in cases)
    )
    for (prompt, seed, references), response in zip(cases, responses, strict=True):
        assert response.images[0].data == suite.expected_image(prompt, seed, (64, 96), references)
        assert response.summary.prompt_token_count == len(prompt)


async def test_equal_content_is_encoded_once(suite):
    reference = reference_file(96, 80, "x")
    first = await generate(suite, prompt="fox", seed=1, references=[reference])
    again = await generate(suite, prompt="fox", seed=1, references=[reference])
    other = await generate(suite, prompt="fox!", seed=1, references=[reference])
    assert first.images[0].data == again.images[0].data
    assert other.images[0].data == suite.expected_image("fox!", 1, (96, 80), (reference,))
    assert suite.text_encoder.prompts == ["fox", "fox!"]
    assert suite.vae_decoder.references == [reference]
    assert again.summary.input_megapixels == first.summary.input_megapixels
    assert again.summary.prompt_token_count == len("fox")
    cached = {t.operation: t.call_count for t in again.summary.stage_timings}
    assert cached == {"encode-prompt": 0, "encode-reference": 0, "denoise": 1, "decode": 1}


async def test_what_other_weights_made_is_not_used_again():
    async with FakeSuite(settings={"describe_ttl_seconds": 0.0}).running() as suite:
        references = [reference_file(96, 80, "x")]
        for digests in (("first", "first"), ("second", "first"), ("second", "second"), ("first", "first")):
            suite.text_encoder.weights_digest, suite.vae_decoder.weights_digest = digests
            await generate(suite, prompt="fox", seed=1, references=references)
        # Each stage was asked once for each set of its weights; what the first ones made is still good at the end.
        assert suite.text_encoder.prompts == ["fox"] * 2
        assert suite.vae_decoder.references == references * 2


async def test_adapters_reach_the_denoiser_and_leave_the_caches_alone():
    """Prompts and references are encoded without adapters, so what was encoded before is good for any."""
    async with FakeSuite().running() as suite:
        spec = {"prompt": "a star", "references": [reference_file(96, 80)], "seed": 1}
        first = await generate(suite, **spec)
        wanted = [Adapter(name="ink"), Adapter(name="oil", scale=-0.5)]
        again = await generate(suite, **spec, adapters=wanted)
    cached = {t.operation: t.call_count for t in again.summary.stage_timings}
    assert cached == {"encode-prompt": 0, "encode-reference": 0, "denoise": 1, "decode": 1}
    assert not suite.denoiser.specs[0].adapters
    sent = [(adapter.name, adapter.scale) for adapter in suite.denoiser.specs[1].adapters]
    assert sent == [("ink", 1.0), ("oil", -0.5)]
    assert len(first.images) == len(again.images) == 1


async def test_without_a_cache_everything_is_encoded_anew():
    async with FakeSuite(settings={"cache_bytes": 0}).running() as suite:
        for _ in range(2):
            response = await generate(suite, prompt="fox", seed=1)
            assert response.images[0].data == suite.expected_image("fox", 1)
        assert suite.text_encoder.prompts == ["fox", "fox"]


async def test_list_models_names_the_silent_stage_before_the_clients_deadline(suite):
    suite.denoiser.describe_gate = asyncio.Event()
    response = await suite.images.ListModels(ListModelsRequest(), timeout=4)
    problems = [stage.problem for stage in response.models[0].stages]
    assert "does not answer" in problems[1]
    assert (problems[0], problems[2]) == ("", "")
    assert not response.models[0].serving


async def test_list_models_has_limits_defaults_and_stages(suite):
    suite.vae_decoder.serving = False
    response = await suite.images.ListModels(ListModelsRequest())
    (model,) = response.models
    assert (response.default_model, model.name, model.serving) == ("fake", "fake", False)
    assert (model.distilled, model.default_step_count, model.default_guidance_scale) == (True, 4, 1.0)
    limits = model.limits
    assert (limits.reference_count, limits.image_count, limits.default_size_px) == (4, 8, 64)
    assert (limits.pixel_count, limits.step_count, limits.reference_bytes) == (4194304, 1000, 20 << 20)
    assert [stage.target for stage in model.stages] == list(suite.targets.values())
    assert [stage.problem != "" for stage in model.stages] == [False, False, True]
    assert "loading" in model.stages[2].problem
    suite.vae_decoder.serving = True
    response = await suite.images.ListModels(ListModelsRequest())
    assert response.models[0].serving


async def test_the_smaller_of_the_orchestrators_and_the_models_sizes_holds():
    denoiser = FakeDenoiser(default_size_px=128, pixel_count=256 * 256, description="Draws foxes.")
    async with FakeSuite(denoiser=denoiser, settings={"default_size_px": 1024}).running() as suite:
        response = await generate(suite, prompt="fox", seed=1)
        assert response.images[0].data == suite.expected_image("fox", 1, (128, 128))
        (model,) = (await suite.images.ListModels(ListModelsRequest())).models
        assert (model.limits.default_size_px, model.limits.pixel_count) == (128, 256 * 256)
        assert model.description == "Draws foxes."
        details = await refusal(suite, width_px=272, height_px=256)
        assert "at most 65536 are allowed" in details.violations[0].description
    settings = {"default_size_px": 64, "maximum_pixel_count": 80 * 80}
    async with FakeSuite(denoiser=denoiser, settings=settings).running() as suite:
        (model,) = (await suite.images.ListModels(ListModelsRequest())).models
        assert (model.limits.default_size_px, model.limits.pixel_count) == (64, 80 * 80)


async def test_a_default_size_that_the_models_limit_does_not_allow_is_made_smaller():
    denoiser = FakeDenoiser(pixel_count=100 * 100)
    async with FakeSuite(denoiser=denoiser, settings={"default_size_px": 1024}).running() as suite:
        assert (await generate(suite)).images[0].width_px == 96


@pytest.mark.parametrize(
    ("prompt", "warns"),
    [
        ("a fox", False),
        ("A FOX!", False),
        ("fox", False),
        ("two:foxes", False),
        ("an arctic  Fox-like thing", False),
        ("ein Fuchs im FLU\u00df", False),
        ("un renard tre\u0300s beau", False),
        ("a foxglove", True),
        ("outfox", True),
        ("arctic", True),
        ("", True),
        ("\U0001f98a", True),
    ],
)
async def test_a_prompt_without_a_word_that_the_model_knows_gives_a_warning(prompt, warns):
    words = ("fox", "foxes", "arctic fox", "fluss", "tr\u00e8s")
    async with FakeSuite(denoiser=FakeDenoiser(subject_words=words)).running() as suite:
        warnings = (await generate(suite, prompt=prompt)).summary.warnings
        assert len(warnings) == warns
        assert all("'fake'" in warning and "fox, foxes" in warning for warning in warnings)
        edited = await generate(suite, prompt=prompt, references=[reference_file(64, 64)])
        assert not edited.summary.warnings

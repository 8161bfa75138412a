"""Tensors that do not match the spec: the error names the field."""

from __future__ import annotations

import grpc
import pytest

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import tensor_pb2
from klein_services.runtime.tensors import tensor_frames
from tests.services.fakes.denoiser_refusals import refusal, save_both_variants
from tests.services.fakes.denoiser_server import (
    LATENT_CHANNELS,
    Tensors,
    image,
    prompt,
    random_tensor,
    request,
    spec,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_both_variants(tmp_path_factory)


def frames(tensor):
    return list(tensor_frames(tensor))


def prompt_parts(*parts):
    return [api.DenoiseLatentsRequest(prompt_embedding=part) for part in parts]


def reference_part(index, frame):
    part = api.IndexedTensorFrame(index=index, frame=frame)
    return api.DenoiseLatentsRequest(reference_latents=part)


GOOD = frames(prompt())
HALF = tensor_pb2.TensorFrame(spec=GOOD[0].spec, data=GOOD[0].data[:40])
REST = tensor_pb2.TensorFrame(data=GOOD[0].data[40:], xxh3=GOOD[0].xxh3)
NAN, INFINITE_PROMPT = prompt(), prompt()
NAN[3, 5] = float("nan")
INFINITE_PROMPT[0, 0] = float("-inf")
INFINITE, NAN_IMAGE = image(4, 4), image(4, 4)
INFINITE[0, 0, 0] = float("inf")
NAN_IMAGE[3, 3, 1] = float("nan")


def changed(frame, **fields):
    copy = tensor_pb2.TensorFrame()
    copy.CopyFrom(frame)
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def respecified(**fields):
    copy = changed(GOOD[0])
    copy.spec.MergeFrom(tensor_pb2.TensorSpec(**fields))
    return copy


@pytest.mark.parametrize(
    ("wish", "parts", "field", "said"),
    [
        pytest.param(spec(), [], "prompt_embedding", "missing", id="no tensor"),
        pytest.param(spec(), prompt_parts(HALF), "prompt_embedding", "incomplete", id="ends early"),
        pytest.param(
            spec(), prompt_parts(HALF, HALF), "prompt_embedding", "second spec", id="repeats a frame"
        ),
        pytest.param(
            spec(), prompt_parts(*GOOD, *GOOD), "prompt_embedding", "after its last", id="repeats a tensor"
        ),
        pytest.param(spec(), prompt_parts(REST), "prompt_embedding", "no spec", id="no spec"),
        pytest.param(
            spec(), prompt_parts(changed(GOOD[0], xxh3=b"x" * 16)), "prompt_embedding", "digest", id="digest"
        ),
        pytest.param(
            spec(),
            prompt_parts(HALF, changed(REST, data=b"x" * 9999)),
            "prompt_embedding",
            "more bytes",
            id="long",
        ),
        pytest.param(
            spec(),
            prompt_parts(respecified(data_type=99)),
            "prompt_embedding",
            "data type",
            id="unknown dtype",
        ),
        pytest.param(
            spec(),
            prompt_parts(*frames(random_tensor(7, 25))),
            "prompt_embedding",
            "[any, 24]",
            id="channels",
        ),
        pytest.param(
            spec(), prompt_parts(*frames(random_tensor(7, 24, 1))), "prompt_embedding", "[any, 24]", id="axes"
        ),
        pytest.param(
            spec(), prompt_parts(*frames(prompt(tokens=17))), "prompt_embedding", "at most", id="text tokens"
        ),
        pytest.param(spec(), prompt_parts(*frames(NAN)), "prompt_embedding", "NaN", id="NaN"),
        pytest.param(
            spec(),
            list(Tensors(negative_prompt_embedding=prompt()).parts()),
            "negative_prompt_embedding",
            "not expected",
            id="negative on a distilled model",
        ),
        pytest.param(
            spec(),
            list(Tensors(references=(image(4, 4),)).parts()),
            "reference_latents[0]",
            "not expected",
            id="extra reference",
        ),
        pytest.param(
            spec(reference_count=1),
            [*Tensors().parts(), reference_part(1, frames(image(4, 4))[0])],
            "reference_latents[1]",
            "not expected",
            id="index too large",
        ),
        pytest.param(
            spec(reference_count=1),
            [*Tensors().parts(), reference_part(-1, frames(image(4, 4))[0])],
            "reference_latents[-1]",
            "not expected",
            id="index negative",
        ),
        pytest.param(
            spec(reference_count=2),
            list(Tensors(references=(image(4, 4),)).parts()),
            "reference_latents[1]",
            "missing",
            id="missing reference",
        ),
        pytest.param(
            spec(reference_count=2),
            list(Tensors(references=(image(8, 8), image(7, 7))).parts()),
            "reference_latents",
            "113 tokens; at most 100",
            id="reference tokens in all",
        ),
        pytest.param(
            spec(reference_count=1),
            list(Tensors(references=(INFINITE,)).parts()),
            "reference_latents[0]",
            "infinity",
            id="infinity",
        ),
        pytest.param(
            spec(reference_count=1),
            list(Tensors(references=(random_tensor(4, 4, LATENT_CHANNELS + 1),)).parts()),
            "reference_latents[0]",
            f"[any, any, {LATENT_CHANNELS}]",
            id="reference channels",
        ),
        pytest.param(
            spec(resume_step=2),
            list(Tensors().parts()),
            "resume_latents[0]",
            "missing",
            id="nothing to resume",
        ),
        pytest.param(
            spec(resume_step=2),
            list(Tensors(resume=(image(5, 3),)).parts()),
            "resume_latents[0]",
            f"[4, 4, {LATENT_CHANNELS}]",
            id="resume of another size",
        ),
        pytest.param(
            spec(resume_step=2, seeds=[1, 2]),
            list(Tensors(resume=(image(4, 4), NAN_IMAGE)).parts()),
            "resume_latents[1]",
            "NaN",
            id="NaN to resume",
        ),
        pytest.param(
            spec(resume_step=2),
            list(Tensors(resume=(INFINITE,)).parts()),
            "resume_latents[0]",
            "infinity",
            id="infinity to resume",
        ),
        pytest.param(
            spec(),
            list(Tensors(resume=(image(4, 4),)).parts()),
            "resume_latents[0]",
            "not expected",
            id="resume without a step",
        ),
        pytest.param(spec(), [api.DenoiseLatentsRequest(spec=spec())], "spec", "twice", id="two specs"),
        pytest.param(spec(), [api.DenoiseLatentsRequest()], "part", "is empty", id="an empty part"),
    ],
)
async def test_tensors_that_do_not_fit_are_refused(folders, wish, parts, field, said):
    details = await refusal(folders[True], [api.DenoiseLatentsRequest(spec=wish), *parts])
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in [violation.field for violation in details.violations]
    assert said in details.message


@pytest.mark.parametrize(
    ("wish", "tensors", "said"),
    [
        (spec(guidance_scale=2.0), Tensors(), "missing"),
        (spec(), Tensors(), "missing"),
        (spec(guidance_scale=1.0), Tensors(negative_prompt_embedding=prompt()), "not expected"),
        (spec(), Tensors(negative_prompt_embedding=prompt(tokens=6)), "has shape [6, 24]"),
        (spec(), Tensors(negative_prompt_embedding=NAN), "NaN"),
        (spec(), Tensors(negative_prompt_embedding=INFINITE_PROMPT), "infinity"),
    ],
)
async def test_guidance_and_the_negative_prompt_go_together(folders, wish, tensors, said):
    details = await refusal(folders[False], request(wish, tensors))
    assert [violation.field for violation in details.violations] == ["negative_prompt_embedding"]
    assert said in details.message

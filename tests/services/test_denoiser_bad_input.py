"""Everything that a caller can get wrong: the status, the field, the limit, and nothing left running."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import stage_service_pb2, tensor_pb2
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from services.runtime.status import explain
from services.runtime.tensors import tensor_frames
from tests.services.denoiser_server import (
    LATENT_CHANNELS,
    Tensors,
    denoise,
    image,
    prompt,
    random_tensor,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)

LIMITS = {
    "reference_limit": 3,
    "reference_token_limit": 100,
    "image_limit": 4,
    "text_token_limit": 16,
    "receive_timeout_seconds": 0.5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        distilled: save_checkpoint(tmp_path_factory.mktemp("tiny"), distilled=distilled)
        for distilled in (True, False)
    }


async def refusal(folder, parts):
    """Makes a call that must fail; checks that nothing of it is left."""
    async with running_denoiser(folder, **LIMITS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await denoise(channel, parts)
        async with asyncio.timeout(10):
            while True:
                answer = await StageServiceStub(channel).DescribeStage(
                    stage_service_pb2.DescribeStageRequest()
                )
                if answer.load.queued_count == answer.load.running_count == 0:
                    break
    return explain(failure.value)


def frames(tensor):
    return list(tensor_frames(tensor))


def prompt_parts(*parts):
    return [api.DenoiseLatentsRequest(prompt_embedding=part) for part in parts]


def reference_part(index, frame):
    part = api.IndexedTensorFrame(index=index, frame=frame)
    return api.DenoiseLatentsRequest(reference_latents=part)


@pytest.mark.parametrize(
    ("fields", "violated", "said"),
    [
        ({"width_px": 65}, ["width_px"], "multiple of 16"),
        ({"height_px": 48}, ["height_px"], "at least 64"),
        ({"width_px": 4096, "height_px": 4096}, ["width_px"], "4194304"),
        ({"width_px": 2**31 - 16, "height_px": 2**31 - 16}, ["width_px"], "4194304"),
        ({"width_px": -64}, ["width_px"], "at least 64"),
        ({"step_count": 0}, ["step_count"], "[1, 1000]"),
        ({"step_count": 100000}, ["step_count"], "[1, 1000]"),
        ({"seeds": []}, ["seeds"], "[1, 4]"),
        ({"seeds": [1] * 5}, ["seeds"], "[1, 4]"),
        ({"seeds": [-1]}, ["seeds"], "2^63"),
        ({"guidance_scale": 4.0}, ["guidance_scale"], "distilled"),
        ({"guidance_scale": float("nan")}, ["guidance_scale"], "finite"),
        ({"reference_count": 4}, ["reference_count"], "at most 3"),
        ({"reference_count": -1}, ["reference_count"], ""),
        ({"preview_interval_steps": -1}, ["preview_interval_steps"], "at least 0"),
        ({"checkpoint_interval_steps": -5}, ["checkpoint_interval_steps"], "at least 0"),
        ({"resume_step": 4}, ["resume_step"], "[0, 3]"),
        ({"resume_step": -1}, ["resume_step"], "[0, 3]"),
        ({"priority": 77}, ["priority"], "PRIORITY_BATCH"),
        (
            {"width_px": 63, "height_px": 1, "step_count": 0, "seeds": [-1], "preview_interval_steps": -1},
            ["height_px", "preview_interval_steps", "seeds", "step_count", "width_px"],
            "",
        ),
    ],
)
async def test_a_spec_outside_its_limits_is_refused_whole(folders, fields, violated, said):
    details = await refusal(folders[True], request(spec(**fields)))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert sorted(violation.field for violation in details.violations) == violated
    assert said in details.message


async def test_another_model_is_not_found(folders):
    details = await refusal(folders[True], request(spec(model="larger")))
    assert (details.code, details.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    assert "tiny" in details.message


GOOD = frames(prompt())
HALF = tensor_pb2.TensorFrame(spec=GOOD[0].spec, data=GOOD[0].data[:40])
REST = tensor_pb2.TensorFrame(data=GOOD[0].data[40:], xxh3=GOOD[0].xxh3)
NAN = prompt()
NAN[3, 5] = float("nan")
INFINITE = image(4, 4)
INFINITE[0, 0, 0] = float("inf")


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
            prompt_parts(*frames(prompt().to(torch.bfloat16))),
            "prompt_embedding",
            "element type bf16; must be f32",
            id="other dtype",
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
            spec(),
            list(Tensors(resume=(image(4, 4),)).parts()),
            "resume_latents[0]",
            "not expected",
            id="resume without a step",
        ),
        pytest.param(spec(), [api.DenoiseLatentsRequest(spec=spec())], "spec", "twice", id="two specs"),
        pytest.param(spec(), [api.DenoiseLatentsRequest()], "part", "not set", id="an empty part"),
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
    ],
)
async def test_guidance_and_the_negative_prompt_go_together(folders, wish, tensors, said):
    details = await refusal(folders[False], request(wish, tensors))
    assert [violation.field for violation in details.violations] == ["negative_prompt_embedding"]
    assert said in details.message


@pytest.mark.parametrize("parts", [[], list(Tensors().parts())], ids=["nothing", "tensors first"])
async def test_the_spec_must_come_first(folders, parts):
    details = await refusal(folders[True], parts)
    assert [violation.field for violation in details.violations] == ["spec"]


async def test_a_stream_that_never_ends_is_cut_off_and_frees_its_place(folders):
    async with running_denoiser(folders[True], **LIMITS, queue_limit=1) as channel:

        async def endless():
            yield request(spec())[0]
            await asyncio.sleep(60)

        call = DenoiserServiceStub(channel).DenoiseLatents(endless())
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in call:
                pass
        details = explain(failure.value)
        assert (details.code, details.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "RECEIVE_TIMEOUT")
        assert "0.5 s" in details.message
        assert len((await denoise(channel, request(spec()))).latents) == 1

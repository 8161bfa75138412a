"""Invalid requests: the status, the field, the limit, and nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import tensor_pb2
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_services.runtime.status import explain
from klein_services.runtime.tensors import tensor_frames
from tests.services.fakes.denoiser_refusals import LIMITS, refusal, save_both_variants
from tests.services.fakes.denoiser_server import Tensors, denoise, prompt, request, running_denoiser, spec
from tests.services.fakes.runtime_toy import until


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_both_variants(tmp_path_factory)


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


@pytest.mark.parametrize("parts", [[], list(Tensors().parts())], ids=["nothing", "tensors first"])
async def test_the_spec_must_come_first(folders, parts):
    details = await refusal(folders[True], parts)
    assert [violation.field for violation in details.violations] == ["spec"]


async def stalled() -> AsyncIterator[api.DenoiseLatentsRequest]:
    """Ends neither its tensor nor its stream."""
    yield request(spec())[0]
    await asyncio.sleep(60)


async def trickling() -> AsyncIterator[api.DenoiseLatentsRequest]:
    """Sends a good tensor byte by byte, never as slowly as the receive timeout."""
    yield request(spec())[0]
    [whole] = tensor_frames(prompt())
    for position in range(len(whole.data)):
        frame = tensor_pb2.TensorFrame(data=whole.data[position : position + 1])
        if position == 0:
            frame.spec.CopyFrom(whole.spec)
        yield api.DenoiseLatentsRequest(prompt_embedding=frame)
        await asyncio.sleep(LIMITS["receive_timeout_seconds"] / 10)


@pytest.mark.parametrize("never_ending", [stalled, trickling])
async def test_a_stream_that_never_ends_is_cut_off_and_frees_its_place(folders, never_ending):
    async with running_denoiser(folders[True], **LIMITS, queue_limit=1) as channel:
        # The client would wait much longer, and its own deadline gives no reason.
        call = DenoiserServiceStub(channel).DenoiseLatents(never_ending(), timeout=60)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in call:
                pass
        details = explain(failure.value)
        assert (details.code, details.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "RECEIVE_TIMEOUT")
        assert f"{LIMITS['receive_timeout_seconds']:g} s" in details.message

        async def is_served() -> bool:
            try:
                return len((await denoise(channel, request(spec()))).latents) == 1
            except grpc.aio.AioRpcError as error:
                # The place is free at the end of the step that runs, a moment after the status.
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                return False

        await until(is_served)

"""Content policy: what it is asked and when, its denials, and a policy that hangs, dies or answers garbage."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from contextlib import asynccontextmanager
from io import BytesIO

import grpc
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from klein_api.v1 import content_policy_service_pb2 as pb
from klein_api.v1 import image_pb2
from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_services.runtime.channels import KEEPALIVE_MILLISECONDS
from klein_services.runtime.status import MESSAGE_BYTES
from tests.services.fakes.content_policy import ALLOW, DENY, FakeContentPolicy, decision
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running, refusal
from tests.services.fakes.runtime_toy import failure, until

INITIAL, MASK, REFERENCE = reference_file(96, 80, "initial"), b"mask:", reference_file(64, 64)


@asynccontextmanager
async def guarded(**settings):
    """Yields a suite and the policy that guards it."""
    async with FakeContentPolicy().running() as policy:
        options = {"content_policy_target": policy.target, "content_policy_timeout_seconds": 30.0}
        async with FakeSuite(settings=options | settings).running() as suite:
            yield suite, policy


@pytest.fixture
async def both():
    async with guarded() as pair:
        yield pair


def decisions() -> dict[tuple[str, str], float]:
    """Returns how many decisions were counted, by point and decision."""
    found = {}
    for point in ("request", "image"):
        for kind in ("allow", "deny", "error"):
            labels = {"point": point, "decision": kind}
            value = REGISTRY.get_sample_value("klein_content_policy_decisions_total", labels)
            assert value is not None, labels
            found[point, kind] = value
    return found


def counted(before) -> dict[tuple[str, str], float]:
    return {key: value - before[key] for key, value in decisions().items() if value != before[key]}


def stage_calls(suite) -> list[int]:
    return [stage.calls for stage in suite.stages]


async def test_what_is_allowed_is_made_and_the_policy_saw_all_of_it(both):
    suite, policy = both
    suite.denoiser.distilled = False
    before = decisions()
    response = await generate(
        suite,
        prompt="a fox",
        negative_prompt="blur",
        seed=1,
        image_count=2,
        initial_image=INITIAL,
        mask=MASK,
        references=[REFERENCE],
    )
    assert counted(before) == {("request", "allow"): 1, ("image", "allow"): 2}
    (request,) = policy.requests
    assert request.request_id == response.summary.request_id
    assert (request.model, request.flow, request.caller) == ("fake", "masked-edit", "127.0.0.1")
    assert (request.prompt, request.negative_prompt) == ("a fox", "blur")
    expected = [("initial_image", INITIAL), ("mask", MASK), ("references[0]", REFERENCE)]
    assert [(image.field, image.data) for image in request.input_images] == expected
    for image in request.input_images:
        assert image.sha256 == hashlib.sha256(image.data).digest()
        assert image.size_bytes == len(image.data)
    checked = sorted(policy.images, key=lambda image: image.index)
    assert [image.data for image in checked] == [image.data for image in response.images]
    assert [image.index for image in checked] == [0, 1]
    assert {image.request_id for image in checked} == {response.summary.request_id}
    assert {(image.width_px, image.height_px, image.format) for image in checked} == {
        (96, 80, image_pb2.IMAGE_FORMAT_PNG)
    }


async def test_a_denied_request_costs_no_stage_any_work(both):
    suite, policy = both
    policy.request_decision = DENY
    before = decisions()
    images = {"model": "fake", "flow": "edit", "outcome": "rejected"}
    rejected = REGISTRY.get_sample_value("klein_images_total", images) or 0
    details = await refusal(suite, prompt="bad", references=[REFERENCE])
    assert (details.code, details.reason) == (grpc.StatusCode.PERMISSION_DENIED, "CONTENT_DENIED")
    assert (
        details.message == "the content policy denies this request: it names a word that is not allowed here"
    )
    assert dict(details.metadata) == {"subject": "request", "reason_code": "DENIED_WORD"}
    assert stage_calls(suite) == [0, 0, 0]
    assert counted(before) == {("request", "deny"): 1}
    assert REGISTRY.get_sample_value("klein_images_total", images) == rejected + 1
    await nothing_left_running()


async def test_a_request_that_breaks_limits_is_refused_before_the_policy_is_asked(both):
    suite, policy = both
    details = await refusal(suite, prompt="fox", width_px=63)
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    assert policy.requests == []


async def test_a_denied_image_is_not_sent(both):
    suite, policy = both
    policy.image_decision = DENY
    before = decisions()
    details = await refusal(suite, prompt="fox", seed=1)
    assert (details.code, details.reason) == (grpc.StatusCode.PERMISSION_DENIED, "CONTENT_DENIED")
    assert dict(details.metadata)["subject"] == "image"
    assert counted(before) == {("request", "allow"): 1, ("image", "deny"): 1}
    await nothing_left_running()


async def test_a_stream_ends_at_its_first_denied_image(both):
    suite, policy = both
    policy.denied_index = 1
    events = []
    call = suite.images.StreamGenerateImage(StreamGenerateImageRequest(spec=ImageSpec(seed=1, image_count=3)))

    async def read():
        async for event in call:
            events.append(event)

    error = await failure(read())
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    sent = {event.image.index for event in events if event.HasField("image")}
    assert 1 not in sent
    assert not any(event.HasField("summary") for event in events)


async def test_there_are_no_previews_where_images_are_checked(both):
    suite, policy = both
    suite.denoiser.step_seconds = 0.05
    policy.image_decision = DENY
    request = StreamGenerateImageRequest(spec=ImageSpec(seed=1), preview_interval_steps=1)
    kinds = []

    async def read():
        async for event in suite.images.StreamGenerateImage(request):
            kinds.append(event.WhichOneof("event"))

    assert (await failure(read())).code() is grpc.StatusCode.PERMISSION_DENIED
    assert set(kinds) == {"queued", "step"}
    policy.image_decision = ALLOW
    events = [event async for event in suite.images.StreamGenerateImage(request)]
    assert "preview" not in [event.WhichOneof("event") for event in events]
    assert any("no previews" in warning for warning in events[-1].summary.warnings)


async def test_a_policy_for_requests_only_gets_no_image_and_allows_previews():
    async with guarded(content_policy_points="request") as (suite, policy):
        suite.denoiser.step_seconds = 0.05
        request = StreamGenerateImageRequest(spec=ImageSpec(seed=1), preview_interval_steps=2)
        events = [event async for event in suite.images.StreamGenerateImage(request)]
        assert "preview" in [event.WhichOneof("event") for event in events]
        assert (len(policy.requests), policy.images) == (1, [])


async def test_a_policy_for_images_only_gets_no_request():
    async with guarded(content_policy_points="image") as (suite, policy):
        policy.request_decision = DENY
        await generate(suite, seed=1)
        assert (policy.requests, len(policy.images)) == ([], 1)


async def test_files_stay_here_where_only_digests_are_sent():
    async with guarded(content_policy_sends_files=False) as (suite, policy):
        await generate(suite, seed=1, references=[REFERENCE])
        (image,) = policy.requests[0].input_images
        assert not image.HasField("data")
        assert image.sha256 == hashlib.sha256(REFERENCE).digest()
        assert image.size_bytes == len(REFERENCE)


FAULTS = {
    "hangs": {"hangs": True},
    "fails": {"code": grpc.StatusCode.INTERNAL},
    "cancels": {"code": grpc.StatusCode.CANCELLED},
    "has no such method": {"code": grpc.StatusCode.UNIMPLEMENTED},
    "answers garbage": {"garbage": b"\xff\xff\xff"},
    "answers nothing": {"garbage": b""},
    "answers too much": {"garbage": bytes(1 << 20)},
    "has an unknown verdict": {"request_decision": decision(7)},
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_without_a_decision_requests_are_refused(fault, caplog):
    async with guarded(content_policy_timeout_seconds=0.3) as (suite, policy):
        vars(policy).update(FAULTS[fault])
        before = decisions()
        details = await refusal(suite, prompt="secret words")
        assert (details.code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "CONTENT_POLICY_FAILED")
        assert stage_calls(suite) == [0, 0, 0]
        assert counted(before) == {("request", "error"): 1}
        assert "gave no decision about a request; it is refused" in caplog.text
        assert "secret words" not in caplog.text
        await nothing_left_running()


@pytest.mark.parametrize(("fault", "seconds"), [("hangs", 0.3), ("answers garbage", 30.0)])
async def test_without_a_decision_requests_are_allowed_where_that_is_set(fault, seconds, caplog):
    options = {"content_policy_timeout_seconds": seconds, "content_policy_fail_open": True}
    async with guarded(**options) as (suite, policy):
        vars(policy).update(FAULTS[fault])
        before = decisions()
        response = await generate(suite, prompt="fox", seed=7)
        assert response.images[0].data == suite.expected_image("fox", 7)
        assert counted(before) == {("request", "error"): 1, ("image", "error"): 1}
        assert "it is allowed" in caplog.text


async def test_a_policy_that_fails_open_still_denies():
    async with guarded(content_policy_fail_open=True) as (suite, policy):
        policy.request_decision = DENY
        assert (await refusal(suite, prompt="bad")).code is grpc.StatusCode.PERMISSION_DENIED


async def test_an_image_without_a_decision_is_not_sent(both):
    suite, policy = both
    policy.image_decision = decision(pb.CONTENT_VERDICT_UNSPECIFIED)
    before = decisions()
    details = await refusal(suite, prompt="fox", seed=1)
    assert details.reason == "CONTENT_POLICY_FAILED"
    assert counted(before) == {("request", "allow"): 1, ("image", "error"): 1}


async def test_requests_are_refused_where_no_policy_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = {"content_policy_target": f"127.0.0.1:{port}", "content_policy_timeout_seconds": 5.0}
    async with FakeSuite(settings=options).running() as suite:
        details = await refusal(suite, prompt="fox")
        assert details.reason == "CONTENT_POLICY_FAILED"


async def test_a_policy_that_restarts_is_asked_again(both):
    suite, policy = both
    await generate(suite, seed=1)
    policy.unavailable_count = 2
    # gRPC asks again by itself after UNAVAILABLE, and the client does not notice.
    await generate(suite, seed=1)
    assert len(policy.requests) == 4


async def test_a_policy_with_grpcs_own_limit_of_pings_keeps_its_connection(both):
    suite, policy = both
    await generate(suite, prompt="a fox")
    # Servers end a connection at the third ping without a call; those of stages get one every two seconds.
    await asyncio.sleep(4 * KEEPALIVE_MILLISECONDS / 1000)
    await generate(suite, prompt="a fox")
    assert len(policy.requests) == 2
    assert len(policy.peers) == 1


async def test_a_client_that_goes_away_cancels_the_check(both):
    suite, policy = both
    policy.hangs = True
    call = asyncio.create_task(generate(suite, prompt="fox"))
    await until(lambda: policy.requests)
    call.cancel()
    await until(lambda: policy.cancelled == 1)
    policy.hangs = False
    suite.denoiser.step_seconds = 0.0
    await generate(suite, seed=1)
    assert stage_calls(suite)[1] == 1


async def test_a_deadline_that_passes_during_a_check_is_the_deadlines_fault(both):
    suite, policy = both
    policy.hangs = True
    labels = {"model": "fake", "flow": "text-to-image", "outcome": "expired"}
    before = REGISTRY.get_sample_value("klein_images_total", labels) or 0
    error = await failure(generate(suite, prompt="fox", within_seconds=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: policy.cancelled == 1)
    await until(lambda: REGISTRY.get_sample_value("klein_images_total", labels) == before + 1)


async def test_huge_files_reach_the_policy_and_a_huge_reason_does_not_break_the_status():
    limit = 12 << 20
    async with guarded(maximum_reference_bytes=limit) as (suite, policy):
        policy.request_decision = decision(pb.CONTENT_VERDICT_DENY, "C" * 5000, "ä" * 20_000)
        references = [reference_file(64, 64).ljust(limit, b"x")] * 4
        details = await refusal(suite, references=references)
        assert details.reason == "CONTENT_DENIED"
        assert len(details.message.encode()) <= MESSAGE_BYTES
        assert len(dict(details.metadata)["reason_code"]) == 65
        (request,) = policy.requests
        assert [len(image.data) for image in request.input_images] == [limit] * 4


async def test_the_policy_sees_the_image_that_is_then_signed(tmp_path):
    pytest.importorskip("c2pa", reason="c2pa is not installed; pip install 'klein-suite[provenance]'")
    from tests.services.fakes.signing import Authority

    authority = Authority(tmp_path)
    authority.issue()
    file = BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    async with guarded(**authority.settings) as (suite, policy):
        suite.vae_decoder.files = {image_pb2.IMAGE_FORMAT_PNG: file.getvalue()}
        data = (await generate(suite, seed=1)).images[0].data
        assert policy.images[0].data == file.getvalue()
        assert authority.read(data, "image/png").state == "Trusted"

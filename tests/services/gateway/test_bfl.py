"""BFL's API: the documented poll loop, errors in its form, and hostile clients."""

from __future__ import annotations

import asyncio
import base64

import pytest

from klein_services.runtime.errors import ContentDenied, InvalidInput
from tests.services.fakes.answering_orchestrator import Orchestrator, serving
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.tenants import TOKEN, tokens_toml
from tests.services.gateway.job_suite import PNG, job_suite

PATH = "/v1/flux-2-klein-4b"


async def test_post_poll_and_fetch():
    async with job_suite() as jobs:
        answer = await jobs.post(PATH, {"prompt": "a ring", "seed": 7, "width": 64, "height": 128})
        assert answer.status_code == 200, answer.text
        made = answer.json()
        assert made["polling_url"] == f"{jobs.url}/v1/get_result?id={made['id']}"
        assert (made["cost"], made["input_mp"], made["output_mp"]) == (None, 0.0, 0.008192)
        ready = await jobs.polled(made["polling_url"])
        assert ready["id"] == made["id"]
        assert (ready["result"]["input_mp"], ready["result"]["output_mp"]) == (0.0, 0.008192)
        assert ready["status"] == "Ready"
        assert ready["result"]["seed"] == 7
        assert (ready["result"]["width"], ready["result"]["height"]) == (64, 128)
        image = await jobs.http.get(ready["result"]["sample"])
        assert image.content == jobs.suite.expected_image("a ring", 7, (64, 128), image_format=2)


async def test_a_seed_is_drawn_once_and_automatic_size_is_the_models():
    async with job_suite() as jobs:
        made = (
            await jobs.post(PATH, {"prompt": "a ring", "width": 0, "height": 0, "output_format": "png"})
        ).json()
        ready = await jobs.polled(made["polling_url"])
        image = await jobs.http.get(ready["result"]["sample"])
        assert image.content == jobs.suite.expected_image("a ring", ready["result"]["seed"])


async def test_images_as_base64_and_data_uri():
    orchestrator = Orchestrator()
    model = orchestrator.models.models.add(name=MODEL, serving=True)
    model.limits.reference_count = 4
    model.limits.reference_bytes = 100
    model.limits.pixel_count = 2**20
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            encoded = base64.b64encode(PNG).decode()
            body = {
                "prompt": "a ring",
                "input_image": encoded,
                "input_image_2": f"data:image/png;base64,{encoded}",
            }
            made = (await jobs.post(PATH, body)).json()
            assert (await jobs.polled(made["polling_url"]))["status"] == "Ready"
            [spec] = orchestrator.specs
            assert list(spec.references) == [PNG, PNG]
            assert not spec.HasField("width_px")

            for image, message in (
                ("%%%", "is no base64"),
                (base64.b64encode(b"text").decode(), "is no image file"),
                (base64.b64encode(PNG + bytes(100)).decode(), "the model takes 100"),
                ("http://127.0.0.1/x.png", "an address that is not public"),
            ):
                answer = await jobs.post(PATH, {"prompt": "a ring", "input_image_2": image})
                assert answer.status_code == 422
                [detail] = answer.json()["detail"]
                assert detail["loc"] == ["body", "input_image_2"]
                assert message in detail["msg"]


async def test_every_wrong_field_is_named():
    async with job_suite() as jobs:
        body = {
            "width": 65,
            "height": -1,
            "seed": "x",
            "output_format": "bmp",
            "safety_tolerance": 6,
            "webhook_url": "ftp://host",
            "steps": 4,
            "input_image": 5,
        }
        answer = await jobs.post(PATH, body)
        assert answer.status_code == 422
        details = answer.json()["detail"]
        assert {detail["loc"][-1] for detail in details} == {"prompt", *body}
        assert all(detail["loc"][0] == "body" and detail["type"] == "invalid_field" for detail in details)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/flux-pro-1.1", f"There is no model 'flux-pro-1.1'; there are {MODEL}, flux-2-klein-4b."),
        ("/v1/flux-2-klein-9b", f"There is no model 'flux-2-klein-9b'; there are {MODEL}, flux-2-klein-4b."),
    ],
)
async def test_unknown_models(path, message):
    async with job_suite() as jobs:
        answer = await jobs.post(path, {"prompt": "a ring"})
        assert (answer.status_code, answer.json()) == (404, {"detail": message})


async def test_bad_bodies():
    async with job_suite(body_limit_mib=1) as jobs:
        for content, status in ((b"[]", 400), (b"{", 400), (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413)):
            answer = await jobs.http.post(PATH, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status
            assert isinstance(answer.json()["detail"], str)
        assert (await jobs.http.get(PATH)).status_code == 405


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInput.of("width_px", "is too large"), "Error", "INVALID_ARGUMENT"),
        (ContentDenied("request", "", ""), "Request Moderated", "CONTENT_DENIED_REQUEST"),
        (ContentDenied("image", "", ""), "Content Moderated", "CONTENT_DENIED_IMAGE"),
    ],
)
async def test_a_refused_job_has_an_error(error, status, code):
    orchestrator = Orchestrator()
    orchestrator.models.models.add(name=MODEL)
    orchestrator.error = error
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            made = (await jobs.post(PATH, {"prompt": "a ring"})).json()
            result = await jobs.polled(made["polling_url"])
            assert (result["status"], result["result"], result["details"]["code"]) == (status, None, code)


async def test_another_key_finds_nothing(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path)})
    async with job_suite(suite) as jobs:
        answer = await jobs.post(PATH, {"prompt": "a ring"})
        assert answer.status_code == 401
        assert "token" in answer.json()["detail"]
        made = (await jobs.post(PATH, {"prompt": "a ring"}, x_key=TOKEN)).json()
        assert (await jobs.polled(made["polling_url"], x_key=TOKEN))["status"] == "Ready"
        for headers in ({}, {"x_key": "other"}):
            answer = await jobs.get(made["polling_url"], **headers)
            assert answer.status_code == 404
            assert answer.json() == {"id": made["id"], "status": "Task not found", "result": None}
        # The same key in another header is the same key.
        answer = await jobs.get(made["polling_url"], authorization=f"Bearer {TOKEN}")
        assert answer.json()["status"] == "Ready"


async def test_duplicates_at_the_same_moment_make_one_job():
    async with job_suite() as jobs:
        body = {"prompt": "a ring"}
        answers = await asyncio.gather(*(jobs.post(PATH, body, idempotency_key="k") for _ in range(10)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
        await jobs.polled(answers[0].json()["polling_url"])
        assert len(jobs.suite.denoiser.specs) == 1
        answer = await jobs.post(PATH, {"prompt": "a disc"}, idempotency_key="k")
        assert answer.status_code == 409
        answer = await jobs.post(PATH, body, idempotency_key="k" * 201)
        assert answer.json()["detail"][0]["loc"] == ["body", "idempotency-key"]


async def test_a_full_queue():
    suite = FakeSuite()
    suite.denoiser.step_gate = asyncio.Event()
    async with job_suite(suite, jobs_limit_of_key=2) as jobs:
        made = [(await jobs.post(PATH, {"prompt": f"ring {index}"})).json() for index in range(2)]
        answer = await jobs.post(PATH, {"prompt": "a ring"})
        assert answer.status_code == 429
        assert "2 jobs that have not ended" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) >= 1
        await until(lambda: len(suite.denoiser.specs) == 2)
        assert (await jobs.get(made[0]["polling_url"])).json()["status"] == "Pending"
        suite.denoiser.step_gate.set()
        for each in made:
            assert (await jobs.polled(each["polling_url"]))["status"] == "Ready"
        assert (await jobs.post(PATH, {"prompt": "a ring"})).status_code == 200


async def test_an_orchestrator_that_is_gone():
    async with job_suite(target="127.0.0.1:1") as jobs:
        answer = await jobs.post(PATH, {"prompt": "a ring"})
        assert answer.status_code == 503
        assert "does not answer" in answer.json()["detail"]
        assert "127.0.0.1" not in answer.json()["detail"]
        assert answer.headers["retry-after"] == "2"


async def test_jobs_that_are_off():
    async with job_suite(jobs_database="off") as jobs:
        answer = await jobs.post(PATH, {"prompt": "a ring"})
        assert answer.status_code == 404
        assert "KLEIN_JOBS_DATABASE is off" in answer.json()["detail"]

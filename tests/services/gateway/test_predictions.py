"""Predictions, with the real `replicate` package against a real gateway; eachlabs' calls; uploads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator

import httpx
import pytest
import replicate
from replicate.exceptions import ModelError, ReplicateError

from klein_services.runtime.errors import InvalidInput
from tests.services.fakes.answering_orchestrator import Orchestrator, serving
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.tenants import TOKEN, tokens_toml
from tests.services.gateway.job_suite import PNG, JobSuite, job_suite

NAME = "black-forest-labs/flux-2-klein-4b"
INPUT = {"prompt": "a ring", "seed": 7, "width": 64, "height": 64, "output_format": "png"}


def client_of(jobs: JobSuite, token: str = "key") -> replicate.Client:
    client = replicate.Client(api_token=token, base_url=jobs.url)
    client.poll_interval = 0.05
    _clients.append(client)
    return client


_clients: list[replicate.Client] = []


@pytest.fixture(autouse=True)
async def closed_clients() -> AsyncIterator[None]:
    """Closes the connections of the package's clients, which have no method for it."""
    yield
    for client in _clients:
        client._client.close()
        await client._async_client.aclose()
    _clients.clear()


def image_orchestrator() -> Orchestrator:
    orchestrator = Orchestrator()
    model = orchestrator.models.models.add(name=MODEL, serving=True, description="draws")
    model.limits.reference_count = 4
    model.limits.reference_bytes = 1000
    model.limits.pixel_count = 2**22
    model.limits.image_count = 4
    model.limits.step_count = 50
    return orchestrator


async def test_run_and_stream_with_the_real_package():
    async with job_suite() as jobs:
        client = client_of(jobs)
        [url] = await client.async_run(NAME, input=INPUT)
        expected = jobs.suite.expected_image("a ring", 7)
        assert (await jobs.http.get(url)).content == expected
        # The synchronous client, on its own thread.
        [url] = await asyncio.to_thread(client.run, NAME, input=INPUT | {"seed": 8}, wait=False)
        assert (await jobs.http.get(url)).content == jobs.suite.expected_image("a ring", 8)
        events = [
            (event.event.value, str(event.data))
            async for event in await client.async_stream(NAME, input=INPUT)
        ]
        assert events[-1] == ("done", "{}")
        [(_, url)] = [event for event in events if event[0] == "output"]
        assert (await jobs.http.get(url)).content == expected


async def test_create_get_list_and_cancel():
    suite = FakeSuite()
    suite.denoiser.step_gate = asyncio.Event()
    async with job_suite(suite) as jobs:
        client = client_of(jobs)
        first = await client.predictions.async_create(version=f"{NAME}:hidden", input=INPUT)
        assert first.status == "starting"
        assert first.model == "klein/flux-2-klein-4b"
        assert first.input == INPUT
        assert first.urls["get"] == f"{jobs.url}/v1/predictions/{first.id}"
        await until(lambda: suite.denoiser.specs)
        canceled = await client.predictions.async_create(model=NAME, input=INPUT)
        await canceled.async_cancel()
        assert canceled.status == "canceled"
        assert canceled.completed_at is not None
        suite.denoiser.step_gate.set()
        await first.async_wait()
        assert first.status == "succeeded"
        assert len(first.output) == 1
        assert first.metrics["predict_time"] <= first.metrics["total_time"]
        assert first.created_at <= first.started_at <= first.completed_at
        await first.async_cancel()
        assert first.status == "succeeded"
        page = await client.predictions.async_list()
        assert [prediction.id for prediction in page.results] == [canceled.id, first.id]
        assert page.next is None
        description = await client.models.async_get(NAME)
        assert (
            "prompt"
            in description.latest_version.openapi_schema["components"]["schemas"]["Input"]["properties"]
        )


async def test_a_wait_that_is_too_short_is_followed_by_polls():
    suite = FakeSuite()
    suite.denoiser.step_gate = asyncio.Event()
    async with job_suite(suite) as jobs:
        running = asyncio.create_task(client_of(jobs).async_run(NAME, input=INPUT, wait=3))
        await until(lambda: suite.denoiser.specs)
        await asyncio.sleep(2.5)
        assert not running.done()
        suite.denoiser.step_gate.set()
        assert len(await running) == 1
        assert len(suite.denoiser.specs) == 1


async def test_errors_of_the_real_package():
    orchestrator = image_orchestrator()
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            client = client_of(jobs)
            with pytest.raises(ReplicateError) as caught:
                await client.async_run(NAME, input={"seed": -1, "size": 3})
            assert (caught.value.status, caught.value.title) == (422, "invalid_field")
            for field in ("input.prompt", "input.seed", "input.size"):
                assert field in caught.value.detail
            with pytest.raises(ReplicateError) as caught:
                await client.async_run("someone/sdxl", input=INPUT)
            assert caught.value.status == 404
            orchestrator.error = InvalidInput.of("seed", "is bad")
            with pytest.raises(ModelError, match="seed is bad"):
                await client.async_run(NAME, input=INPUT)
            with pytest.raises(ReplicateError) as caught:
                await client.predictions.async_get("none")
            assert caught.value.status == 404


async def test_files_as_uploads_and_as_base64():
    orchestrator = image_orchestrator()
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            client = client_of(jobs)
            await client.async_run(NAME, input={"prompt": "edit", "images": [io.BytesIO(PNG)]})
            await client.async_run(
                NAME, input={"prompt": "edit", "image": io.BytesIO(PNG)}, file_encoding_strategy="base64"
            )
            assert [list(spec.references) for spec in orchestrator.specs] == [[PNG], [PNG]]
            [file] = await client.files.async_list()
            assert (file.size, file.content_type) == (len(PNG), "application/octet-stream")
            assert (await client.files.async_get(file.id)).urls == file.urls
            # Of another key the file does not exist, whatever way it is asked for.
            other = client_of(jobs, "other")
            with pytest.raises(ReplicateError):
                await other.files.async_get(file.id)
            with pytest.raises(ReplicateError) as caught:
                await other.async_run(NAME, input={"prompt": "edit", "images": [file.urls["get"]]})
            assert caught.value.status == 404
            assert await client.files.async_delete(file.id)
            with pytest.raises(ReplicateError, match="is no image file"):
                await client.files.async_create(io.BytesIO(b"text"))


async def test_bounded_uploads():
    with serving(image_orchestrator()) as target:
        async with job_suite(target=target, uploads_limit_mib=1) as jobs:
            client = client_of(jobs)
            await client.files.async_create(io.BytesIO(PNG + bytes(2**19)))
            with pytest.raises(ReplicateError, match="fill the 1 MiB"):
                await client.files.async_create(io.BytesIO(PNG + bytes(2**19)))


async def test_sizes_of_predictions():
    orchestrator = image_orchestrator()
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            for given, size in (
                ({"aspect_ratio": "16:9"}, (1360, 768)),
                ({"aspect_ratio": "1:1", "output_megapixels": "0.25"}, (512, 512)),
                ({"output_megapixels": "0.25 MP"}, (512, 512)),
                ({"width": 64, "height": 80}, (64, 80)),
                ({}, (0, 0)),
            ):
                answer = await jobs.post(
                    "/v1/predictions", {"version": MODEL, "input": {"prompt": "x"} | given}, prefer="wait"
                )
                assert answer.json()["status"] == "succeeded", answer.text
                spec = orchestrator.specs[-1]
                assert (spec.width_px, spec.height_px) == size
            for given, field in (
                ({"width": 64}, "input.height"),
                ({"width": 64, "height": 64, "aspect_ratio": "1:1"}, "input.aspect_ratio"),
                ({"output_megapixels": "9"}, "input.output_megapixels"),
                ({"width": 4096, "height": 4096}, "input.width"),
                ({"images": ["a"], "image": "b"}, "input.image"),
                ({"num_outputs": 5}, "input.num_outputs"),
            ):
                answer = await jobs.post(
                    "/v1/predictions", {"version": MODEL, "input": {"prompt": "x"} | given}
                )
                assert answer.status_code == 422
                assert answer.json()["invalid_fields"][0]["field"] == field


async def test_another_key_sees_nothing(tmp_path):
    suite = FakeSuite(settings={"tokens_file": tokens_toml(tmp_path)})
    async with job_suite(suite) as jobs:
        with pytest.raises(ReplicateError) as caught:
            await client_of(jobs, "wrong").async_run(NAME, input=INPUT)
        assert caught.value.status == 401
        made = await client_of(jobs, TOKEN).predictions.async_create(model=NAME, input=INPUT)
        other = client_of(jobs, "other")
        for call in (other.predictions.async_get(made.id), other.predictions.async_cancel(made.id)):
            with pytest.raises(ReplicateError) as caught:
                await call
            assert caught.value.status == 404
        with pytest.raises(httpx.HTTPStatusError):
            (await other._async_client.get(made.urls["stream"])).raise_for_status()
        assert (await other.predictions.async_list()).results == []


async def test_cogs_put_is_idempotent():
    async with job_suite() as jobs:
        body = {"input": INPUT}
        first, second = await asyncio.gather(
            *(jobs.http.put("/predictions/mine", json=body) for _ in range(2))
        )
        assert first.json()["id"] == second.json()["id"] == "mine"
        assert {first.json()["status"], second.json()["status"]} == {"succeeded"}
        assert len(jobs.suite.denoiser.specs) == 1
        assert (await jobs.get("/predictions/mine")).json()["status"] == "succeeded"
        assert (
            await jobs.http.put("/predictions/mine", json={"input": INPUT | {"seed": 9}})
        ).status_code == 409
        answer = await jobs.post("/predictions", body, prefer="respond-async")
        assert (answer.status_code, answer.json()["status"]) == (202, "starting")
        assert (await jobs.polled(answer.json()["urls"]["get"]))["status"] == "succeeded"


async def test_eachlabs():
    async with job_suite() as jobs:
        body = {"model": "flux-2-klein-4b", "version": "0.0.1", "input": INPUT, "webhook_url": ""}
        answer = await jobs.post("/v1/prediction", body, x_api_key="key")
        assert answer.status_code == 422
        assert answer.json()["status"] == "error"
        del body["webhook_url"]
        answer = (await jobs.post("/v1/prediction", body, x_api_key="key")).json()
        assert answer["status"] == "success"
        path = f"/v1/prediction/{answer['predictionID']}"
        done = await jobs.polled(path, x_api_key="key")
        assert done["status"] == "success"
        assert (await jobs.http.get(done["output"])).content == jobs.suite.expected_image("a ring", 7)
        assert (await jobs.get(path, x_api_key="other")).status_code == 404
        described = (await jobs.get("/v1/model?slug=flux-2-klein-4b", x_api_key="key")).json()
        assert "prompt" in described["request_schema"]["properties"]

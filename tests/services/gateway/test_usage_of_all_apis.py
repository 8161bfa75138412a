"""Rate limits, usage, prices and statuses of errors: the same for every API of the gateway."""

from __future__ import annotations

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import httpx2
import pytest
from PIL import ExifTags, Image

from klein_core.vae_decoder.image_io import prepare_reference
from klein_services.gateway.image_size import image_size, reference_size
from klein_services.gateway.metrics import IMAGES
from klein_services.gateway.usage import Price
from klein_services.runtime.errors import UnusableAdapter
from tests.services.fakes.answering_orchestrator import Orchestrator, serving
from tests.services.fakes.fake_stages import MODEL
from tests.services.gateway.job_suite import PNG, JobSuite, job_suite

INPUT = {"prompt": "a ring", "width": 64, "height": 128}
JOB_POSTS = {
    "bfl": ("/v1/flux-2-klein-4b", INPUT),
    "predictions": ("/v1/predictions", {"version": MODEL, "input": INPUT}),
    "eachlabs": ("/v1/prediction", {"model": MODEL, "input": INPUT}),
}
KEY = {"x-key": "one"}
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6


def prices(folder: Path, **values: float) -> str:
    table = folder / "prices.toml"
    lines = [f"{name} = {value}" for name, value in values.items()]
    table.write_text("\n".join(['currency = "USD"', "[models.default]", *lines]))
    return str(table)


def picture(width: int, height: int, image_format: str, **options: object) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), "red").save(file, image_format, **options)
    return file.getvalue()


async def posted(jobs: JobSuite, api: str) -> httpx2.Response:
    if api == "openai":
        body = {"prompt": "a ring", "size": "64x128"}
        return await jobs.http.post("/v1/images/generations", json=body, headers=KEY)
    if api == "page":
        settings = {"prompt": "a ring", "width_px": 64, "height_px": 128}
        form = {"files": [("settings", (None, json.dumps(settings)))]}
        return await jobs.http.post("/page/api/generate", **form, headers=KEY)
    path, body = JOB_POSTS[api]
    return await jobs.http.post(path, json=body, headers=KEY)


async def ended(jobs: JobSuite, api: str, answer: httpx2.Response) -> None:
    made = answer.json()
    url = {
        "bfl": lambda: made["polling_url"],
        "predictions": lambda: made["urls"]["get"],
        "eachlabs": lambda: f"/v1/prediction/{made['predictionID']}",
    }[api]()
    result = await jobs.polled(url, x_key="one")
    assert result["status"] in ("Ready", "succeeded", "success"), result


async def test_every_api_counts_for_the_same_rate_and_the_same_totals(tmp_path):
    apis = ("openai", "page", *JOB_POSTS)
    table = prices(tmp_path, first_output_megapixel=0.014, output_megapixel=0.001)
    async with job_suite(price_table=table, requests_per_minute=0.1, requests_burst=len(apis)) as jobs:
        before = {api: IMAGES.labels(api)._value.get() for api in apis}
        for api in apis:
            answer = await posted(jobs, api)
            assert answer.status_code in (200, 201), answer.text
            if api in JOB_POSTS:
                await ended(jobs, api, answer)
        assert {api: IMAGES.labels(api)._value.get() - before[api] for api in apis} == dict.fromkeys(apis, 1)
        totals = (await jobs.http.get("/v1/usage", headers=KEY)).json()
        assert (totals["requests"], totals["images"]) == (len(apis), len(apis))
        assert totals["cost"] == pytest.approx(len(apis) * 0.014)
        assert totals["output_megapixels"] == pytest.approx(len(apis) * 64 * 128 / 1e6, abs=1e-5)
        for api in apis:
            refused = await posted(jobs, api)
            assert refused.status_code == 429, api
            assert int(refused.headers["retry-after"]) >= 1
            assert "requests a minute" in refused.text
        # Polls are no requests for images, and another key has its own bucket.
        assert (await jobs.http.get("/v1/predictions", headers=KEY)).status_code == 200
        path, body = JOB_POSTS["bfl"]
        assert (await jobs.http.post(path, json=body, headers={"x-key": "two"})).status_code == 200


async def test_a_job_that_fails_is_no_usage():
    orchestrator = Orchestrator()
    orchestrator.models.models.add(name=MODEL)
    orchestrator.error = UnusableAdapter("adapters", "warm", "it is torn")
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            path, body = JOB_POSTS["bfl"]
            made = (await jobs.http.post(path, json=body, headers=KEY)).json()
            assert (await jobs.polled(made["polling_url"], x_key="one"))["status"] == "Error"
            assert (await jobs.http.get("/v1/usage", headers=KEY)).json()["requests"] == 0


async def test_a_failed_precondition_has_the_same_status_everywhere():
    orchestrator = Orchestrator()
    orchestrator.models.models.add(name=MODEL)
    orchestrator.error = UnusableAdapter("adapters", "warm", "it is torn")
    with serving(orchestrator) as target:
        async with job_suite(target=target) as jobs:
            answer = await posted(jobs, "openai")
            assert (answer.status_code, answer.json()["error"]["param"]) == (422, "adapters")
            shown = (await posted(jobs, "page")).text
            assert '"status":422' in shown.replace(" ", "")


async def test_bfl_s_cost_is_that_of_its_price_list(tmp_path):
    table = prices(tmp_path, first_output_megapixel=1.0, output_megapixel=0.5, input_megapixel=0.1)
    async with job_suite(price_table=table) as jobs:
        made = (await jobs.post("/v1/flux-2-klein-4b", INPUT)).json()
        assert (made["cost"], made["input_mp"], made["output_mp"]) == (1.0, 0.0, 0.008192)
        ready = await jobs.polled(made["polling_url"])
        assert ready["result"]["cost"] == 1.0


async def test_bfl_s_cost_with_images_is_known_before_they_are_opened(tmp_path):
    orchestrator = Orchestrator()
    model = orchestrator.models.models.add(name=MODEL, serving=True)
    model.limits.reference_count = 4
    model.limits.reference_bytes = 2**20
    model.limits.pixel_count = 4 * 2**20
    table = prices(tmp_path, first_output_megapixel=1.0, output_megapixel=0.5, input_megapixel=0.1)
    with serving(orchestrator) as target:
        async with job_suite(target=target, price_table=table) as jobs:

            async def made(*files: bytes, **fields: int) -> dict:
                names = ("input_image", "input_image_2")
                images = {name: b64encode(data).decode() for name, data in zip(names, files, strict=False)}
                body = {"prompt": "a ring"} | fields | images
                answer = (await jobs.post("/v1/flux-2-klein-4b", body)).json()
                return {name: answer[name] for name in ("cost", "input_mp", "output_mp")}

            small, large = picture(100, 70, "PNG"), picture(2048, 2048, "JPEG")
            assert await made(small) == {"cost": 1.0006144, "input_mp": 0.006144, "output_mp": 0.006144}
            found = await made(large, small, width=2048, height=1024)
            assert found["input_mp"] == 1.05472
            assert found["cost"] == pytest.approx(1 + (2.097152 - 1) * 0.5 + 1.05472 * 0.1)
            # Such files fail the job, so they have no price.
            for broken in (PNG, picture(32, 32, "PNG")):
                assert await made(broken) == {"cost": None, "input_mp": None, "output_mp": None}


def test_the_price_of_four_megapixels_and_two_references():
    assert Price(0.014, 0.001, 0.001).cost(2.0, 4.0) == 0.019


@pytest.mark.parametrize(
    ("size", "image_format", "options"),
    [
        ((70, 130), "PNG", {}),
        ((1500, 800), "JPEG", {"progressive": True, "comment": b"x" * 300}),
        ((99, 300), "JPEG", {}),
        ((1300, 1301), "WEBP", {}),
        ((81, 65), "WEBP", {"lossless": True}),
        ((200, 100), "WEBP", {"exif": TURNED}),
    ],
)
def test_sizes_of_headers_are_those_that_a_model_sees(size, image_format, options):
    data = picture(*size, image_format, **options)
    assert image_size(data) == size
    # A turned image has the same megapixels.
    assert sorted(reference_size(*size)) == sorted(prepare_reference(data).size)
    for length in range(200):
        # A file that ends early has its size or none, and ends the search.
        assert image_size(data[:length]) in (None, size)

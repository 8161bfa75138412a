"""OpenAI's images API with the real `openai` package, a real orchestrator and fake stages."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from klein_services.gateway.server import running_gateway
from klein_services.gateway.settings import GatewaySettings
from tests.services.fakes.orchestrator_suite import FakeSuite, nothing_left_running
from tests.services.fakes.runtime_toy import until

_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (64).to_bytes(4, "big") * 2
PNG, OTHER, MASK = _HEADER + b"image:64x64", _HEADER + b"image:64x64:other", _HEADER + b"mask:64x64"
"""Files that the gateway takes for PNG files, and the fake stages for images and a mask."""


@asynccontextmanager
async def serving(suite: FakeSuite | None = None, **changes: object) -> AsyncIterator[tuple[FakeSuite, str]]:
    """A gateway before an orchestrator; yields both."""
    async with (suite or FakeSuite()).running() as running:
        settings = GatewaySettings(**({"target": running.address} | changes))  # type: ignore[arg-type]
        async with running_gateway(settings) as url:
            yield running, url


def client(url: str, **options: object) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", **({"api_key": "unused", "max_retries": 0} | options))


def decoded(image: object) -> bytes:
    return base64.b64decode(image.b64_json)


async def test_generations_give_the_orchestrator_s_images_and_usage():
    async with serving() as (suite, url), client(url) as ai:
        made = await ai.images.generate(
            prompt="a star",
            n=2,
            size="64x96",
            output_format="webp",
            output_compression=80,
            quality="high",
            background="opaque",
            moderation="low",
            user="someone",
            extra_body={"seed": 7, "steps": 3},
        )
        expected = [
            suite.expected_image("a star", seed, (64, 96), image_format=3, quality=80) for seed in (7, 8)
        ]
        assert [decoded(image) for image in made.data] == expected
        assert [image.seed for image in made.data] == [7, 8]
        assert (made.size, made.output_format, made.quality, made.background) == (
            "64x96",
            "webp",
            "high",
            "opaque",
        )
        usage = made.usage
        assert usage.output_tokens == 2 * 64 * 96 // 256 == usage.output_tokens_details.image_tokens
        assert usage.input_tokens == usage.input_tokens_details.text_tokens > 0
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert made.klein["flow"] == "text-to-image"
        assert made.klein["steps"] == 3
        assert "cost" not in usage.model_extra


async def test_edits_take_several_images_and_answer_with_links():
    async with serving() as (suite, url), client(url) as ai:
        made = await ai.images.edit(
            image=[("one.png", PNG), ("two.png", OTHER)],
            prompt="make it blue",
            size="64x64",
            response_format="url",
            extra_body={"seed": 3},
        )
        expected = suite.expected_image("make it blue", 3, (64, 64), references=(PNG, OTHER))
        async with httpx2.AsyncClient() as web:
            link = made.data[0].url
            assert link.startswith(f"{url}/results/")
            assert (await web.get(link)).content == expected
        assert made.usage.input_tokens_details.image_tokens > 0
        single = await ai.images.edit(image=PNG, prompt="make it blue", extra_body={"seed": 3})
        assert decoded(single.data[0]) == suite.expected_image("make it blue", 3, references=(PNG,))


async def test_a_mask_paints_over_the_first_image():
    async with serving() as (suite, url), client(url) as ai:
        for size in ("auto", "64x64"):
            made = await ai.images.edit(
                image=[PNG, OTHER],
                mask=MASK,
                prompt="a moon",
                size=size,
                extra_body={"seed": 1, "strength": 1.0},
            )
            assert made.klein["flow"] == "masked-edit"
        assert [spec.strength for spec in suite.denoiser.specs] == [1.0, 1.0]
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.images.edit(image=PNG, mask=MASK, prompt="a moon", size="128x128")
        assert refused.value.param == "size"


async def test_references_may_be_urls_and_json():
    async with serving() as (suite, url), httpx2.AsyncClient(base_url=url) as web:
        encoded = base64.b64encode(PNG).decode()
        body = {"image": [f"data:image/png;base64,{encoded}", encoded], "prompt": "x", "seed": 1}
        made = await web.post("/v1/images/edits", json=body)
        assert made.status_code == 200, made.text
        got = base64.b64decode(made.json()["data"][0]["b64_json"])
        assert got == suite.expected_image("x", 1, references=(PNG, PNG))
        refused = await web.post("/v1/images/edits", json={"image": "http://127.0.0.1/x.png", "prompt": "x"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "image[0]"
        assert "not public" in refused.json()["error"]["message"]


@pytest.mark.parametrize("count", [1, 2])
async def test_streams_send_partial_images_and_each_finished_one(count: int):
    async with serving() as (suite, url), client(url) as ai:
        stream = await ai.images.generate(
            prompt="a star", stream=True, partial_images=2, n=count, extra_body={"seed": 5, "steps": 9}
        )
        events = [event async for event in stream]
        partial = [event for event in events if event.type == "image_generation.partial_image"]
        completed = [event for event in events if event.type == "image_generation.completed"]
        assert 1 <= len(partial) <= 2
        assert [event.partial_image_index for event in partial] == list(range(len(partial)))
        assert all(decoded(event) and event.size == "64x64" for event in partial)
        assert [decoded(event) for event in completed] == [
            suite.expected_image("a star", seed) for seed in range(5, 5 + count)
        ]
        assert sum(event.usage.output_tokens for event in completed) == count * 16
        assert events[-1].type == "image_generation.completed"
        edits = await ai.images.edit(prompt="x", image=PNG, stream=True, partial_images=0)
        assert [event.type async for event in edits] == ["image_edit.completed"]
        await nothing_left_running()


def test_the_synchronous_client_generates_and_streams():
    async def run() -> None:
        async with serving() as (suite, url):

            def use() -> tuple[bytes, list[str]]:
                with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as ai:
                    made = ai.images.generate(prompt="a star", extra_body={"seed": 2})
                    with ai.images.generate(prompt="a star", stream=True, extra_body={"seed": 2}) as stream:
                        return decoded(made.data[0]), [event.type for event in stream]

            image, types = await asyncio.to_thread(use)
            assert image == suite.expected_image("a star", 2)
            assert types == ["image_generation.completed"]

    asyncio.run(run())


async def test_models_are_listed_and_aliases_are_taken():
    async with serving(model_aliases="gpt-image-1=, mine=" + "pico") as (suite, url), client(url) as ai:
        listed = (await ai.models.list()).data
        assert listed[0].default
        name = listed[0].id
        assert (await ai.models.retrieve(name)).id == name
        with pytest.raises(openai.NotFoundError):
            await ai.models.retrieve("other")
        made = await ai.images.generate(prompt="x", model="gpt-image-1", extra_body={"seed": 1})
        assert decoded(made.data[0]) == suite.expected_image("x", 1)
        with pytest.raises(openai.NotFoundError) as unknown:
            await ai.images.generate(prompt="x", model="dall-e-3")
        assert "dall-e-3" in unknown.value.message


WRONG_FIELDS: list[tuple[dict[str, object], str]] = [
    ({"size": "65x64"}, "size"),
    ({"size": "huge"}, "size"),
    ({"size": "64x16"}, "size"),
    ({"size": "16384x16384"}, "size"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": 60}, "n"),
    ({"n": "2"}, "n"),
    ({"background": "transparent"}, "background"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 50}, "output_compression"),
    ({"partial_images": 2}, "partial_images"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"response_format": "file"}, "response_format"),
    ({"seed": -1}, "seed"),
    ({"seed": True}, "seed"),
    ({"steps": 1001}, "steps"),
    ({"strength": 0.5}, "strength"),
    ({"guidance_scale": 3}, "guidance_scale"),
    ({"adapters": "watercolor"}, "adapters"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "x" * 100_000}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"model": ["pico"]}, "model"),
    ({"frame_count": 3}, "frame_count"),
    ({"prompts": "x"}, "prompts"),
]


async def test_a_wrong_field_is_named_in_openai_s_form():
    async with serving() as (_, url), httpx2.AsyncClient(base_url=url) as web:
        for fields, param in WRONG_FIELDS:
            answer = await web.post(
                "/v1/images/generations",
                content=json.dumps({"prompt": "x"} | fields),
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == param, error
            assert error["type"] == "invalid_request_error"
            assert param in error["message"]


async def test_all_wrong_fields_are_in_the_message():
    async with serving() as (_, url), client(url) as ai:
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.images.generate(prompt="x", size="1x1", n=0, extra_body={"seed": -1, "sed": 1})
        assert all(name in refused.value.message for name in ("size", "n is 0", "seed", "sed is unknown"))


async def test_forms_are_read_with_their_types_and_refused_by_field():
    async with serving() as (_, url), httpx2.AsyncClient(base_url=url) as web:
        good = {
            "prompt": "x",
            "n": "2",
            "seed": "4",
            "embed_prompt": "false",
            "stream": "false",
            "adapters": "[]",
        }
        made = await web.post("/v1/images/edits", data=good, files=[("image[]", PNG)])
        assert made.status_code == 200, made.text
        assert len(made.json()["data"]) == 2
        for data, files, param in (
            ({"prompt": "x"}, [], "image"),
            ({"prompt": "x"}, [("image", b"GIF89a")], "image[0]"),
            ({"prompt": "x"}, [("image", PNG), ("mask", MASK), ("mask", MASK)], "mask"),
            ({"prompt": "x"}, [("image", PNG)] * 17, "image"),
            ({"prompt": "x"}, [("image", PNG)] * 12, "image"),
            ({"prompt": "x", "n": "two"}, [("image", PNG)], "n"),
            ({"prompt": "x", "seed": "NaN"}, [("image", PNG)], "seed"),
            ({"prompt": "x", "guidance_scale": "1e999"}, [("image", PNG)], "guidance_scale"),
            ({"prompt": "x", "adapters": "{"}, [("image", PNG)], "adapters"),
            ({"prompt": ["x", "y"]}, [("image", PNG)], "prompt"),
            ({"seed": "1"}, [("image", PNG), ("prompt", b"file")], "prompt"),
        ):
            sent = [(name, ("f.png", content)) for name, content in files] or [("mask", ("m.png", MASK))]
            refused = await web.post("/v1/images/edits", data=data, files=sent)
            assert refused.status_code == 400, (param, refused.text)
            assert refused.json()["error"]["param"] == param


async def test_keys_of_every_kind_reach_the_orchestrator(tmp_path: Path):
    import hashlib

    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[tokens.acme]\nsha256 = "{hashlib.sha256(b"secret-1").hexdigest()}"\n')
    suite = FakeSuite(settings={"tokens_file": str(tokens)})
    async with serving(suite) as (_, url):
        async with client(url, api_key="secret-1") as ai:
            assert (await ai.images.generate(prompt="x")).data
            assert (await ai.models.list()).data
        async with client(url, api_key="wrong") as ai:
            with pytest.raises(openai.AuthenticationError):
                await ai.images.generate(prompt="x")
            with pytest.raises(openai.AuthenticationError):
                await ai.images.generate(prompt="x", stream=True)
        async with httpx2.AsyncClient(base_url=url) as web:
            for headers in (
                {"x-key": "secret-1"},
                {"X-API-Key": "secret-1"},
                {"Authorization": "Key secret-1"},
            ):
                assert (await web.get("/v1/models", headers=headers)).status_code == 200
            for headers in ({}, {"Authorization": "Basic abc"}, {"x-key": "a b"}):
                refused = await web.get("/v1/models", headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["type"] == "authentication_error"
            totals = (await web.get("/v1/usage", headers={"x-key": "secret-1"})).json()
            assert (totals["requests"], totals["images"]) == (1, 1)
            assert (await web.get("/v1/usage", headers={"x-key": "wrong"})).json()["requests"] == 0
            assert (await web.get("/v1/usage")).status_code == 401


async def test_a_price_table_gives_costs(tmp_path: Path):
    table = tmp_path / "prices.toml"
    table.write_text(
        'currency = "USD"\n[models.default]\nfirst_output_megapixel = 0.014\noutput_megapixel = 0.001\n'
    )
    async with serving(price_table=str(table)) as (_, url), client(url) as ai:
        made = await ai.images.generate(prompt="x")
        assert made.usage.cost == 0.014
        assert made.usage.currency == "USD"
        async with httpx2.AsyncClient(base_url=url) as web:
            totals = (await web.get("/v1/usage", headers={"Authorization": "Bearer unused"})).json()
            assert (totals["cost"], totals["currency"]) == (0.014, "USD")


async def test_the_rate_of_each_key_is_limited():
    async with serving(requests_per_minute=1.0, requests_burst=2) as (_, url):
        async with client(url, api_key="one") as one, client(url, api_key="two") as two:
            for _ in range(2):
                await one.images.generate(prompt="x")
            with pytest.raises(openai.RateLimitError) as refused:
                await one.images.generate(prompt="x")
            headers = refused.value.response.headers
            assert 0 < int(headers["retry-after-ms"]) <= 60_000
            assert 1 <= int(headers["retry-after"]) <= 60
            assert refused.value.code == "rate_limit_exceeded"
            await two.images.generate(prompt="x")


async def test_a_full_queue_is_429_with_the_orchestrator_s_time():
    suite = FakeSuite(settings={"queue_limit": 1})
    suite.denoiser.step_gate = asyncio.Event()
    async with serving(suite) as (running, url), client(url) as ai:
        first = asyncio.create_task(ai.images.generate(prompt="x"))
        await until(lambda: running.denoiser.specs)
        with pytest.raises(openai.RateLimitError) as refused:
            await ai.images.generate(prompt="y")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        suite.denoiser.step_gate.set()
        assert (await first).data


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_the_request_in_the_stages(stream: bool):
    suite = FakeSuite()
    suite.denoiser.step_gate = asyncio.Event()
    async with serving(suite) as (running, url):
        async with client(url) as ai:
            making = asyncio.create_task(ai.images.generate(prompt="x", stream=stream))
            await until(lambda: running.denoiser.specs)
            if stream:
                await (await making).close()
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        await until(lambda: running.denoiser.cancelled == 1)
        await nothing_left_running()


async def test_a_failure_within_a_stream_is_its_last_event():
    suite = FakeSuite()
    suite.denoiser.lost_calls = 100
    async with serving(suite) as (_, url), client(url) as ai:
        stream = await ai.images.generate(prompt="x", stream=True)
        with pytest.raises(openai.APIError) as failed:
            [event async for event in stream]
        assert failed.value.body["code"]


async def test_a_request_keeps_its_id_and_its_trace_on_the_way_to_the_orchestrator():
    async with serving() as (_, url), httpx2.AsyncClient(base_url=url) as web:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        headers = {"x-request-id": "from-client-1", "traceparent": trace}
        made = await web.post("/v1/images/generations", json={"prompt": "x"}, headers=headers)
        assert made.headers["x-request-id"] == "from-client-1"
        assert made.json()["klein"]["request_id"] == "from-client-1"


async def test_an_idempotency_key_repeats_the_answer_and_not_the_work():
    async with serving() as (suite, url), httpx2.AsyncClient(base_url=url) as web:
        answers = [
            await web.post("/v1/images/generations", json={"prompt": "x"}, headers={"Idempotency-Key": "k"})
            for _ in range(2)
        ]
        assert answers[0].json()["data"] == answers[1].json()["data"]
        assert len(suite.denoiser.specs) == 1
        bad = await web.post(
            "/v1/images/generations", json={"prompt": "x"}, headers={"Idempotency-Key": "k" * 200}
        )
        assert bad.status_code == 400


async def test_origins_of_the_setting_may_call_and_no_others():
    async with (
        serving(cors_origins="https://app.example") as (_, url),
        httpx2.AsyncClient(base_url=url) as web,
    ):
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = await web.options(
            "/v1/images/generations", headers={"Origin": "https://app.example", **asking}
        )
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        refused = await web.options(
            "/v1/images/generations", headers={"Origin": "https://evil.example", **asking}
        )
        assert "access-control-allow-origin" not in refused.headers
        answer = await web.get("/v1/models", headers={"Origin": "https://app.example"})
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


async def test_an_orchestrator_that_is_gone_is_503_and_its_address_stays_secret():
    async with running_gateway(GatewaySettings(target="127.0.0.1:1")) as url, client(url) as ai:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as refused:
                await ai.images.generate(prompt="x", stream=stream)
            assert refused.value.status_code == 503
            assert "127.0.0.1" not in refused.value.message
            assert refused.value.response.headers["retry-after"]

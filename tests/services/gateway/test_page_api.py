"""The page's endpoints before a real orchestrator: events, refusals, who may look, clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64decode
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import httpx2
import pytest

from klein_client import Image, Step, Summary, Timing
from klein_services.gateway.event_stream import EventStream
from klein_services.gateway.known_callers import MAXIMUM_CALLERS, KnownCallers
from klein_services.gateway.metrics import BODY_BYTES
from klein_services.gateway.page_api import FILES, GROUP
from klein_services.gateway.recent_requests import MAXIMUM_REQUESTS, SHOWN_REQUESTS, RecentRequests
from klein_services.gateway.server import running_gateway
from klein_services.gateway.settings import GatewaySettings
from klein_services.gateway.suite_watch import SuiteWatch, cache_loads
from klein_services.runtime.scrape import Scrape
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until

NO_SERVER = "127.0.0.1:1"
SETTINGS = {"prompt": "a red ring", "seed": "7", "width_px": 64, "height_px": 64}


@dataclass
class Browser:
    """Client of a gateway with the page's endpoints, and the suite behind it."""

    client: httpx2.AsyncClient
    suite: FakeSuite

    async def generate(self, settings: object, **options: object) -> list[tuple[str, dict]]:
        """Returns the events of a request that the gateway takes."""
        answer = await self.client.post("/page/api/generate", **body(settings), **options)
        assert answer.status_code == 200, answer.text
        return events(answer.text)


def body(settings: object, *files: tuple[str, bytes]) -> dict:
    form = [(name, (name, data)) for name, data in files]
    text = settings if isinstance(settings, str) else json.dumps(settings)
    # A part with an empty name of its file is a field; without any file httpx would not send a multipart form.
    return {"files": [("settings", (None, text)), *form]}


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for part in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.splitlines())
        found.append((lines["event"], json.loads(lines["data"])))
    return found


@asynccontextmanager
async def browser(**changes: object) -> AsyncIterator[Browser]:
    async with FakeSuite().running() as suite:
        settings = GatewaySettings(**({"target": suite.address} | changes))  # type: ignore[arg-type]
        async with (
            running_gateway(settings, [GROUP]) as url,
            httpx2.AsyncClient(base_url=url, timeout=60) as client,
        ):
            yield Browser(client, suite)


async def test_a_request_is_streamed_as_events_with_the_right_picture():
    async with browser() as page:
        found = await page.generate(SETTINGS | {"model": "", "image_count": 2, "adapters": []})
        kinds = [kind for kind, _ in found]
        images = {data["index"]: data for kind, data in found if kind == "image"}
        assert kinds[-1] == "summary"
        assert "step" in kinds
        for index, seed in enumerate((7, 8)):
            assert images[index]["seed"] == str(seed)
            assert b64decode(images[index]["data"]) == page.suite.expected_image("a red ring", seed)


async def test_a_seed_keeps_its_63_bits():
    async with browser() as page:
        found = await page.generate(SETTINGS | {"seed": str(2**63 - 1)})
        assert [data["seed"] for kind, data in found if kind == "image"] == [str(2**63 - 1)]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (SETTINGS | {"seed": "-1"}, "seed"),
        (SETTINGS | {"seed": "1e9"}, "seed"),
        (SETTINGS | {"seed": 1.5}, "seed"),
        (SETTINGS | {"hue": "red"}, "hue"),
        (SETTINGS | {"adapters": "warm"}, "adapters"),
        (SETTINGS | {"adapters": [{"name": "warm", "scale": None}]}, "adapters[0]"),
        (SETTINGS | {"adapters": [{"name": "warm", "scale": 1}] * 2}, "adapters[1]"),
    ],
)
async def test_settings_that_cannot_be_are_refused_by_field(settings, field):
    async with browser() as page:
        answer = await page.client.post("/page/api/generate", **body(settings))
        error = answer.json()["error"]
        assert answer.status_code == error["status"] == 400
        assert [each["field"] for each in error["violations"]] == [field]


async def test_a_form_without_settings_or_with_other_than_json_is_refused():
    async with browser() as page:
        for form in ({"files": [("prompt", (None, "a ring"))]}, body("no JSON"), body("[]")):
            answer = await page.client.post("/page/api/generate", **form)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"]


async def test_limits_of_the_orchestrator_are_an_event_with_every_field():
    async with browser() as page:
        bad = SETTINGS | {"width_px": 70, "step_count": 0, "quality": "high"}
        (kind, error), *others = await page.generate(bad)
        assert (kind, others, error["status"]) == ("error", [], 400)
        assert [each["field"] for each in error["violations"]] == ["quality"]
        (_, error), *_ = await page.generate(bad | {"quality": None})
        assert {each["field"] for each in error["violations"]} == {"width_px", "step_count"}


async def test_a_page_of_another_origin_may_not_call():
    async with browser() as page:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            headers = {"sec-fetch-site": site}
            assert (await page.client.get("/page/api/models", headers=headers)).status_code == status
            assert (await page.client.get("/page/api/suite", headers=headers)).status_code == status
            answer = await page.client.post("/page/api/generate", **body(SETTINGS), headers=headers)
            assert answer.status_code == status


async def test_files_of_the_page_have_a_strict_policy_and_are_all_that_is_served():
    async with browser() as page:
        for path in ("/", "/page/main.js", "/page/base.css", "/page/icon.svg"):
            answer = await page.client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            again = await page.client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert again.status_code in (200, 304)
        for path in ("/page/../page_api.py", "/page/%2e%2e/page_api.py", "/page/none.js", "/page/"):
            assert (await page.client.get(path)).status_code == 404


def test_the_page_names_only_files_that_exist_and_no_other_host():
    pages = {file.name: file.read_text() for file in FILES.iterdir()}
    named = set(re.findall(r'(?:href|src)="page/([^"]+)"', pages["index.html"]))
    named |= {name for text in pages.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named <= pages.keys()
    unused = pages.keys() - named - {"index.html", "jsconfig.json", "types.d.ts"}
    assert not unused
    for text in pages.values():
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}


async def test_a_client_that_leaves_cancels_its_request_and_gives_its_body_back():
    async with browser() as page:
        page.suite.denoiser.step_gate = asyncio.Event()
        leaving = asyncio.create_task(page.generate(SETTINGS))
        await until(lambda: page.suite.denoiser.calls)
        leaving.cancel()
        await until(lambda: page.suite.denoiser.cancelled)

        async def outcome() -> bool:
            requests = (await page.client.get("/page/api/suite")).json()["requests"]
            return [request["outcome"] for request in requests] == ["cancelled"]

        await until(outcome)
        assert BODY_BYTES._value.get() == 0


async def test_the_state_has_the_last_requests_without_their_content():
    async with browser() as page:
        await page.generate(SETTINGS)
        await page.generate(SETTINGS | {"width_px": 70})
        answer = await page.client.get("/page/api/suite")
        failed, succeeded = answer.json()["requests"]
        assert (failed["outcome"], succeeded["outcome"]) == ("failed", "succeeded")
        assert succeeded["flow"] == "text-to-image"
        ends = [phase["end_seconds"] for phase in succeeded["phases"]]
        assert ends == sorted(ends)
        assert ends[-1] <= succeeded["total_seconds"]
        assert "red ring" not in answer.text
        assert answer.json()["models_problem"] == "KLEIN_METRICS_TARGETS names no metrics pages."


async def test_a_dead_orchestrator_hides_the_state_from_strangers_only(free_port):
    known, stranger = {"authorization": "Bearer known"}, {"authorization": "Bearer other"}
    settings = GatewaySettings(target=f"127.0.0.1:{free_port}", metrics_targets=NO_SERVER)
    async with (
        running_gateway(settings, [GROUP]) as url,
        httpx2.AsyncClient(base_url=url, timeout=60) as client,
    ):
        async with FakeSuite(settings={"port": free_port}).running():
            alive = await client.get("/page/api/suite", headers=known)
            assert (alive.status_code, len(alive.json()["models"])) == (200, 1)
        dead = await client.get("/page/api/suite", headers=known)
        assert dead.status_code == 200
        assert "orchestrator does not answer" in dead.json()["models_problem"]
        assert dead.json()["processes"][0]["problem"]
        refused = await client.get("/page/api/suite", headers=stranger)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")


def test_callers_are_remembered_up_to_a_bound():
    callers = KnownCallers()
    for number in range(MAXIMUM_CALLERS + 1):
        callers.add(str(number))
        callers.add("0")
    assert "0" in callers
    assert "1" not in callers
    assert str(MAXIMUM_CALLERS) in callers


def test_the_last_requests_are_bounded_and_each_caller_sees_its_own():
    requests = RecentRequests()
    for number in range(MAXIMUM_REQUESTS + 5):
        requests.begin("one" if number % 2 else "two", f"model-{number}").end("failed")
    shown = requests.of("one")
    assert len(shown) == SHOWN_REQUESTS
    assert shown[0].model == f"model-{MAXIMUM_REQUESTS + 3}"
    assert requests.of("three") == []


def test_phases_follow_each_other_and_name_what_the_time_went_to():
    requests = RecentRequests()
    recording = requests.begin("one", "pico")
    recording.add(Step(1, 2))
    recording.add(Step(2, 2))
    recording.add(Image(0, 1, 64, 64, "png", b""))
    timings = (
        Timing("text-encoder", "encode-prompt", 1, 0.0, 0.0, 0.0),
        Timing("denoiser", "denoise", 1, 0.0, 60.0, 60.0),
    )
    recording.add(Summary("id", "pico", "edit", 1, False, 0, 0, 2, 1.0, timings, 1.0, ()))
    recording.end("succeeded")
    (request,) = requests.of("one")
    assert {phase.phase for phase in request.phases} <= {"denoise", "decode"}
    starts = [phase.start_seconds for phase in request.phases]
    assert starts == sorted(starts)
    assert starts[0] == 0.0


async def test_a_watch_without_pages_has_the_reason():
    assert "names no metrics pages" in (await SuiteWatch([]).view()).problem
    view = await SuiteWatch(["dns:///no-such-name.invalid:1"]).view()
    assert "cannot be resolved" in view.problem
    assert view.processes == ()


async def test_a_watch_shows_dead_processes_and_reads_at_most_once_a_second(monkeypatch):
    count = 0

    def pages(addresses):
        nonlocal count
        count += 1
        return [Scrape(each, 0.0, problem="connection refused") for each in addresses]

    monkeypatch.setattr("klein_services.gateway.suite_watch.scrape_all", pages)
    watch = SuiteWatch([NO_SERVER])
    views = await asyncio.gather(*(watch.view() for _ in range(20)))
    assert [view.processes[0].problem for view in views] == ["connection refused"] * 20
    assert count < 20


def test_caches_of_replicas_are_added():
    samples = {
        "klein_serving": {frozenset({("stage", "orchestrator")}): 1.0},
        "klein_cache_requests_total": {
            frozenset({("kind", "result"), ("outcome", "hit")}): 3.0,
            frozenset({("kind", "result"), ("outcome", "miss")}): 2.0,
        },
        "klein_cache_bytes": {frozenset({("kind", "result")}): 10.0},
    }
    (cache,) = cache_loads([Scrape("a:1", 0, samples), Scrape("b:1", 0, samples), Scrape("c:1", 0)])
    assert (cache.process, cache.kind, cache.hits, cache.lookups) == ("orchestrator", "result", 6, 10)
    assert (cache.bytes, cache.evictions) == (20, 0)


async def test_a_silent_stream_sends_comments_until_its_client_leaves():
    state = SimpleNamespace(sent=[], closed=False)
    left = asyncio.Event()

    async def silence() -> AsyncGenerator[tuple[str, dict], None]:
        try:
            yield "begin", {}
            await asyncio.Event().wait()
        finally:
            state.closed = True

    async def send(message):
        state.sent.append(message)

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    stream = EventStream(silence(), keep_alive_seconds=0.01)
    running = asyncio.create_task(stream({"type": "http"}, receive, send))
    await until(lambda: any(message.get("body", b"").startswith(b":") for message in state.sent))
    left.set()
    await running
    assert state.closed

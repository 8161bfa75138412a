"""The gateway before real stages with pico: each of its APIs makes an image of its own."""

from __future__ import annotations

import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import httpx2
import openai
import pytest
from PIL import Image

from klein_client import Client
from klein_services.cli.suite import Suite, SuiteOptions
from tests.e2e.running_suite import READY_SECONDS

PROMPT = "a large red heart on a yellow background"
SIDE = 64
POLL_SECONDS = 120.0


@dataclass(frozen=True)
class GatewaySuite:
    """A suite with its gateway."""

    suite: Suite
    http: httpx2.Client

    def expected(self, seed: int, **options: object) -> bytes:
        """The image that the gRPC API makes of the same request."""
        arguments: dict = {"width": SIDE, "height": SIDE, "seed": seed} | options
        return Client(self.suite.target).generate(PROMPT, **arguments).image.data

    def ended(self, url: str) -> dict:
        """Polls a job until it has ended."""
        deadline = time.monotonic() + POLL_SECONDS
        while time.monotonic() < deadline:
            answer = self.http.get(url).json()
            if answer["status"] not in ("Pending", "starting", "processing"):
                return answer
            time.sleep(0.1)
        raise TimeoutError(answer)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewaySuite]:
    folder = tmp_path_factory.mktemp("gateway")
    options = SuiteOptions(
        device="cpu",
        threads=1,
        log_folder=folder / "logs",
        has_gateway=True,
        gateway_port=0,
        settings={"KLEIN_MODEL_ALIASES": "flux-2-klein-4b=pico"},
    )
    with pytest.MonkeyPatch.context() as patch:
        # Jobs and results of the gateway.
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        with Suite(options) as suite:
            suite.wait_until_ready(timeout_seconds=READY_SECONDS)
            with httpx2.Client(base_url=suite.gateway_url, timeout=120, trust_env=False) as http:
                yield GatewaySuite(suite, http)


def test_openais_client_makes_edits_and_sees_images(gateway: GatewaySuite) -> None:
    size = f"{SIDE}x{SIDE}"
    with openai.OpenAI(base_url=f"{gateway.http.base_url}/v1", api_key="unused", max_retries=0) as ai:
        made = ai.images.generate(prompt=PROMPT, size=size, extra_body={"seed": 7})
        image = b64decode(made.data[0].b64_json)
        assert image == gateway.expected(7)
        edited = ai.images.edit(image=("heart.png", image), prompt=PROMPT, size=size, extra_body={"seed": 8})
        assert b64decode(edited.data[0].b64_json) == gateway.expected(8, references=[image])
        assert edited.usage.input_tokens_details.image_tokens == SIDE * SIDE // 256
        events = list(
            ai.images.generate(
                prompt=PROMPT,
                size=size,
                stream=True,
                partial_images=2,
                extra_body={"seed": 9, "steps": 12},
            )
        )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    # A preview that would come after the next one is left out.
    assert kinds in (["partial_image"] * count + ["completed"] for count in (1, 2))
    *previews, last = [b64decode(event.b64_json) for event in events]
    assert last == gateway.expected(9, steps=12)
    assert all(Image.open(BytesIO(preview)).size == (SIDE, SIDE) for preview in previews)


def test_bfls_poll_loop_ends_with_the_image(gateway: GatewaySuite) -> None:
    body = {"prompt": PROMPT, "width": SIDE, "height": SIDE, "seed": 10, "output_format": "png"}
    made = gateway.http.post("/v1/flux-2-klein-4b", json=body).raise_for_status().json()
    ended = gateway.ended(made["polling_url"])
    assert ended["status"] == "Ready"
    assert gateway.http.get(ended["result"]["sample"]).content == gateway.expected(10)


def test_a_prediction_has_a_link_to_its_image(gateway: GatewaySuite) -> None:
    given = {"prompt": PROMPT, "width": SIDE, "height": SIDE, "seed": 11, "output_format": "png"}
    made = gateway.http.post("/v1/predictions", json={"version": "pico", "input": given})
    ended = gateway.ended(made.raise_for_status().json()["urls"]["get"])
    assert ended["status"] == "succeeded"
    [url] = ended["output"]
    assert gateway.http.get(url).content == gateway.expected(11)


def test_the_page_and_the_document_answer(gateway: GatewaySuite) -> None:
    page = gateway.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>" in page.text
    document = gateway.http.get("/openapi.json").json()
    assert {"/v1/images/generations", "/v1/predictions", "/v1/get_result"} <= document["paths"].keys()

"""Webhooks: signatures, retries that survive a restart, and hostile receivers."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import replicate
from replicate.webhook import Webhooks, WebhookSigningSecret
from sqlalchemy import update

from klein_services.gateway import webhook_outbox
from klein_services.gateway.job import Webhook, WebhookEvent
from klein_services.gateway.job_database import DELIVERIES
from klein_services.gateway.outbound import Outbound
from klein_services.gateway.webhook_outbox import WebhookOutbox
from klein_services.gateway.webhook_sender import WebhookSender, secret_key, signature_headers, webhook_post
from tests.services.fakes.runtime_toy import until
from tests.services.gateway.job_contract import Gateway, new_job
from tests.services.gateway.job_suite import job_suite


class Receiver:
    """Real HTTP server that keeps what it gets and answers as the test has it."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, str], str]] = []
        self.statuses: list[int] = []
        """Of the next answers; 200 afterwards."""
        self.hang = threading.Event()
        self.hangs = False
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver.calls.append(({k.lower(): v for k, v in self.headers.items()}, body))
                if receiver.hangs:
                    receiver.hang.wait(30)
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("location", "http://127.0.0.1:1/secret")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Writes nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    @property
    def bodies(self) -> list[dict]:
        return [json.loads(body) for _, body in self.calls]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.05,))
    thread.start()
    yield receiver
    receiver.hang.set()
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_outbox, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(webhook_outbox, "PAUSE_FACTOR", 1.0)


async def test_bfls_webhook_is_signed_with_the_clients_secret(receiver):
    async with job_suite(download_private_hosts="127.0.0.1") as jobs:
        body = {"prompt": "a ring", "webhook_url": receiver.url, "webhook_secret": "mine"}
        made = (await jobs.post("/v1/flux-2-klein-4b", body)).json()
        await until(lambda: receiver.calls)
        [(headers, text)] = receiver.calls
        message_id, timestamp = headers["webhook-id"], int(headers["webhook-timestamp"])
        assert (
            signature_headers("mine", message_id, text, timestamp)["webhook-signature"]
            == (headers["webhook-signature"])
        )
        got, polled = json.loads(text), await jobs.polled(made["polling_url"])
        assert (got["id"], got["status"]) == (made["id"], "Ready")
        assert (await jobs.http.get(got["result"]["sample"])).content == (
            await jobs.http.get(polled["result"]["sample"])
        ).content


async def test_events_and_signature_as_replicates_package_checks_them(receiver):
    async with job_suite(download_private_hosts="127.0.0.1") as jobs:
        client = replicate.Client(api_token="key", base_url=jobs.url)
        secret = await client.webhooks.default.async_secret()
        await client.predictions.async_create(
            version="flux-2-klein-4b", input={"prompt": "a ring"}, webhook=receiver.url
        )
        await until(lambda: receiver.bodies and receiver.bodies[-1]["status"] == "succeeded")
        for headers, body in receiver.calls:
            Webhooks.validate(headers=headers, body=body, secret=secret, tolerance=300)
        statuses = [body["status"] for body in receiver.bodies]
        assert statuses[0] == "processing"
        assert statuses[-1] == "succeeded"
        assert receiver.bodies[0]["output"] is None
        # The output comes before the end.
        assert receiver.bodies[-2]["output"] is not None
        assert len({headers["webhook-id"] for headers, _ in receiver.calls}) == len(receiver.calls)
        # Another key has another secret.
        other = replicate.Client(api_token="other", base_url=jobs.url)
        assert (await other.webhooks.default.async_secret()).key != secret.key
        receiver.calls.clear()
        made = await client.predictions.async_create(
            version="flux-2-klein-4b",
            input={"prompt": "a ring"},
            webhook=receiver.url,
            webhook_events_filter=["completed"],
        )
        await until(lambda: receiver.calls)
        await made.async_wait()
        assert [body["status"] for body in receiver.bodies] == ["succeeded"]
        for each in (client, other):
            each._client.close()
            await each._async_client.aclose()


async def test_a_webhook_at_a_private_address_is_never_called(receiver, short_pauses, state_folder):
    async with job_suite(webhook_attempts=2) as jobs:
        body = {"prompt": "a ring", "webhook_url": receiver.url}
        made = (await jobs.post("/v1/flux-2-klein-4b", body)).json()
        assert (await jobs.polled(made["polling_url"]))["status"] == "Ready"
        database = Gateway(f"sqlite:///{state_folder}/klein/jobs.sqlite").database
        outbox = WebhookOutbox(database, attempts=2)
        await emptied(outbox)
        await database.close()
        assert receiver.calls == []


async def emptied(outbox: WebhookOutbox) -> None:
    async with asyncio.timeout(60):
        while True:
            if await outbox.count() == 0:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("first", [[500, 503], [302, 307]])
async def test_failures_and_redirects_are_tried_again_with_the_same_id(receiver, short_pauses, first):
    receiver.statuses = list(first)
    async with job_suite(download_private_hosts="127.0.0.1") as jobs:
        await jobs.post("/v1/flux-2-klein-4b", {"prompt": "a ring", "webhook_url": receiver.url})
        await until(lambda: len(receiver.calls) == 3)
        assert len({headers["webhook-id"] for headers, _ in receiver.calls}) == 1
        assert len({body for _, body in receiver.calls}) == 1


class Hooks:
    """Outbox and sender on a database, without anything that makes images."""

    def __init__(self, gateway: Gateway, attempts: int = 3, seconds: float = 5.0) -> None:
        self.outbound = Outbound({"127.0.0.1"})
        self.outbox = WebhookOutbox(gateway.database, attempts=attempts)
        self.sender = WebhookSender(self.outbox, webhook_post(self.outbound, seconds))

    async def close(self) -> None:
        await self.sender.close()
        await self.outbound.close()


@pytest.fixture
async def gateway(tmp_path):
    gateway = Gateway(f"sqlite:///{tmp_path}/jobs.sqlite")
    await gateway.database.open()
    yield gateway
    await gateway.database.close()


async def ended_job(gateway: Gateway, url: str, events=frozenset({WebhookEvent.COMPLETED})) -> str:
    job, _ = await gateway.store.create(new_job(webhook=Webhook(url=url, secret="s", events=events)))
    leased = await gateway.queue.claim()
    assert await gateway.queue.succeed(leased, {"images": []})
    return job.id


async def test_calls_survive_a_gateway_that_stops_in_the_middle(gateway, receiver):
    receiver.hangs = True
    await ended_job(gateway, receiver.url)
    first = Hooks(gateway)
    first.sender.start()
    await until(lambda: receiver.calls)
    await first.close()
    assert await first.outbox.count() == 1
    receiver.hang.set()
    receiver.hangs = False
    second = Hooks(gateway)
    # The call is taken over when the time of an attempt has passed.
    assert await second.outbox.claim(10) == []
    await gateway.database.write(
        lambda connection: connection.execute(update(DELIVERIES).values(available_at=0.0))
    )
    second.sender.start()
    await until(lambda: len(receiver.calls) == 2)
    assert receiver.calls[0][0]["webhook-id"] == receiver.calls[1][0]["webhook-id"]
    await emptied(second.outbox)
    await second.close()


async def test_a_receiver_that_hangs_holds_nothing_up(gateway, receiver, short_pauses):
    receiver.hangs = True
    await ended_job(gateway, receiver.url)
    hooks = Hooks(gateway, attempts=2, seconds=0.2)
    hooks.sender.start()
    await emptied(hooks.outbox)
    # A busy machine may use the whole time before the receiver has read anything.
    assert len(receiver.calls) <= 2
    await hooks.close()


async def test_a_receiver_that_is_gone_gets_no_second_call(gateway, receiver, short_pauses):
    receiver.statuses = [410]
    await ended_job(gateway, receiver.url)
    hooks = Hooks(gateway)
    hooks.sender.start()
    await emptied(hooks.outbox)
    assert len(receiver.calls) == 1
    await hooks.close()


async def test_only_the_last_event_is_repeated_and_events_keep_their_order(gateway, receiver, short_pauses):
    receiver.statuses = [500, 500, 500]
    await ended_job(gateway, receiver.url, frozenset(WebhookEvent))
    hooks = Hooks(gateway)
    hooks.sender.start()
    await emptied(hooks.outbox)
    assert [body["event"] for body in receiver.bodies] == ["start", "output", "completed", "completed"]
    await hooks.close()


def test_keys_of_secrets():
    assert secret_key("plain") == b"plain"
    assert secret_key("whsec_" + base64.b64encode(b"key").decode()) == b"key"
    assert secret_key("whsec_%") == b"whsec_%"
    secret = WebhookSigningSecret(key="whsec_" + base64.b64encode(b"key").decode())
    headers = signature_headers(secret.key, "id", "body", 5)
    Webhooks.validate(headers=headers, body="body", secret=secret)

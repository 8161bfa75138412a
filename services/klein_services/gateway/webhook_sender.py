"""Sender of webhooks: signs the calls that are due and makes them, within bounds of number, time and attempts."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from klein_services.gateway.job import StoreUnavailable
from klein_services.gateway.job_metrics import WEBHOOKS
from klein_services.gateway.outbound import Outbound, OutboundError
from klein_services.gateway.webhook_outbox import Delivery, WebhookOutbox

CONCURRENT_CALLS = 32
"""Calls at a time; a receiver that hangs holds one of them for the time of an attempt."""
ANSWER_BYTES = 1 << 16
"""Most bytes of a receiver's answer, which only its status matters of."""
LOOK_SECONDS = 1.0
"""Time between two looks at the outbox."""
GONE = 410
"""Status by which a receiver wants no further call."""
SECRET_PREFIX = "whsec_"
"""Begin of a secret that is base64, as Standard Webhooks has it."""
_log = logging.getLogger("klein.webhooks")

Post = Callable[[str, Mapping[str, str], bytes], Awaitable[int]]
"""Posts a body to a URL and returns the HTTP status; raises CallFailed."""


class CallFailed(Exception):
    """A webhook was not called, or has not answered."""


def signature_headers(secret: str, message_id: str, body: str, timestamp: int) -> dict[str, str]:
    """Returns the headers of Standard Webhooks: id, time and HMAC-SHA256 of both with the body.

    Args:
        secret: `whsec_` with base64 of the key, or any other text, whose UTF-8 is the key.
        message_id: the same for every attempt of a call.
        body: the body.
        timestamp: seconds since 1970.
    """
    content = f"{message_id}.{timestamp}.{body}".encode()
    digest = hmac.new(secret_key(secret), content, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": "v1," + base64.b64encode(digest).decode("ascii"),
    }


def secret_key(secret: str) -> bytes:
    """Returns the key of a secret."""
    if secret.startswith(SECRET_PREFIX):
        try:
            return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            return secret.encode()
    return secret.encode()


def webhook_post(outbound: Outbound, seconds: float) -> Post:
    """Returns the function that calls webhooks at public addresses, without redirects, each within `seconds`."""

    async def post(url: str, headers: Mapping[str, str], body: bytes) -> int:
        try:
            answer = await outbound.send(
                "POST",
                url,
                seconds=seconds,
                maximum_bytes=ANSWER_BYTES,
                headers=headers,
                content=body,
                redirects=0,
            )
        except OutboundError as error:
            raise CallFailed(str(error)) from None
        return answer.status

    return post


class WebhookSender:
    """Makes the calls of an outbox.

    Args:
        outbox: the waiting calls.
        post: makes one call.
    """

    def __init__(self, outbox: WebhookOutbox, post: Post) -> None:
        self._outbox = outbox
        self._post = post
        self._wake = asyncio.Event()
        self._calls: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to make calls."""
        self._loop = asyncio.create_task(self._send_due(), name="webhooks")

    def wake(self) -> None:
        """Makes the sender look at the outbox at once."""
        self._wake.set()

    async def close(self) -> None:
        """Stops; calls in progress are made again by the next gateway, with the same id."""
        tasks = [*self._calls, *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_due(self) -> None:
        while True:
            self._wake.clear()
            free = CONCURRENT_CALLS - len(self._calls)
            due = 0
            if free > 0:
                try:
                    deliveries = await self._outbox.claim(free)
                    due = len(deliveries)
                    for delivery in deliveries:
                        task = asyncio.create_task(self._send(delivery), name="webhook")
                        self._calls.add(task)
                        task.add_done_callback(self._done)
                except StoreUnavailable as error:
                    _log.error("no webhook can be called: %s", error)
                except Exception:
                    _log.exception("no webhook can be called because of a fault")
            if not due:
                try:
                    await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)
                except TimeoutError:
                    continue

    def _done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        # The next event of the same job was waiting for this one.
        self._wake.set()

    async def _send(self, delivery: Delivery) -> None:
        facts = {"job": delivery.job_id, "event": delivery.event.value, "attempt": delivery.attempts}
        headers = {"content-type": "application/json"}
        if delivery.secret is not None:
            headers |= signature_headers(delivery.secret, delivery.id, delivery.body, int(time.time()))
        status = 0
        try:
            status = await self._post(delivery.url, headers, delivery.body.encode())
            reason = f"it answered {status}"
        except CallFailed as error:
            reason = str(error)
        try:
            if 200 <= status < 300:
                await self._outbox.remove(delivery)
                WEBHOOKS.labels("delivered").inc()
            elif status != GONE and await self._outbox.postpone(delivery):
                WEBHOOKS.labels("failed").inc()
                _log.info("a webhook failed and is called again: %s", reason, extra=facts)
            else:
                await self._outbox.remove(delivery)
                WEBHOOKS.labels("given_up").inc()
                _log.warning("a webhook is given up: %s", reason, extra=facts)
        except StoreUnavailable as error:
            _log.error("the end of a webhook's call cannot be written: %s", error, extra=facts)

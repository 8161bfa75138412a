"""Requests that are cancelled at each await of their life leave nothing behind, and the next one is answered right."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import REGISTRY

from klein_api.v1 import image_service_pb2 as api
from klein_services.orchestrator.checkpoint_pace import CheckpointPace
from klein_services.orchestrator.servicer import ImageApi
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, drained, parts_running
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.suspensions import Suspensions, watched, watched_tasks
from tests.services.fakes.tenants import TOKEN, bearer, tokens_toml

EVERY_AWAIT = os.environ.get("EVERY_AWAIT", "") == "1"
"""Whether every await is tried, which takes a minute, and not a sample of them."""
SAMPLES = 12
STEPS = 3
FILES = (reference_file(64, 64, "a"), reference_file(64, 64, "b"))
INITIAL, MASK = reference_file(64, 64, "initial"), b"mask:"
FLOWS: dict[str, dict] = {
    "text-to-image": {"image_count": 2},
    "edit": {"references": FILES[:1]},
    "multi-reference": {"references": FILES},
    "masked-edit": {"initial_image": INITIAL, "mask": MASK},
}
HANDLERS = ("GenerateImage", "StreamGenerateImage")


class EveryStep(CheckpointPace):
    """Asks for a checkpoint after every step, so that cancellations hit them too."""

    def record(self, model: str, checkpoint_seconds: float, step_seconds: float) -> None: ...


class Watch:
    """The suspensions of the request that comes next."""

    def __init__(self) -> None:
        self.next: Suspensions | None = None


@pytest.fixture
def watch(monkeypatch) -> Watch:
    state = Watch()

    def watching(handler):
        async def handle(self, request, context):
            suspensions, state.next = state.next, None
            if suspensions is None:
                return await handler(self, request, context)
            return await watched(handler(self, request, context), suspensions)

        return handle

    for name in HANDLERS:
        monkeypatch.setattr(ImageApi, name, watching(getattr(ImageApi, name)))
    return state


@asynccontextmanager
async def running_suite(folder) -> AsyncIterator[FakeSuite]:
    tokens = tokens_toml(folder, requests_in_flight=1, megapixels_per_minute=1e6)
    # Without a cache every request needs every stage.
    settings = {"tokens_file": tokens, "cache_bytes": 0, "queue_limit": 1, "maximum_reference_bytes": 1 << 20}
    async with FakeSuite(settings=settings).running() as suite:
        suite.orchestrator.generator.pace = EveryStep()
        with watched_tasks():
            yield suite


def call_of(suite: FakeSuite, handler: str, spec: api.ImageSpec):
    if handler == "GenerateImage":
        return suite.images.GenerateImage(api.GenerateImageRequest(spec=spec), metadata=bearer(TOKEN))
    request = api.StreamGenerateImageRequest(spec=spec, preview_interval_steps=1)
    return suite.images.StreamGenerateImage(request, metadata=bearer(TOKEN))


def levels(suite: FakeSuite) -> dict[str, object]:
    """Returns everything that a request takes, or that closes the door to the next one."""
    generator = suite.orchestrator.generator
    accounts = generator.quotas._accounts.values()
    pools = generator.backlog._pools
    return {
        "slots": generator.slots.in_use,
        "slots as a metric": _total("klein_slots_in_use"),
        "places of the tenant": sum(account.in_flight for account in accounts),
        "backlog": {stage: pool.count for (stage, _), pool in pools.items() if pool.count},
        "used channels": {target: count for target, count in generator.channels._users.items() if count},
        "calls of stages": {
            each.stage: running
            for each in suite.stages
            if (running := each.calls - each.cancelled - each.finished)
        },
        "rpcs": _total("grpc_server_started_total") - _total("grpc_server_handled_total"),
        "cache": generator.cache.size_bytes,
    }


def _total(name: str) -> float:
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        # Health watches of the suite's own channels go on for ever.
        if sample.name == name and not sample.labels.get("grpc_service", "").startswith("grpc.")
    )


def images_of(response_or_events) -> dict[int, bytes]:
    return {image.index: image.data for image in response_or_events}


async def answered(suite: FakeSuite, handler: str, spec: api.ImageSpec) -> dict[int, bytes]:
    call = call_of(suite, handler, spec)
    if handler == "GenerateImage":
        return images_of((await call).images)
    events: list[api.StreamGenerateImageResponse] = []
    await drained(call, events)
    return images_of(event.image for event in events if event.HasField("image"))


async def cancelled(
    suite: FakeSuite, watch: Watch, handler: str, spec: api.ImageSpec, number: int
) -> Suspensions:
    """Makes a request that is cancelled at its suspension `number`, or ends before."""
    watch.next = suspensions = Suspensions(number)
    call = call_of(suite, handler, spec)
    reader = asyncio.ensure_future(drained(call) if handler == "StreamGenerateImage" else call)
    async with asyncio.timeout(30):
        await suspensions.ended.wait()
    assert parts_running() == set(), "the handler ended before the request's tasks"
    if suspensions.has_cancelled:
        # A handler that is cancelled answers nothing: in life its client has hung up.
        call.cancel()
    await asyncio.wait([reader])
    if not suspensions.has_cancelled:
        await reader
    return suspensions


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("flow", FLOWS)
async def test_a_cancellation_at_any_await_leaves_nothing(tmp_path, watch, caplog, flow, handler):
    caplog.set_level(logging.WARNING)
    spec = api.ImageSpec(prompt="fox", seed=3, step_count=STEPS, **{"image_count": 1, **FLOWS[flow]})
    async with running_suite(tmp_path) as suite:
        expected = await answered(suite, handler, spec)
        assert len(expected) == spec.image_count
        at_start = levels(suite)
        assert not any(level for name, level in at_start.items() if name != "rpcs")
        length = (await cancelled(suite, watch, handler, spec, 0)).count
        assert length > SAMPLES
        numbers = range(1, length + 1, 1 if EVERY_AWAIT else length // SAMPLES)
        hits = 0
        for number in numbers:
            suspensions = await cancelled(suite, watch, handler, spec, number)
            await until(lambda: all(task.done() for task in suspensions.tasks))  # noqa: B023
            try:
                await until(lambda: levels(suite) == at_start, 10)
            except TimeoutError:
                pytest.fail(f"after a cancellation at await {number} of {length}: {levels(suite)}")
            hits += suspensions.has_cancelled
        assert hits > len(numbers) // 2
        assert await answered(suite, handler, spec) == expected
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []

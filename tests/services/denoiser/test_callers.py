"""Callers of a real denoiser server, as the orchestrator's metadata names them."""

from __future__ import annotations

import asyncio

import pytest

from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_services.denoiser.engine import Engine
from klein_services.runtime.caller import CALLER_KEY, WEIGHT_KEY
from tests.services.fakes.denoiser_server import (
    Tensors,
    eventually,
    gated_steps,
    image,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)

CROWD = ((CALLER_KEY, "crowd"), (WEIGHT_KEY, "50.000000"))
SINGLE = ((CALLER_KEY, "single"), (WEIGHT_KEY, "1.000000"))


@pytest.fixture
def submitted(monkeypatch):
    """Requests whose tensors the engine has."""
    requests, submit = [], Engine.submit

    def recorded(engine, scheduled, state):
        submit(engine, scheduled, state)
        requests.append(scheduled)

    monkeypatch.setattr(Engine, "submit", recorded)
    return requests


async def served(channel, gate, submitted, calls):
    """Makes calls while the first one's first step runs; returns their names in the order in which they begin.

    Args:
        channel: of the denoiser.
        gate: of its steps.
        submitted: see the fixture.
        calls: name, metadata and parts of each, and the list that its queue positions are added to.
    """

    async def ask(metadata, parts, positions):
        # Without a deadline, which would decide the order within a caller.
        call = DenoiserServiceStub(channel).DenoiseLatents(iter(parts), metadata=metadata)
        async for response in call:
            if response.WhichOneof("event") == "queued":
                positions.append(response.queued.position)

    gate.hold()
    tasks = []
    for number, (_, *call) in enumerate(calls):
        tasks.append(asyncio.create_task(ask(*call)))
        await eventually(lambda expected=number + 1: len(submitted) == expected)
        if number == 0:
            await gate.blocked(0)
    gate.release()
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    begun = sorted(zip(submitted, calls, strict=True), key=lambda pair: pair[0].started_at)
    return [name for _, (name, *_) in begun]


async def test_a_caller_with_one_request_waits_for_one_of_anothers_twenty(tmp_path, monkeypatch, submitted):
    folder, positions = save_checkpoint(tmp_path, distilled=True), []
    crowd = [(f"crowd {number}", CROWD, request(spec(step_count=2)), []) for number in range(20)]
    single = ("single", SINGLE, request(spec(step_count=2)), positions)
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folder) as channel:
            begun = await served(channel, gate, submitted, [*crowd, single])
    assert begun[:2] == ["crowd 0", "single"]
    assert max(positions) == 1, "it never stood behind the others"
    assert [each.caller.name for each in submitted] == ["crowd"] * 20 + ["single"]


async def test_a_resumed_request_goes_before_those_of_its_caller_that_wait(tmp_path, monkeypatch, submitted):
    folder = save_checkpoint(tmp_path, distilled=True)
    fresh = [(str(number), CROWD, request(spec(step_count=2)), []) for number in range(4)]
    parts = request(spec(step_count=4, resume_step=2), Tensors(resume=(image(4, 4),)))
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(folder) as channel:
            begun = await served(channel, gate, submitted, [*fresh, ("resumed", CROWD, parts, [])])
    assert begun == ["0", "resumed", "1", "2", "3"]

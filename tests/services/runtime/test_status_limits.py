"""Statuses fit the headers that they travel in, whatever clients send."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klein_api.v1.image_pb2 import Adapter
from klein_core.errors import InvalidInput, Violation
from klein_services.runtime.errors import UnknownModel
from klein_services.runtime.status import VIOLATIONS_BYTES, explain, shortened, status_of, within_size_limit
from tests.services.fakes.orchestrator_suite import FakeSuite, refusal
from tests.services.fakes.runtime_toy import call, failure

SOFT_LIMIT_BYTES = 8192
"""gRPC's default, over which a caller refuses headers at random."""


def header_bytes(status) -> int:
    message = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())
    metadata = sum(len(value) * 4 / 3 for _, value in status.trailing_metadata())
    return int(message + metadata)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 300))
def test_any_violations_fit(words, count, length):
    error = InvalidInput(Violation(word * (length // 8), word * length) for word in words * count)
    assert header_bytes(status_of(error)) < SOFT_LIMIT_BYTES * 0.9


def test_other_details_fit():
    error = UnknownModel("model", "漢" * 5000, ["模" * 100] * 500)
    assert header_bytes(status_of(error)) < SOFT_LIMIT_BYTES * 0.9


@given(st.text(), st.integers(9, 60))
def test_a_text_is_cut_only_when_it_must_be(text, limit):
    encoded = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())
    short = shortened(text, limit)
    assert (short == text) == (encoded <= limit)
    assert short == text or (short.endswith("…") and text.startswith(short[:-1]))


def test_violations_that_do_not_fit_are_counted():
    violations = [Violation(f"seeds[{index}]", "is -1; " + "x" * 100) for index in range(500)]
    shown = list(within_size_limit(violations))
    assert shown[:-1] == violations[: len(shown) - 1]
    assert shown[-1].description == f"is wrong, too: {500 - len(shown) + 1} more violations are not listed"
    assert sum(len(each.field) + len(each.description) for each in shown) < VIOLATIONS_BYTES + 300


async def test_the_worst_that_a_request_may_be_is_still_told_as_such():
    adapters = [Adapter(name="漢" * 64 + str(index), scale=99) for index in range(8)]
    worst = {
        "adapters": adapters,
        "references": [b""] * 4,
        "width_px": -1,
        "height_px": -7,
        "seed": -5,
        "image_count": 100000,
        "step_count": 100000,
        "guidance_scale": float("nan"),
        "quality": 500,
        "format": 99,
        "priority": 99,
    }
    async with FakeSuite().running() as suite:
        for _ in range(10):
            details = await refusal(suite, **worst)
            assert details.code is grpc.StatusCode.INVALID_ARGUMENT
            assert {"width_px", "seed", "step_count"} <= {each.field for each in details.violations}


@pytest.mark.parametrize("shape", ["unary_unary", "stream_stream"])
async def test_thousands_of_violations_arrive_as_what_they_are(toy, toy_channel, shape):
    async def refuse(request, context):
        raise InvalidInput(Violation(f"metadata[{'漢' * 900}]", "is not allowed") for _ in range(5000))
        yield b""

    toy.behavior = refuse
    for _ in range(10):
        details = explain(await failure(call(toy_channel, shape)))
        assert details.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "more violations" in details.violations[-1].description

"""Spans of a request's steps: groups of them, not one a step."""

from __future__ import annotations

import asyncio

import pytest

from klein_services.denoiser.step_spans import GROUP_LIMIT, StepSpans
from klein_services.runtime import tracing
from tests.services.fakes.span_collector import SpanCollector, export


def ranges(collector: SpanCollector) -> list[tuple[int, int]]:
    spans = collector.named("denoise steps")
    return [(span.attributes["klein.step.first"], span.attributes["klein.step.last"]) for span in spans]


@pytest.mark.parametrize(
    ("step_count", "first_step", "groups"),
    [
        (1, 0, [(1, 1)]),
        (4, 0, [(1, 4)]),
        (6, 0, [(1, 4), (5, 6)]),
        (3, 5, [(6, 8)]),
        (50, 0, [(1, 7), (8, 14), (15, 21), (22, 28), (29, 35), (36, 42), (43, 49), (50, 50)]),
    ],
)
async def test_steps_are_grouped(span_collector, step_count, first_step, groups):
    with tracing.span("request"):
        spans = StepSpans(step_count, first_step)
    spans.started(0.25)
    for step in range(first_step + 1, first_step + step_count + 1):
        spans.stepped(step, 10.0, requests=step, tokens=100 * step)
    spans.close()
    spans.close()
    await export()
    assert ranges(span_collector) == groups
    (request,) = span_collector.named("request")
    assert {span.parent for span in span_collector.spans if span is not request} == {request.id}
    last = span_collector.named("denoise steps")[-1]
    assert last.attributes["klein.step.requests"] == first_step + step_count
    assert last.attributes["klein.step.tokens"] == 100 * (first_step + step_count)
    (queue,) = span_collector.named("queue")
    assert queue.raw.end_time_unix_nano - queue.raw.start_time_unix_nano == pytest.approx(0.25e9, rel=1e-3)


async def test_images_that_step_in_turn_share_a_group(span_collector):
    spans = StepSpans(4, 0)
    for item in range(1, 9):  # two images
        spans.stepped(item // 2, 10.0, requests=1, tokens=64)
    spans.close()
    await export()
    assert ranges(span_collector) == [(1, 4)]


async def test_a_pause_ends_a_group_and_many_pauses_do_not_make_endless_spans(span_collector):
    spans = StepSpans(1000, 0)
    for step in range(1, 3 * GROUP_LIMIT):
        await asyncio.sleep(0.002)
        spans.stepped(step, 0.0001, requests=1, tokens=64)
    spans.close()
    await export()
    found = ranges(span_collector)
    assert len(found) == GROUP_LIMIT
    assert found[0] == (1, 1)
    assert found[-1] == (GROUP_LIMIT, 3 * GROUP_LIMIT - 1)

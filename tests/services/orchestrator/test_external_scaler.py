"""The orchestrator as KEDA's external scaler, asked by a plain gRPC client as KEDA asks."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from klein_api.externalscaler import external_scaler_service_pb2 as api
from klein_api.externalscaler.external_scaler_service_pb2_grpc import ExternalScalerStub
from klein_services.orchestrator import external_scaler
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.external_scaler import STREAM_LIMIT, Trigger
from klein_services.orchestrator.routing import StageAddress, read_routing_table
from klein_services.runtime.status import explain
from tests.services.fakes.orchestrator_suite import FakeSuite, generate
from tests.services.fakes.runtime_toy import failure, until

STAGES = ("text-encoder", "denoiser", "vae-decoder")
KEDA_KEYS = {"scalerAddress": "dns:///orchestrator:50050", "enableTLS": "false"}


def reference(stage: str = "denoiser", **metadata: str) -> api.ScaledObjectRef:
    if not {"backlogSeconds", "backlogRequests"} & metadata.keys():
        metadata["backlogSeconds"] = "2.5"
    return api.ScaledObjectRef(
        name=stage, namespace="klein", scalerMetadata={"stage": stage, **KEDA_KEYS, **metadata}
    )


def requests(stage: str = "denoiser") -> api.ScaledObjectRef:
    return reference(stage, backlogRequests="1")


@asynccontextmanager
async def scaled_suite(**settings: object):
    suite = FakeSuite(settings={"scaler_settle_seconds": 0.0, **settings})
    async with suite.running():
        yield suite, ExternalScalerStub(suite.channel)


async def value(scaler: ExternalScalerStub, scaled_object: api.ScaledObjectRef) -> float:
    """Asks as KEDA does: the specification first, then the metric that it names."""
    (spec,) = (await scaler.GetMetricSpec(scaled_object)).metricSpecs
    request = api.GetMetricsRequest(scaledObjectRef=scaled_object, metricName=spec.metricName)
    (metric,) = (await scaler.GetMetrics(request)).metricValues
    assert metric.metricName == spec.metricName
    assert metric.metricValue - 1 < metric.metricValueFloat <= metric.metricValue
    return metric.metricValueFloat


async def refused(call) -> tuple[grpc.StatusCode, str]:
    details = explain(await failure(call))
    return details.code, details.message


@asynccontextmanager
async def requests_in_progress(suite: FakeSuite, count: int):
    tasks = [asyncio.create_task(generate(suite, prompt=f"fox {n}", seed=n)) for n in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_bytes_on_the_wire_are_kedas():
    """Serialized by hand from KEDA's documented field numbers: a request of GetMetrics and its response."""
    entry = b"\x0a\x05stage\x12\x08denoiser"
    target = b"\x0a\x0fbacklogRequests\x12\x011"
    scaled_object = b"\x0a\x01d\x12\x01k" + b"".join(
        b"\x1a" + bytes([len(part)]) + part for part in (entry, target)
    )
    name = b"denoiser-backlog-requests"
    request = b"\x0a" + bytes([len(scaled_object)]) + scaled_object + b"\x12" + bytes([len(name)]) + name
    async with scaled_suite() as (suite, _):
        call = suite.channel.unary_unary("/externalscaler.ExternalScaler/GetMetrics")
        # Zeros are not on the wire: one metric value with nothing but its name.
        metric = b"\x0a" + bytes([len(name)]) + name
        assert await call(request) == b"\x0a" + bytes([len(metric)]) + metric
        active = suite.channel.unary_unary("/externalscaler.ExternalScaler/IsActive")
        assert await active(scaled_object) == b""
        suite.denoiser.step_gate = asyncio.Event()
        async with requests_in_progress(suite, 3):
            await until(lambda: suite.denoiser.calls == 3)
            one = b"\x10\x03\x19\x00\x00\x00\x00\x00\x00\x08\x40"
            metric += one
            await until(lambda: suite.orchestrator.generator.backlog.pool(denoiser_of(suite)).count == 3)
            assert await call(request) == b"\x0a" + bytes([len(metric)]) + metric
            assert await active(scaled_object) == b"\x08\x01"


def denoiser_of(suite: FakeSuite) -> StageAddress:
    return suite.orchestrator.generator.table.route("").denoiser


async def test_the_backlog_is_what_waits_now_without_a_scrape():
    async with scaled_suite() as (suite, scaler):
        await generate(suite, prompt="measured", seed=1)
        assert await value(scaler, reference()) == 0
        suite.denoiser.step_gate = asyncio.Event()
        async with requests_in_progress(suite, 4) as tasks:
            await until(lambda: suite.denoiser.calls == 5)
            await until(async_equals(scaler, requests(), 4))
            # The fake denoiser reports 7 ms for each request of this size.
            assert await value(scaler, reference()) == pytest.approx(4 * 0.007)
            assert (await scaler.IsActive(reference())).result
            suite.denoiser.step_gate.set()
            await asyncio.gather(*tasks)
            assert await value(scaler, reference()) == 0
            assert not (await scaler.IsActive(reference())).result


def async_equals(scaler, scaled_object, expected):
    async def is_equal() -> bool:
        return await value(scaler, scaled_object) == expected

    return is_equal


async def test_done_steps_are_no_backlog():
    async with scaled_suite() as (suite, scaler):
        await generate(suite, prompt="measured", seed=1, step_count=4)
        suite.denoiser.step_gate, suite.denoiser.steps_done = asyncio.Event(), 0
        gate = suite.denoiser.step_gate
        async with requests_in_progress(suite, 1):
            await until(lambda: suite.denoiser.calls == 2)
            await until(async_equals(scaler, requests(), 1))
            before = await value(scaler, reference())
            suite.denoiser.step_seconds = 0.2
            gate.set()
            await until(lambda: suite.denoiser.steps_done >= 1)
            gate.clear()
            await until(async_less(scaler, reference(), before))


def async_less(scaler, scaled_object, limit):
    async def is_less() -> bool:
        return await value(scaler, scaled_object) < limit

    return is_less


async def test_work_that_waits_for_another_stage_is_not_the_denoisers():
    async with scaled_suite() as (suite, scaler):
        suite.text_encoder.delay_seconds = 30
        async with requests_in_progress(suite, 3):
            await until(lambda: suite.text_encoder.calls == 3 and suite.denoiser.calls == 3)
            assert [await value(scaler, requests(stage)) for stage in STAGES] == [3, 0, 0]


async def test_cancelled_and_failed_requests_leave_nothing():
    async with scaled_suite() as (suite, scaler):
        suite.denoiser.step_gate = asyncio.Event()
        async with requests_in_progress(suite, 5):
            await until(async_equals(scaler, requests(), 5))
        await until(async_equals(scaler, requests(), 0))
        suite.denoiser.error = RuntimeError("broken")
        with suppress(grpc.aio.AioRpcError):
            await generate(suite, prompt="fox", seed=1)
        assert [await value(scaler, requests(stage)) for stage in STAGES] == [0, 0, 0]


async def test_requests_that_wait_for_a_stage_without_replicas_activate_it():
    async with scaled_suite(stage_wait_seconds=30.0, describe_ttl_seconds=0.0) as (suite, scaler):
        suite.denoiser.serving = False
        async with requests_in_progress(suite, 2):
            await until(async_equals(scaler, requests(), 2))
            assert (await scaler.IsActive(requests())).result
            assert await value(scaler, reference(expectedSeconds="1.5")) == 3
            await until(async_equals(scaler, requests("vae-decoder"), 0))


async def test_a_backlog_that_was_never_measured_is_not_zero():
    async with scaled_suite() as (suite, scaler):
        suite.denoiser.step_gate = asyncio.Event()
        async with requests_in_progress(suite, 2):
            await until(lambda: suite.denoiser.calls == 2)
            await until(async_equals(scaler, requests(), 2))
            code, message = await refused(value(scaler, reference()))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "expectedSeconds" in message
            assert (await scaler.IsActive(reference())).result
            assert await value(scaler, reference(expectedSeconds="3")) == 6


async def test_a_new_orchestrator_does_not_take_silence_for_an_empty_backlog():
    async with scaled_suite(scaler_settle_seconds=3600.0) as (suite, scaler):
        for call in (value(scaler, reference()), scaler.IsActive(reference())):
            code, message = await refused(call)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "no request has come since the start" in message
        stream = scaler.StreamIsActive(reference())
        first = asyncio.ensure_future(stream.read())
        assert (await scaler.GetMetricSpec(reference())).metricSpecs[0].targetSizeFloat == 2.5
        await asyncio.sleep(0.05)
        assert not first.done()
        await generate(suite, prompt="fox", seed=1)
        assert (await first).result
        stream.cancel()
        assert await value(scaler, reference()) == 0


@pytest.mark.parametrize(
    ("metadata", "keys"),
    [
        ({"stage": "denoisers"}, {"stage"}),
        ({"model": "klein-9b"}, {"model"}),
        ({"backlogSeconds": "0"}, {"backlogSeconds"}),
        ({"backlogSeconds": "soon"}, {"backlogSeconds"}),
        ({"backlogSeconds": "nan"}, {"backlogSeconds"}),
        ({"backlogRequests": "inf"}, {"backlogRequests"}),
        ({"backlogRequests": "1", "backlogSeconds": "1"}, {"backlogSeconds"}),
        ({"backlogSecond": "5"}, {"backlogSecond"}),
        ({"expectedSeconds": "-1"}, {"expectedSeconds"}),
        ({"stage": "", "model": "x", "expectedSeconds": "1e9"}, {"stage", "model", "expectedSeconds"}),
    ],
)
async def test_bad_metadata_is_named_by_its_key(metadata, keys):
    async with scaled_suite() as (_, scaler):
        for call in (scaler.IsActive, scaler.GetMetricSpec):
            details = explain(await failure(call(reference(**metadata))))
            assert details.code is grpc.StatusCode.INVALID_ARGUMENT
            assert {violation.field for violation in details.violations} == {
                f"scalerMetadata.{key}" for key in keys
            }


async def test_missing_metadata_and_a_metric_of_another_name_are_refused():
    async with scaled_suite() as (_, scaler):
        code, message = await refused(scaler.IsActive(api.ScaledObjectRef()))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "scalerMetadata.stage" in message
        assert "scalerMetadata.backlogSeconds: is missing" in message
        request = api.GetMetricsRequest(scaledObjectRef=reference(), metricName="s0-denoiser-backlog-seconds")
        code, message = await refused(scaler.GetMetrics(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "metricName" in message


TABLE = """
default_model = "a"
[models.a]
text_encoder = "encoder:1"
denoiser = "denoiser-a:1"
vae_decoder = "decoder:1"
[models.b]
text_encoder = "encoder:1"
denoiser = "denoiser-b:1"
vae_decoder = "decoder:1"
"""


async def test_models_share_the_backlog_of_a_shared_pool(tmp_path):
    (tmp_path / "table.toml").write_text(TABLE)
    table = read_routing_table(tmp_path / "table.toml")
    encoder = Trigger.of(reference("text-encoder").scalerMetadata, table).address
    assert encoder.target == "encoder:1"
    backlog = Backlog()
    assert backlog.pool(encoder) is backlog.pool(table.route("b").text_encoder)
    chosen = Trigger.of(reference("denoiser", model="b").scalerMetadata, table)
    assert chosen.address.target == "denoiser-b:1"
    with pytest.raises(Exception, match=r"scalerMetadata\.model: is missing; the denoiser has 2 pools"):
        Trigger.of(reference("denoiser").scalerMetadata, table)


async def test_a_stream_reports_changes_and_ends_when_the_orchestrator_drains(monkeypatch):
    monkeypatch.setattr(external_scaler, "_IDLE_SECONDS", 0.2)
    async with scaled_suite() as (suite, scaler):
        stream = scaler.StreamIsActive(reference())
        seen = [(await stream.read()).result]
        suite.denoiser.step_gate = asyncio.Event()
        async with requests_in_progress(suite, 2):
            seen.append((await stream.read()).result)
        seen.append((await stream.read()).result)
        assert seen == [False, True, False]
        await suite.orchestrator.drain()
        code, message = await refused(stream.read())
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "drains" in message
        assert (await refused(value(scaler, reference())))[0] is grpc.StatusCode.UNAVAILABLE


async def test_streams_are_bounded_and_leave_nothing():
    async with scaled_suite() as (_, scaler):
        streams = [scaler.StreamIsActive(reference()) for _ in range(STREAM_LIMIT)]
        for stream in streams:
            assert not (await stream.read()).result
        code, _ = await refused(scaler.StreamIsActive(reference()).read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        streams[0].cancel()

        async def has_room() -> bool:
            extra = scaler.StreamIsActive(reference())
            try:
                return not (await extra.read()).result
            except grpc.aio.AioRpcError:
                return False
            finally:
                extra.cancel()

        await until(has_room)
        for stream in streams:
            stream.cancel()

"""The table of statuses, both ways, over a real connection."""

import logging

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

from klein_core.errors import CheckpointError, DeviceFault, InvalidInput, Violation
from klein_services.runtime.errors import (
    DeadlinePassed,
    DeadlineUnreachable,
    DeviceOutOfMemory,
    QueueFull,
    ReceiveTimeout,
    StageUnavailable,
    UnknownModel,
)
from klein_services.runtime.status import explain
from tests.services.fakes.runtime_toy import SHAPES, call, failure

VIOLATIONS = (Violation("width_px", "is 7; must be at least 64"), Violation("seed", "is -1"))
Code = grpc.StatusCode
TABLE = [
    (InvalidInput(VIOLATIONS), Code.INVALID_ARGUMENT, "", "width_px: is 7"),
    (
        UnknownModel("model", "other", ["klein"]),
        Code.NOT_FOUND,
        "UNKNOWN_MODEL",
        "'other' here; known: klein",
    ),
    (QueueFull(4, 2.5), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "4 requests wait"),
    (DeviceOutOfMemory("0x7f"), Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory left"),
    (DeadlineUnreachable(1.0, 9.0), Code.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE", "in 1.0 s"),
    (DeadlinePassed(), Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED", "passed"),
    (ReceiveTimeout(30), Code.DEADLINE_EXCEEDED, "RECEIVE_TIMEOUT", "after 30 s"),
    (StageUnavailable("it drains"), Code.UNAVAILABLE, "STAGE_UNAVAILABLE", "it drains"),
    (CheckpointError("/secret/path"), Code.INTERNAL, "INTERNAL_ERROR", "internal error"),
    (ValueError("secret"), Code.INTERNAL, "INTERNAL_ERROR", "internal error"),
]


def raising(error):
    async def behave(request, context):
        raise error
        yield b""

    return behave


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("error", "code", "reason", "message"), TABLE, ids=lambda value: type(value).__name__
)
async def test_each_error_has_its_status_in_every_call_shape(
    toy, toy_channel, shape, error, code, reason, message
):
    toy.behavior = raising(error)
    details = explain(await failure(call(toy_channel, shape)))
    assert (details.code, details.reason) == (code, reason)
    assert message in details.message
    assert "secret" not in details.message
    assert "0x7f" not in details.message


async def test_every_violation_reaches_the_caller(toy, toy_channel):
    toy.behavior = raising(InvalidInput(VIOLATIONS))
    assert explain(await failure(call(toy_channel, "unary_unary"))).violations == VIOLATIONS


async def test_an_unknown_model_names_its_field(toy, toy_channel):
    toy.behavior = raising(UnknownModel("model", "other", ["klein"]))
    (violation,) = explain(await failure(call(toy_channel, "unary_unary"))).violations
    assert violation.field == "model"


async def test_a_full_queue_says_when_to_retry_and_is_counted(toy, toy_channel):
    labels = {"stage": "text-encoder", "reason": "queue_full"}
    before = REGISTRY.get_sample_value("klein_request_rejected_total", labels)
    toy.behavior = raising(QueueFull(4, 2.5))
    assert explain(await failure(call(toy_channel, "unary_unary"))).retry_after_seconds == 2.5
    assert REGISTRY.get_sample_value("klein_request_rejected_total", labels) == before + 1


async def test_a_fault_of_ours_is_told_by_an_id_that_the_log_has(toy, toy_channel, caplog):
    toy.behavior = raising(ValueError("secret"))
    with caplog.at_level(logging.ERROR, "klein.errors"):
        details = explain(await failure(call(toy_channel, "unary_unary")))
    (record,) = caplog.records
    assert record.error_id in details.message
    assert dict(details.metadata) == {"error_id": record.error_id}
    assert "secret" in caplog.text


async def test_a_status_that_the_handler_set_itself_passes_through(toy, toy_channel, caplog):
    async def refuse(request, context):
        await context.abort(Code.FAILED_PRECONDITION, "by hand")
        yield b""

    toy.behavior = refuse
    details = explain(await failure(call(toy_channel, "unary_stream")))
    assert (details.code, details.message) == (Code.FAILED_PRECONDITION, "by hand")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_details_that_cannot_be_read_are_no_details():
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    error = grpc.aio.AioRpcError(Code.ABORTED, grpc.aio.Metadata(), trailing, "odd", None)
    details = explain(error)
    assert (details.code, details.message, details.reason) == (Code.ABORTED, "odd", "")


async def test_a_detail_that_cannot_be_read_leaves_none():
    status = status_pb2.Status(code=Code.ABORTED.value[0], message="odd")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="ODD"))
    status.details[0].value = b"\xff\xff\xff"
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    error = grpc.aio.AioRpcError(Code.ABORTED, grpc.aio.Metadata(), trailing, "odd", None)
    assert explain(error).reason == ""


async def test_details_of_another_code_are_no_details():
    status = status_pb2.Status(code=Code.INTERNAL.value[0], message="odd")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="ODD"))
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    error = grpc.aio.AioRpcError(Code.ABORTED, grpc.aio.Metadata(), trailing, "odd", None)
    details = explain(error)
    assert (details.code, details.reason) == (Code.ABORTED, "")


async def test_grpcio_status_reads_the_details(toy, toy_channel):
    toy.behavior = raising(QueueFull(4, 2.5))
    error = await failure(call(toy_channel, "unary_unary"))
    status = rpc_status.from_call(error)
    assert (status.code, status.message) == (Code.RESOURCE_EXHAUSTED.value[0], error.details())
    assert [detail.TypeName() for detail in status.details] == [
        "google.rpc.ErrorInfo",
        "google.rpc.RetryInfo",
    ]


async def test_a_lost_device_ends_the_server(toy, toy_channel):
    toy.behavior = raising(DeviceFault("context is gone"))
    details = explain(await failure(call(toy_channel, "stream_unary")))
    assert (details.code, details.reason) == (Code.UNAVAILABLE, "DEVICE_FAULT")

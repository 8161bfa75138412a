"""Urgency: the priority classes of a stage's work, and their names on the wire. Torch-free."""

from __future__ import annotations

from enum import IntEnum

from klein_api.v1 import image_pb2
from klein_core.errors import InvalidInput


class Urgency(IntEnum):
    """Priority classes, the most urgent first."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


URGENCIES = {
    image_pb2.PRIORITY_UNSPECIFIED: Urgency.STANDARD,
    image_pb2.PRIORITY_INTERACTIVE: Urgency.INTERACTIVE,
    image_pb2.PRIORITY_STANDARD: Urgency.STANDARD,
    image_pb2.PRIORITY_BATCH: Urgency.BATCH,
}


def urgency_of(priority: image_pb2.Priority.ValueType) -> Urgency:
    """Returns the class of a request's priority; unspecified is standard.

    Raises:
        InvalidInput: there is no such priority.
    """
    if priority not in URGENCIES:
        known = ", ".join(image_pb2.Priority.Name(number) for number in URGENCIES)
        raise InvalidInput.of("priority", f"is {int(priority)}; must be one of {known}")
    return URGENCIES[priority]

"""Tensors of the Open Inference Protocol: reading a request's inputs, and writing a response's outputs."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from klein_api.inference import grpc_inference_service_pb2 as api
from klein_core.errors import InvalidInput, Violation

BYTES = "BYTES"
INT64 = "INT64"
_LENGTH = struct.Struct("<I")
_MAX_EXTENTS = 8


@dataclass(frozen=True)
class TensorKind:
    """A tensor that requests or responses may have."""

    name: str
    datatype: str
    is_list: bool
    """Whether it may have several elements."""

    def metadata(self) -> api.ModelMetadataResponse.TensorMetadata:
        """Returns it as the model's metadata shows it."""
        shape = [-1 if self.is_list else 1]
        return api.ModelMetadataResponse.TensorMetadata(name=self.name, datatype=self.datatype, shape=shape)


def read_inputs(request: api.ModelInferRequest, kinds: Mapping[str, TensorKind]) -> dict[str, list[bytes]]:
    """Returns the elements of a request's inputs by their names.

    Args:
        request: with the elements in `raw_input_contents` or in the inputs' `contents`.
        kinds: the inputs that it may have, all of BYTES.

    Raises:
        InvalidInput: an input is unknown, given twice, or of another type or shape than its elements; all are named.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput.of(
            "raw_input_contents",
            f"has {len(raw)} entries; must have one for each of {len(request.inputs)} inputs",
        )
    inputs: dict[str, list[bytes]] = {}
    violations = []
    for index, tensor in enumerate(request.inputs):
        kind = kinds.get(tensor.name)
        if kind is None:
            violations.append(
                Violation(
                    f"inputs[{index}].name", f"is {tensor.name[:64]!r}; must be one of {', '.join(kinds)}"
                )
            )
        elif tensor.name in inputs:
            violations.append(Violation(f"inputs[{index}].name", f"is {tensor.name!r} a second time"))
        else:
            try:
                inputs[tensor.name] = _elements(tensor, kind, raw[index] if raw else None)
            except ValueError as error:
                violations.append(Violation(tensor.name, str(error)))
    if violations:
        raise InvalidInput(violations)
    return inputs


def bytes_tensor(elements: Sequence[bytes]) -> bytes:
    """Returns the elements of a tensor of BYTES as they are sent raw."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def int64_tensor(elements: Sequence[int]) -> bytes:
    """Returns the elements of a tensor of INT64 as they are sent raw."""
    return struct.pack(f"<{len(elements)}q", *elements)


def _elements(
    tensor: api.ModelInferRequest.InferInputTensor, kind: TensorKind, raw: bytes | None
) -> list[bytes]:
    """Returns a tensor's elements; raises ValueError with a sentence's end about what is wrong."""
    if tensor.datatype != kind.datatype:
        raise ValueError(f"has datatype {tensor.datatype[:64]!r}; must be {kind.datatype}")
    if tensor.parameters:
        raise ValueError(
            f"has parameters ({', '.join(sorted(tensor.parameters))[:64]}); inputs take none here"
        )
    if raw is not None and tensor.HasField("contents"):
        raise ValueError("has contents and raw_input_contents; give one of both")
    elements = list(tensor.contents.bytes_contents) if raw is None else list(_raw_elements(raw))
    shape = list(tensor.shape[:_MAX_EXTENTS])
    if len(tensor.shape) > _MAX_EXTENTS or min(shape, default=1) < 0 or math.prod(shape) != len(elements):
        raise ValueError(f"has shape {shape} and {len(elements)} elements; both must agree")
    if not kind.is_list and len(elements) != 1:
        raise ValueError(f"has {len(elements)} elements; must have one")
    return elements


def _raw_elements(raw: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        if start + _LENGTH.size > len(raw):
            raise ValueError(f"ends after {len(raw)} bytes, within the length of an element")
        (length,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        if start + length > len(raw):
            raise ValueError(f"ends after {len(raw)} bytes; its last element alone has {length}")
        yield raw[start : start + length]
        start += length

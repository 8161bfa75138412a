"""Torch tensors: devices and dtypes by the names of settings, and conversion from and to frames."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from klein_api.v1 import tensor_pb2
from klein_core.errors import InvalidInput
from klein_services.runtime import metrics
from klein_services.runtime.frames import (
    ELEMENT_TYPES,
    FrameEnvelope,
    FrameReader,
    TensorSpec,
    serialized_frames,
    split_frames,
)
from klein_services.runtime.settings import SettingsError

_DTYPES_BY_NAME = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_DTYPES = {number: _DTYPES_BY_NAME[element.name] for number, element in ELEMENT_TYPES.items()}
_DATA_TYPES = {dtype: number for number, dtype in _DTYPES.items()}


def resolve_device(name: str) -> torch.device:
    """Returns the device of a `device` setting; `auto` is the first GPU, or the CPU without one.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda:0")
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"KLEIN_DEVICE is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = available.get(device.type, 0)
    if (device.index or 0) >= count:
        hint = "; a container has only the GPUs that it asks its runtime for" if device.type == "cuda" else ""
        raise SettingsError(f"KLEIN_DEVICE is {name!r}; this machine has {count} such devices{hint}")
    return device


def resolve_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of a `dtype` setting; `None` keeps the checkpoint's own."""
    return _DTYPES_BY_NAME.get(name)


def set_threads(count: int) -> None:
    """Sets the number of CPU threads of one operation; 0 leaves it to torch."""
    if count:
        torch.set_num_threads(count)


def report_memory(stage: str, device: torch.device) -> None:
    """Publishes the memory that torch holds on a GPU as `klein_device_memory_bytes`; nothing for a CPU."""
    if device.type != "cuda":
        return
    gauge = metrics.DEVICE_MEMORY_BYTES
    gauge.labels(stage, "allocated").set_function(lambda: torch.cuda.memory_allocated(device))
    gauge.labels(stage, "reserved").set_function(lambda: torch.cuda.memory_reserved(device))


def data_type_of(dtype: torch.dtype) -> int:
    """Returns the wire's `DataType` of a torch dtype.

    Raises:
        ValueError: tensors of this type are not sent.
    """
    if dtype not in _DATA_TYPES:
        raise ValueError(f"tensors of {dtype} are not sent; only bf16, f16 and f32 are")
    return _DATA_TYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a dtype that is sent: bf16, f16 or f32."""
    return ELEMENT_TYPES[_DATA_TYPES[dtype]].name


def host_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor contiguous in host memory; waits for the device, so call it on the worker."""
    return tensor.detach().to("cpu").contiguous()


def tensor_frames(tensor: torch.Tensor) -> Iterator[tensor_pb2.TensorFrame]:
    """Yields a tensor's frames. Copies the tensor from its device, if needed, before the first one."""
    yield from split_frames(*_bytes_of(tensor))


def serialized_tensor_frames(tensor: torch.Tensor, envelope: FrameEnvelope) -> Iterator[bytes]:
    """Yields a tensor's frames as serialized messages, several times as fast as `tensor_frames`."""
    yield from serialized_frames(*_bytes_of(tensor), envelope)


def _bytes_of(tensor: torch.Tensor) -> tuple[memoryview, TensorSpec]:
    host = host_tensor(tensor)
    # Flat first: a contiguous tensor whose last extent is 1 may have any stride there, which a view as bytes refuses.
    view = memoryview(host.reshape(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
    return view, TensorSpec(data_type_of(host.dtype), tuple(host.shape))


def frames_tensor(
    reader: FrameReader,
    *,
    shape: tuple[int | None, ...] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns the tensor of a finished reader, in torch's own memory.

    Args:
        reader: has read all frames.
        shape: the shape that the tensor must have, `None` for any extent; `None` means any shape.
        device: the device to copy the tensor to.
        dtype: the element type to convert it to on the device; `None` keeps its own.

    Raises:
        InvalidInput: the tensor is incomplete or of another shape.
    """
    reader.require_finished()
    check_spec(reader, shape=shape)
    host = torch.empty(reader.spec.byte_count, dtype=torch.uint8)
    target, start = host.numpy(), 0
    for chunk in reader.chunks:
        piece = numpy.frombuffer(chunk, dtype=numpy.uint8)
        target[start : start + len(piece)] = piece
        start += len(piece)
    flat = host.view(_DTYPES[reader.spec.data_type])
    return flat.view(reader.spec.shape).to(device=device, dtype=dtype)


def check_spec(reader: FrameReader, *, shape: tuple[int | None, ...] | None = None) -> None:
    """Checks a tensor's spec as `frames_tensor` does, from the first frame on.

    Raises:
        InvalidInput: the tensor is of another shape.
    """
    actual = reader.spec.shape
    if shape is not None and (
        len(actual) != len(shape)
        or any(wanted not in (None, extent) for extent, wanted in zip(actual, shape, strict=True))
    ):
        expected = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise InvalidInput.of(reader.field, f"has shape {list(actual)}; must be [{expected}]")

"""Recognises a device's failures among torch's exceptions, without importing torch."""

from __future__ import annotations

from klein_core.errors import DeviceFault
from services.runtime.errors import DeviceOutOfMemory

_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")
_FAULT_TEXTS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "HIP error")


def as_device_fault(error: Exception) -> Exception:
    """Returns the `DeviceFault` that an exception amounts to, or the exception itself.

    torch has classes of its own for both cases since 2.8 but still raises plain `RuntimeError` in places,
    and a lost context shows only in the text.
    """
    if isinstance(error, DeviceFault):
        return error
    fault: Exception
    if (
        isinstance(error, MemoryError)
        or _has_class(error, "OutOfMemoryError")
        or _says(error, _OUT_OF_MEMORY_TEXTS)
    ):
        fault = DeviceOutOfMemory(str(error))
    elif _has_class(error, "AcceleratorError") or _says(error, _FAULT_TEXTS):
        fault = DeviceFault(str(error))
    else:
        return error
    fault.__cause__ = error
    return fault


def _has_class(error: Exception, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)


def _says(error: Exception, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)

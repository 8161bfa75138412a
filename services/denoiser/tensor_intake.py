"""Takes the frames of several tensors, in any order of tensors, and refuses what was not expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klein_api.v1 import tensor_pb2
from klein_core.errors import InvalidInput, Violation
from services.runtime.frames import FrameReader
from services.runtime.tensors import check_spec, frames_tensor

WIDEST_ELEMENT_BYTES = 4
"""So that a wrong element type is refused for what it is and not for its size."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One tensor that must come."""

    field: str
    shape: tuple[int | None, ...]
    """Extents, `None` for any; the last is channels."""
    rows_limit: int
    """Most vectors of channels, the product of all other extents; shared by all of a `pool`."""
    dtype: torch.dtype
    pool: str = ""
    like: str = ""
    """Another tensor that must have the same shape."""


class TensorIntake:
    """The tensors of one request while they arrive."""

    def __init__(self, expectations: Sequence[Expectation]) -> None:
        self._expected = {expectation.field: expectation for expectation in expectations}
        self._readers = {
            field: FrameReader(field, limit_bytes=_limit_bytes(expectation))
            for field, expectation in self._expected.items()
        }

    def add(self, field: str, frame: tensor_pb2.TensorFrame) -> None:
        """Takes a frame of the tensor `field`.

        Raises:
            InvalidInput: nobody asked for that tensor, or the frame does not fit.
        """
        reader = self._readers.get(field)
        if reader is None:
            raise InvalidInput.of(
                field, f"is not expected with this spec; expected: {', '.join(self._expected)}"
            )
        reader.add(frame)
        if frame.HasField("spec"):
            self._check_shape(self._expected[field], reader)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns all tensors by field. Reads every element, so call it off the event loop.

        Raises:
            InvalidInput: tensors are missing, incomplete or hold NaN or infinity; names all of them.
        """
        violations: list[Violation] = []
        made: dict[str, Tensor] = {}
        for field, reader in self._readers.items():
            try:
                made[field] = _finite_tensor(reader, dtype)
            except InvalidInput as error:
                violations += error.violations
        if violations:
            raise InvalidInput(violations)
        return made

    def _check_shape(self, expectation: Expectation, reader: FrameReader) -> None:
        check_spec(reader, shape=expectation.shape, dtypes=(expectation.dtype,))
        others = [
            self._readers[field].spec.shape
            for field, other in self._expected.items()
            if expectation.pool and other.pool == expectation.pool and self._has_spec(field)
        ]
        rows = sum(math.prod(shape[:-1]) for shape in others or [reader.spec.shape])
        if rows > expectation.rows_limit:
            name = expectation.pool or expectation.field
            raise InvalidInput.of(name, f"has {rows} tokens; at most {expectation.rows_limit} are allowed")
        self._check_likeness(expectation)

    def _check_likeness(self, arrived: Expectation) -> None:
        """Compares the pair that the new tensor completes, whichever of the two came first."""
        for field, expectation in self._expected.items():
            pair = (field, expectation.like)
            if expectation.like and arrived.field in pair and all(self._has_spec(name) for name in pair):
                own, other = (self._readers[name].spec.shape for name in pair)
                if own != other:
                    raise InvalidInput.of(
                        field, f"has shape {list(own)}; {expectation.like} has {list(other)}"
                    )

    def _has_spec(self, field: str) -> bool:
        return self._readers[field].has_spec


def _limit_bytes(expectation: Expectation) -> int:
    return expectation.rows_limit * (expectation.shape[-1] or 1) * WIDEST_ELEMENT_BYTES


def _finite_tensor(reader: FrameReader, dtype: torch.dtype) -> Tensor:
    tensor = frames_tensor(reader, dtypes=(dtype,))
    if not torch.isfinite(tensor).all():
        raise InvalidInput.of(reader.field, "holds NaN or infinity; all elements must be finite")
    return tensor

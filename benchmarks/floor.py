"""Lower bound of a computation's time: its matrix products and attention alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_PRODUCTS = ("mm", "addmm", "bmm")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records products and attentions, with arguments of the same shapes and strides."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._stand_ins: dict[Any, Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        name = function.overloadpacket.__name__
        if name in _PRODUCTS or "scaled_dot_product" in name:
            self.calls.append((function, tuple(map(self._stand_in, arguments)), named))
        return function(*arguments, **named)

    def _stand_in(self, value: Any) -> Any:
        """Returns a tensor like `value`; equal ones are shared, so the replay needs little memory."""
        if not isinstance(value, Tensor):
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self._stand_ins:
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self._stand_ins[key] = empty.normal_()
        return self._stand_ins[key]


def products_alone(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records one run; returns a function that repeats only its products and attentions, on random numbers."""
    with torch.no_grad(), _Recorder() as recorder:
        result = run()

    def replay() -> Tensor:
        for function, arguments, named in recorder.calls:
            function(*arguments, **named)
        return result

    return replay

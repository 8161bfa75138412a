"""Muon: momentum whose update is made orthogonal, for weight matrices and convolution kernels.

Method: K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADAM_RMS = 0.2


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Brings all singular values of a matrix near 1 by a quintic Newton-Schulz iteration.

    Args:
        matrix: (rows, columns) in a floating type.
        iterations: five leave the singular values between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    estimate = matrix.T if tall else matrix
    estimate = estimate / (estimate.norm() + 1e-7)
    for _ in range(iterations):
        gram = estimate @ estimate.T
        estimate = torch.addmm(estimate, torch.addmm(gram, gram, gram, beta=b, alpha=c), estimate, beta=a)
    return estimate.T if tall else estimate


class Muon(torch.optim.Optimizer):
    """The optimiser; a step has the root mean square that AdamW's would have at the same learning rate.

    Args:
        parameters: tensors of two or more dimensions; all but the first are seen as columns.
        learning_rate: read back as `param_groups[…]["lr"]`.
        momentum: share of the old direction that is kept.
        blocks: for each fused parameter, the row counts of the projections that it holds.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        momentum: float = 0.95,
        blocks: dict[nn.Parameter, list[int]] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": momentum})
        self._blocks = blocks or {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Applies one update from the gradients at hand; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None if closure is None else closure()

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        rows = self._blocks.get(parameter, [direction.shape[0]])
        for block, target in zip(direction.split(rows), parameter.flatten(1).split(rows), strict=True):
            target.add_(orthogonalised(block), alpha=-group["lr"] * _ADAM_RMS * max(block.shape) ** 0.5)

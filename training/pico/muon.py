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


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
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
    """The optimizer; a step has the root mean square that AdamW's would have at the same learning rate.

    Args:
        parameters: tensors of two or more dimensions; all but the first are seen as columns.
        learning_rate: read back as `param_groups[…]["lr"]`.
        momentum: share of the old direction that is kept.
        blocks: for each fused parameter, the row counts of the projections that it holds.
        workers: this process's number and how many there are; each does its share of the matrices.
        add_up: sums a flat tensor over all processes in place; needed with several workers.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        momentum: float = 0.95,
        blocks: dict[nn.Parameter, list[int]] | None = None,
        workers: tuple[int, int] = (0, 1),
        add_up: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": momentum})
        self._blocks = blocks or {}
        self._workers, self._add_up = workers, add_up

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Applies one update from the current gradients; parameters without a gradient stay."""
        targets: list[tuple[Tensor, float]] = []
        directions: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                for target, direction in self._directions(parameter, group["momentum"]):
                    targets.append((target, group["lr"] * _ADAM_RMS * max(direction.shape) ** 0.5))
                    directions.append(direction)
        for (target, rate), update in zip(targets, self._orthogonalized(directions), strict=True):
            target.sub_(update.reshape(target.shape), alpha=rate)
        return None if closure is None else closure()

    def _directions(self, parameter: nn.Parameter, momentum: float) -> list[tuple[Tensor, Tensor]]:
        """Returns each projection of a parameter, a view, with its smoothed gradient as rows and columns."""
        if parameter.grad is None:
            return []
        state: dict[str, Any] = self.state[parameter]
        average = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        direction = parameter.grad.lerp(average, momentum).flatten(1)
        rows = self._blocks.get(parameter, [direction.shape[0]])
        # Flattening the parameter itself would copy it where its memory format is channels-last.
        return list(zip(torch.split(parameter, rows), torch.split(direction, rows), strict=True))

    def _orthogonalized(self, directions: list[Tensor]) -> list[Tensor]:
        rank, processes = self._workers
        if processes == 1 or self._add_up is None:
            return [orthogonalized(direction) for direction in directions]
        own = [
            orthogonalized(direction) if index % processes == rank else torch.zeros_like(direction)
            for index, direction in enumerate(directions)
        ]
        flat = torch.cat([direction.flatten() for direction in own])
        self._add_up(flat)
        pieces = torch.split(flat, [direction.numel() for direction in directions])
        return [piece.view_as(direction) for piece, direction in zip(pieces, directions, strict=True)]

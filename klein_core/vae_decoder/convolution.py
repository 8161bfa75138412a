"""The one convolution that every layer of the autoencoder uses."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from klein_core.emulation import is_emulated


class Convolution(nn.Conv2d):
    """A convolution with bias: (B, in, h, w) → (B, out, h', w'), in the features' dtype."""

    __call__: Callable[..., Tensor]

    def forward(self, features: Tensor) -> Tensor:
        bias = self.bias
        if bias is None or not is_emulated(features.device, features.dtype):
            return super().forward(features)
        result: Tensor = self._conv_forward(features.float(), self.weight.float(), bias.float())
        return result.to(features.dtype)

"""A convolution that works around a bug in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StridedConv2d(nn.Conv2d):
    """A strided 1 x 1 convolution with few channels, which trains in contiguous memory.

    In channels_last memory, the CPU backward of torch 2.13 writes out of bounds for such a
    convolution with less than 8 input channels: the process crashes, or goes on with wrong numbers.
    Reductions make such layers.

    Example:
        >>> conv = StridedConv2d(4, 8, 1, stride=2).to(memory_format=torch.channels_last)
        >>> x = torch.rand(2, 4, 6, 6).to(memory_format=torch.channels_last)
        >>> conv(x).is_contiguous()
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if torch.compiler.is_exporting() or not torch.is_grad_enabled():
            return super().forward(input)
        x, weight = _contiguous(input), _contiguous(self.weight)
        convolved: Tensor = self._conv_forward(x, weight, self.bias)
        return convolved


def _contiguous(x: Tensor) -> Tensor:
    """``x`` in contiguous memory, with the usual strides even in axes of size 1."""
    return x.contiguous().flatten().view(x.shape)


def with_safe_backward(layer: nn.Module) -> nn.Module:
    """Make a layer a :class:`StridedConv2d` if it is a convolution of that kind."""
    if type(layer) is not nn.Conv2d or layer.in_channels // layer.groups >= 8:
        return layer
    if set(layer.kernel_size) == {1} and max(layer.stride) > 1:
        layer.__class__ = StridedConv2d
    return layer

"""A convolution that keeps out of the way of a fault of torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StridedConv2d(nn.Conv2d):
    """A 1 x 1 convolution of few channels and a stride, in contiguous memory when it is trained.

    In channels_last memory the backward of torch 2.13 on a CPU writes past the end of a block for
    such a convolution of less than 8 input channels: the process crashes, or goes on with other
    numbers. Reductions make such layers.

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
    """``x`` with the strides of contiguous memory in axes of size 1 too, which torch looks at."""
    return x.contiguous().flatten().view(x.shape)


def avoids_fault(layer: nn.Module) -> nn.Module:
    """A layer, made a :class:`StridedConv2d` if it is a convolution of that kind."""
    if type(layer) is not nn.Conv2d or layer.in_channels // layer.groups >= 8:
        return layer
    if set(layer.kernel_size) == {1} and max(layer.stride) > 1:
        layer.__class__ = StridedConv2d
    return layer
